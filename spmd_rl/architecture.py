"""A Hugging Face `config.json` read as an architecture: what Megatron must build to hold those
weights.

Pure: a dictionary in, values out; imports torch only for the rotary frequencies. A family is an
entry of `FAMILIES`; `megatron:` keys that contradict the checkpoint are reported as sentences.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base, how much of a head it turns, and its scaling parameters."""

    theta: float
    dimensions: int
    interleaved: bool = False
    scaling: dict[str, Any] = field(default_factory=dict)

    def inv_freq(self) -> torch.Tensor:
        """[dimensions / 2] float32 angles per position, as transformers computes them."""
        import torch

        steps = torch.arange(0, self.dimensions, 2, dtype=torch.int64).float() / self.dimensions
        inv_freq = 1.0 / (self.theta**steps)
        kind = self.scaling.get("rope_type", "default")
        if kind == "linear":
            return inv_freq / self.scaling["factor"]
        if kind == "llama3":
            return _llama3(inv_freq, self.scaling)
        return inv_freq


def _llama3(inv_freq: torch.Tensor, scaling: dict[str, Any]) -> torch.Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    import torch

    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    old_length = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    stretched = inv_freq / scaling["factor"]
    smooth = (old_length / wavelength - low) / (high - low)
    blended = (1 - smooth) * stretched + smooth * inv_freq
    result = torch.where(wavelength > old_length / low, stretched, inv_freq)
    medium = (wavelength >= old_length / high) & (wavelength <= old_length / low)
    return torch.where(medium, blended, result)


@dataclass(frozen=True)
class Architecture:
    """What the checkpoint fixes. `transformer` are fields of Megatron's (MLA)TransformerConfig."""

    family: str
    vocab_size: int
    max_positions: int
    tied: bool
    rope: Rope
    transformer: dict[str, Any]
    hf: dict[str, Any]
    post_norms: bool = False  # norms on what attention and MLP give, before it is added

    @property
    def latent(self) -> bool:
        """Whether attention goes through low-rank latents (MLA)."""
        return bool(self.transformer.get("multi_latent_attention"))

    @property
    def expert_layers(self) -> tuple[bool, ...]:
        """For each layer, whether its MLP is a mixture of experts."""
        freq = self.transformer.get("moe_layer_freq")
        if freq is None:
            return (False,) * self.transformer["num_layers"]
        return tuple(bool(layer) for layer in freq)


@dataclass(frozen=True)
class Family:
    """How a `model_type` differs from the Llama layout."""

    qkv_bias: bool = False  # always there
    bias_key: bool = False  # attention_bias means biases of query, key and value only
    qk_norm: bool | None = False  # None: as use_qk_norm says
    post_norms: bool = False
    rotary_fraction: float = 1.0  # of a head, where config.json does not say
    rotary_interleaved: bool = False
    attention: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    experts: Callable[[dict[str, Any]], dict[str, Any]] | None = None


def _softmax_experts(hf: dict[str, Any]) -> dict[str, Any]:
    """Qwen3-MoE: the best experts' softmax weights, summing to one again if norm_topk_prob."""
    dense, step = hf.get("mlp_only_layers") or [], hf.get("decoder_sparse_step", 1)
    return dict(
        num_moe_experts=_num_experts(hf),
        moe_router_topk=hf["num_experts_per_tok"],
        moe_ffn_hidden_size=hf["moe_intermediate_size"],
        moe_layer_freq=[
            int(i not in dense and (i + 1) % step == 0) for i in range(hf["num_hidden_layers"])
        ],
        moe_router_score_function="softmax",
        moe_router_pre_softmax=not hf.get("norm_topk_prob", False),
    )


def _sigmoid_experts(hf: dict[str, Any]) -> dict[str, Any]:
    """GLM-4.5 and DeepSeek-V3: sigmoid scores, a bias that only chooses, shared experts, the first
    layers dense.
    """
    experts, topk = _num_experts(hf), hf["num_experts_per_tok"]
    groups, group_topk = hf.get("n_group") or 1, hf.get("topk_group") or 1
    if groups > 1 and topk // group_topk != 2:
        raise ValueError(
            f"model.hf_checkpoint: num_experts_per_tok {topk} with topk_group {group_topk} is not "
            "supported: groups of experts are ranked by their 2 best, so the first must be twice "
            "the second"
        )
    if not hf.get("norm_topk_prob", True):
        raise ValueError("model.hf_checkpoint: norm_topk_prob: false is not supported")
    layers, dense = hf["num_hidden_layers"], hf.get("first_k_dense_replace", 0)
    shared = hf.get("n_shared_experts") or 0
    return dict(
        num_moe_experts=experts,
        moe_router_topk=topk,
        moe_ffn_hidden_size=hf["moe_intermediate_size"],
        moe_layer_freq=[int(i >= dense) for i in range(layers)],
        moe_router_score_function="sigmoid",
        moe_router_pre_softmax=True,
        moe_router_enable_expert_bias=True,
        moe_router_topk_scaling_factor=hf.get("routed_scaling_factor", 1.0),
        moe_router_num_groups=groups if groups > 1 else None,
        moe_router_group_topk=group_topk if groups > 1 else None,
        moe_shared_expert_intermediate_size=hf["moe_intermediate_size"] * shared or None,
    )


