"""How many parameters, operations and bytes of activations a model has, layer by layer.

In: an architecture and how finely tensors are split. Out: numbers. Parameters are exact (tests
compare them with built models); activations are what backward needs of a bfloat16 layer with fused
kernels. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spmd_rl.architecture import Architecture


@dataclass(frozen=True)
class Split:
    """Over how many ranks tensors are split."""

    tp: int = 1
    ep: int = 1
    etp: int = 1
    sequence: int = 1  # tp where megatron.sequence_parallel is on


@dataclass(frozen=True)
class Count:
    """Parameters of one rank: `experts` have fewer data-parallel copies than the rest."""

    dense: int = 0
    experts: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.dense + other.dense, self.experts + other.experts)

    @property
    def total(self) -> int:
        return self.dense + self.experts


def _attention_sizes(shape: dict[str, Any]) -> tuple[int, int, int, int]:
    """Heads; width of a query and key, of a value; query groups."""
    heads = shape["num_attention_heads"]
    if shape.get("multi_latent_attention"):
        width = shape["qk_head_dim"] + shape["qk_pos_emb_head_dim"]
        return heads, width, shape["v_head_dim"], heads
    return heads, shape["kv_channels"], shape["kv_channels"], shape["num_query_groups"]


def attention(architecture: Architecture, tp: int = 1) -> int:
    """Parameters of a layer's attention on one rank."""
    shape = architecture.transformer
    hidden = shape["hidden_size"]
    heads, width, value, groups = _attention_sizes(shape)
    project = heads * value * hidden // tp
    if not architecture.latent:
        rows = (heads + groups) * width + groups * value
        norms = 2 * width if shape["qk_layernorm"] else 0
        return rows * (hidden + bool(shape["add_qkv_bias"])) // tp + project + norms
    query, latent = shape["q_lora_rank"], shape["kv_lora_rank"]
    down = hidden * (latent + shape["qk_pos_emb_head_dim"]) + latent
    up = latent * heads * (shape["qk_head_dim"] + value) // tp
    if query is None:
        return hidden * heads * width // tp + down + up + project
    return hidden * query + query + query * heads * width // tp + down + up + project