def _latent_attention(hf: dict[str, Any]) -> dict[str, Any]:
    """DeepSeek-V3's queries, keys and values through low-rank latents; part of a head is turned."""
    scaling = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", "yarn"):
        raise ValueError(f"model.hf_checkpoint: rope scaling '{kind}' is not supported with MLA")
    if not hf.get("rope_interleave", True):
        raise ValueError("model.hf_checkpoint: rope_interleave: false is not supported")
    yarn = {}
    if kind == "yarn":
        yarn = dict(
            rotary_scaling_factor=scaling["factor"],
            original_max_position_embeddings=scaling["original_max_position_embeddings"],
            beta_fast=scaling.get("beta_fast") or 32,
            beta_slow=scaling.get("beta_slow") or 1,
            mscale=scaling.get("mscale") or 1.0,
            mscale_all_dim=scaling.get("mscale_all_dim") or 0.0,
        )
    return dict(
        multi_latent_attention=True,
        q_lora_rank=hf.get("q_lora_rank"),
        kv_lora_rank=hf["kv_lora_rank"],
        qk_head_dim=hf["qk_nope_head_dim"],
        qk_pos_emb_head_dim=hf["qk_rope_head_dim"],
        v_head_dim=hf["v_head_dim"],
        num_query_groups=hf["num_attention_heads"],
        qk_layernorm=True,
        rope_type="yarn" if kind == "yarn" else "rope",
        rotary_base=float(_theta(hf)),
    ) | (yarn or dict(rotary_scaling_factor=1.0))


_DEEPSEEK = Family(attention=_latent_attention, experts=_sigmoid_experts)
FAMILIES = {
    "llama": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
    "qwen3_moe": Family(qk_norm=True, experts=_softmax_experts),
    "glm4": Family(bias_key=True, post_norms=True, rotary_fraction=0.5, rotary_interleaved=True),
    "glm4_moe": Family(bias_key=True, qk_norm=None, rotary_fraction=0.5, experts=_sigmoid_experts),
    "deepseek_v3": _DEEPSEEK,
    "kimi_k2": _DEEPSEEK,
}
EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts")


def read(checkpoint: str | Path) -> Architecture:
    """The architecture of an HF checkpoint directory."""
    hf = _config(checkpoint)
    check_trainable(hf)
    return parse(hf)


def read_shape(checkpoint: str | Path) -> Architecture:
    """As `read`, of weights that may be quantised."""
    return parse(_config(checkpoint))


def _config(checkpoint: str | Path) -> dict[str, Any]:
    path = Path(checkpoint) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"model.hf_checkpoint: {path} does not exist; give a Hugging Face directory"
        )
    return json.loads(path.read_text())


def check_trainable(hf: dict[str, Any]) -> None:
    """Raise ValueError where the weights are quantised: engines may have such, training may not."""
    method = (hf.get("quantization_config") or {}).get("quant_method")
    if method:
        raise ValueError(
            f"model.hf_checkpoint: its weights are quantised ({method}) and cannot be trained; "
            "give a bf16 checkpoint of the model, or one in model.ref_load"
        )


def parse(hf: dict[str, Any]) -> Architecture:
    """The architecture that a config.json describes; ValueError on what cannot be built."""
    name = hf.get("model_type", "")
    if name not in FAMILIES:
        raise ValueError(
            f"model.hf_checkpoint: model_type '{name}' is not supported; "
            f"supported are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[name]
    _refuse_unsupported(hf, family)
    heads = hf["num_attention_heads"]
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    qk_norm = hf.get("use_qk_norm", False) if family.qk_norm is None else family.qk_norm
    transformer = dict(
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        ffn_hidden_size=hf["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=hf.get("num_key_value_heads") or heads,
        kv_channels=head_dim,
        layernorm_epsilon=hf.get("rms_norm_eps", 1e-6),
        normalization="RMSNorm",
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=family.qkv_bias or (family.bias_key and bool(hf.get("attention_bias"))),
        qk_layernorm=qk_norm,
    )
    if family.attention:
        transformer |= family.attention(hf)
    if family.experts:
        transformer |= family.experts(hf)
    return Architecture(
        family=name,
        vocab_size=hf["vocab_size"],
        max_positions=hf.get("max_position_embeddings", 2048),
        tied=bool(hf.get("tie_word_embeddings", False)),
        rope=_rope(hf, family, head_dim),
        transformer=transformer,
        hf=hf,
        post_norms=family.post_norms,
    )


def _num_experts(hf: dict[str, Any]) -> int:
    return next(hf[key] for key in EXPERT_COUNTS if hf.get(key))


def _theta(hf: dict[str, Any]) -> float:
    """transformers 4: rope_theta; transformers 5: in rope_parameters."""
    nested = (hf.get("rope_parameters") or hf.get("rope_scaling") or {}).get("rope_theta")
    return nested or hf.get("rope_theta") or 10000.0


def _rope(hf: dict[str, Any], family: Family, head_dim: int) -> Rope:
    scaling = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    scaling.pop("rope_theta", None)
    kind = scaling.get("rope_type") or scaling.pop("type", None) or "default"
    fraction = scaling.pop("partial_rotary_factor", None) or hf.get("partial_rotary_factor")
    scaling |= {"rope_type": kind}
    if family.attention:  # turned inside Megatron's MLA, from its own fields
        return Rope(float(_theta(hf)), hf["qk_rope_head_dim"], True, scaling)
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(
            f"model.hf_checkpoint: rope scaling '{kind}' is not supported; "
            "supported are default, linear and llama3"
        )
    dimensions = int(head_dim * (fraction or family.rotary_fraction))
    return Rope(float(_theta(hf)), dimensions, family.rotary_interleaved, scaling)


def _refuse_unsupported(hf: dict[str, Any], family: Family) -> None:
    biased = bool(hf.get("attention_bias")) and not (family.bias_key or family.qkv_bias)
    faults = {
        "hidden_act other than silu": hf.get("hidden_act", "silu") != "silu",
        "sliding-window attention (use_sliding_window)": bool(hf.get("use_sliding_window")),
        "biases in the MLP (mlp_bias)": bool(hf.get("mlp_bias")),
        # Llama's and Qwen3's attention_bias also puts one on the output projection
        "attention_bias": biased,
    }
    for what, present in faults.items():
        if present:
            raise ValueError(f"model.hf_checkpoint: {what} is not supported")


def same_shape(one: Architecture, other: Architecture, values: bool = False) -> bool:
    """Whether the weights of one fit into the other, and mean the same there. `values`: a value
    layer stands in place of the output layer, so nothing is tied.
    """
    names = [
        "family",
        "vocab_size",
        "rope",
        "transformer",
        "post_norms",
        *([] if values else ["tied"]),
    ]
    return all(getattr(one, name) == getattr(other, name) for name in names)


def contradictions(architecture: Architecture, megatron: dict[str, Any]) -> list[str]:
    """Sentences for `megatron:` keys that disagree with the checkpoint."""
    faults = []
    for key, value in architecture.transformer.items():
        if key in megatron and megatron[key] != value:
            faults.append(
                f"megatron.{key} is {megatron[key]!r}, but the checkpoint's config.json says "
                f"{value!r}; remove the key"
            )
    return faults


def stages(architecture: Architecture, megatron: dict[str, Any], pp: int) -> list[list[bool]]:
    """For each pipeline stage, its layers: whether each has experts. ValueError where they do not
    divide.
    """
    kinds = list(architecture.expert_layers)
    first, last = (megatron.get(f"num_layers_in_{end}_pipeline_stage") for end in ("first", "last"))
    inner = pp - (first is not None) - (last is not None)
    rest = len(kinds) - (first or 0) - (last or 0)
    if rest < 0 or (rest % inner if inner else rest):
        raise ValueError(
            f"megatron.pipeline_model_parallel_size {pp} does not divide the model's {len(kinds)} "
            "layers: set megatron.num_layers_in_first_pipeline_stage or "
            "num_layers_in_last_pipeline_stage, so that the other stages get equally many"
        )
    sizes = [rest // inner] * inner if inner else []
    sizes = ([first] if first is not None else []) + sizes + ([last] if last is not None else [])
    chunks = megatron.get("virtual_pipeline_model_parallel_size") or 1
    if chunks > 1 and any(size % chunks for size in sizes):
        raise ValueError(
            f"megatron.virtual_pipeline_model_parallel_size {chunks} does not divide the "
            f"{sizes[0]} layers of a pipeline stage: choose a divisor"
        )
    if chunks > 1 and len(set(sizes)) == 1:  # chunk c of stage s is run c x pp + s
        each = sizes[0] // chunks
        return [
            [kind for c in range(chunks) for kind in kinds[(c * pp + s) * each :][:each]]
            for s in range(pp)
        ]
    starts = [sum(sizes[:s]) for s in range(pp)]
    return [kinds[start : start + size] for start, size in zip(starts, sizes, strict=True)]