def mlp(architecture: Architecture, experts: bool, split: Split) -> Count:
    """Parameters of a layer's MLP on one rank, the router with them."""
    shape = architecture.transformer
    hidden = shape["hidden_size"]
    if not experts:
        return Count(3 * hidden * shape["ffn_hidden_size"] // split.tp)
    number = shape["num_moe_experts"]
    shared = 3 * hidden * (shape.get("moe_shared_expert_intermediate_size") or 0) // split.tp
    each = 3 * hidden * shape["moe_ffn_hidden_size"] // split.etp
    return Count(number * hidden + shared, number // split.ep * each)


def layer(architecture: Architecture, experts: bool, split: Split) -> Count:
    norms = (4 if architecture.post_norms else 2) * architecture.transformer["hidden_size"]
    own = Count(attention(architecture, split.tp) + norms)
    return own + mlp(architecture, experts, split)


def embedding(architecture: Architecture, tp: int = 1) -> int:
    """Parameters of the embedding, or of the output layer, on one rank; padded to divide."""
    return -(-architecture.vocab_size // tp) * architecture.transformer["hidden_size"]


def largest(architecture: Architecture, split: Split) -> int:
    """Numbers of the largest tensors that are whole at once on every rank during a push: one, or
    an expert of each expert rank.
    """
    shape = architecture.transformer
    found = embedding(architecture)
    if any(architecture.expert_layers):
        each = 2 * shape["hidden_size"] * shape["moe_ffn_hidden_size"]
        found = max(found, split.ep * each)
    return max(found, 2 * shape["hidden_size"] * shape["ffn_hidden_size"])


def whole(architecture: Architecture) -> int:
    """Parameters of the unsplit model."""
    layers = (layer(architecture, kind, Split()).total for kind in architecture.expert_layers)
    ends = (1 if architecture.tied else 2) * embedding(architecture)
    return sum(layers) + ends + architecture.transformer["hidden_size"]


def active(architecture: Architecture) -> int:
    """Parameters that one token meets."""
    shape, idle = architecture.transformer, 0
    if any(architecture.expert_layers):
        unused = shape["num_moe_experts"] - shape["moe_router_topk"]
        each = 3 * shape["hidden_size"] * shape["moe_ffn_hidden_size"]
        idle = sum(architecture.expert_layers) * unused * each
    return whole(architecture) - idle


def flops_terms(architecture: Architecture) -> tuple[int, int]:
    """What a forward pass does for each token (two operations for each parameter met), and for each
    pair of a sequence's tokens (causal attention).
    """
    shape = architecture.transformer
    heads, width, value, _ = _attention_sizes(shape)
    matrices = active(architecture)
    if not architecture.tied:  # looking up an embedding costs nothing
        matrices -= embedding(architecture)
    return 2 * matrices, heads * (width + value) * shape["num_layers"]


def forward_flops(architecture: Architecture, length: int) -> int:
    """Of one forward pass over one sequence."""
    linear, square = flops_terms(architecture)
    return linear * length + square * length * length


def cache_bytes(architecture: Architecture, tp: int = 1, item: int = 2) -> int:
    """Of one token in the cache of one of an engine's ranks."""
    shape = architecture.transformer
    if architecture.latent:
        numbers = shape["kv_lora_rank"] + shape["qk_pos_emb_head_dim"]
    else:
        numbers = 2 * shape["kv_channels"] * max(shape["num_query_groups"] // tp, 1)
    return numbers * item * shape["num_layers"]


def activations(
    architecture: Architecture,
    experts: bool,
    split: Split,
    modules: set[str],
    item: int = 2,
    plain: bool = False,
) -> float:
    """Bytes a layer keeps for each token of a micro-batch. `modules`: what is recomputed; `plain`:
    layers of plain torch, which keep copies that fused kernels do not.
    """
    hidden = architecture.transformer["hidden_size"] / split.sequence
    kept = (4 if architecture.post_norms else 2) * hidden  # what norms are of, then what they give
    kept += 0 if "layernorm" in modules else 2 * hidden
    kept += _kept_by_attention(architecture, split, modules, plain)
    if not experts:
        width = architecture.transformer["ffn_hidden_size"]
        kept += 0 if "mlp" in modules else 3 * width / split.tp
    elif "moe" not in modules:
        kept += _kept_by_experts(architecture, split, modules, plain)
    return kept * item


def _kept_by_attention(
    architecture: Architecture, split: Split, modules: set[str], plain: bool
) -> float:
    shape = architecture.transformer
    heads, width, value, groups = _attention_sizes(shape)
    output = heads * value * (2 if plain else 1)
    inputs = heads * width + groups * (width + value)
    if architecture.latent:
        latents = 2 * ((shape["q_lora_rank"] or 0) + shape["kv_lora_rank"]) / split.sequence
        return latents + (output + (0 if "mla_up_proj" in modules else inputs)) / split.tp
    normed = 0
    if shape["qk_layernorm"]:
        normed = heads * width + (inputs if plain else groups * width)
    return (inputs + normed + output) / split.tp


def _kept_by_experts(
    architecture: Architecture, split: Split, modules: set[str], plain: bool
) -> float:
    """A token's copies are spread over the ranks that share its sequence: as they leave, as they
    arrive, through the expert, and what comes back.
    """
    shape = architecture.transformer
    width, hidden = shape["moe_ffn_hidden_size"], shape["hidden_size"]
    shared = shape.get("moe_shared_expert_intermediate_size") or 0
    kept = 0 if "shared_experts" in modules else 3 * shared / split.tp
    inner = 5 if plain else 3
    inner -= 1 if "moe_act" in modules else 0
    copies = 2 if plain else 3
    return kept + shape["moe_router_topk"] / split.sequence * (copies * hidden + inner * width)
