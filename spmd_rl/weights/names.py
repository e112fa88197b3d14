"""One map per model family between Megatron parameters and Hugging Face tensors.

A family is data: Megatron name -> (kind, HF names). Loading, saving, pushing to engines and
gradient tests all go through it. The kind says how HF tensors make up the Megatron tensor and how
tensor parallelism splits it:

  whole    one tensor, the same on every rank
  rows     one tensor split along dimension 0; columns: along dimension 1
  vocab    rows, padded with zeros to divide evenly
  gate_up  two tensors, each split along dimension 0, one under the other on each rank
  fused    gate_up that Hugging Face keeps as one tensor
  qkv      query, key, value interleaved by query group, then split along dimension 0

Names of Transformer Engine layers, whose norms live inside linears and whose experts are numbered
weights, are understood too. Experts are split over the experts' tensor-parallel ranks. Knows no
process groups.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spmd_rl.architecture import Architecture

_HF = "model.layers.{layer}."
_MEGATRON = "decoder.layers.{layer}."
_ATTENTION = _MEGATRON + "self_attention."
_EXPERT = _MEGATRON + "mlp.experts.local_experts.{expert}."
_SHARED = _MEGATRON + "mlp.shared_experts."

Map = dict[str, tuple[str, ...]]


def _qkv(what: str) -> tuple[str, ...]:
    return ("qkv", *(f"{_HF}self_attn.{x}_proj.{what}" for x in "qkv"))


def _mlp(megatron: str, hf: str) -> Map:
    return {
        megatron + "linear_fc1.weight": (
            "gate_up",
            hf + "gate_proj.weight",
            hf + "up_proj.weight",
        ),
        megatron + "linear_fc2.weight": ("columns", hf + "down_proj.weight"),
    }


_OUTSIDE: Map = {
    "embedding.word_embeddings.weight": ("vocab", "model.embed_tokens.weight"),
    "decoder.final_layernorm.weight": ("whole", "model.norm.weight"),
    "output_layer.weight": ("vocab", "lm_head.weight"),
    _MEGATRON + "input_layernorm.weight": ("whole", _HF + "input_layernorm.weight"),
    _MEGATRON + "pre_mlp_layernorm.weight": ("whole", _HF + "post_attention_layernorm.weight"),
    _ATTENTION + "linear_proj.weight": ("columns", _HF + "self_attn.o_proj.weight"),
}
_QKV: Map = {_ATTENTION + "linear_qkv.weight": _qkv("weight")}
_QKV_BIAS: Map = {_ATTENTION + "linear_qkv.bias": _qkv("bias")}
_QK_NORM: Map = {
    _ATTENTION + "q_layernorm.weight": ("whole", _HF + "self_attn.q_norm.weight"),
    _ATTENTION + "k_layernorm.weight": ("whole", _HF + "self_attn.k_norm.weight"),
}
_POST_NORMS: Map = {
    _MEGATRON + "post_self_attn_layernorm.weight": (
        "whole",
        _HF + "post_self_attn_layernorm.weight",
    ),
    _MEGATRON + "post_mlp_layernorm.weight": ("whole", _HF + "post_mlp_layernorm.weight"),
}
_LATENT: Map = {
    _ATTENTION + "linear_q_proj.weight": ("rows", _HF + "self_attn.q_proj.weight"),
    _ATTENTION + "linear_q_down_proj.weight": ("whole", _HF + "self_attn.q_a_proj.weight"),
    _ATTENTION + "q_layernorm.weight": ("whole", _HF + "self_attn.q_a_layernorm.weight"),
    _ATTENTION + "linear_q_up_proj.weight": ("rows", _HF + "self_attn.q_b_proj.weight"),
    _ATTENTION + "linear_kv_down_proj.weight": (
        "whole",
        _HF + "self_attn.kv_a_proj_with_mqa.weight",
    ),
    _ATTENTION + "kv_layernorm.weight": ("whole", _HF + "self_attn.kv_a_layernorm.weight"),
    _ATTENTION + "linear_kv_up_proj.weight": ("rows", _HF + "self_attn.kv_b_proj.weight"),
}
_MLP = _mlp(_MEGATRON + "mlp.", _HF + "mlp.")
_EXPERTS: Map = {
    _MEGATRON + "mlp.router.weight": ("whole", _HF + "mlp.gate.weight"),
    **_mlp(_EXPERT, _HF + "mlp.experts.{expert}."),
}
_SIGMOID_EXPERTS: Map = {
    **_EXPERTS,
    _MEGATRON + "mlp.router.expert_bias": ("whole", _HF + "mlp.gate.e_score_correction_bias"),
    **_mlp(_SHARED, _HF + "mlp.shared_experts."),
}
_FUSED_MLP: Map = {
    _MEGATRON + "mlp.linear_fc1.weight": ("fused", _HF + "mlp.gate_up_proj.weight"),
    _MEGATRON + "mlp.linear_fc2.weight": ("columns", _HF + "mlp.down_proj.weight"),
}
_LLAMA: Map = {**_OUTSIDE, **_QKV, **_MLP}
_DEEPSEEK: Map = {**_OUTSIDE, **_LATENT, **_MLP, **_SIGMOID_EXPERTS}
FAMILIES: dict[str, Map] = {
    "llama": _LLAMA,
    "qwen2": {**_LLAMA, **_QKV_BIAS},
    "qwen3": {**_LLAMA, **_QK_NORM},
    "qwen3_moe": {**_LLAMA, **_QK_NORM, **_EXPERTS},
    "glm4": {**_OUTSIDE, **_QKV, **_QKV_BIAS, **_FUSED_MLP, **_POST_NORMS},
    "glm4_moe": {**_LLAMA, **_QKV_BIAS, **_QK_NORM, **_SIGMOID_EXPERTS},
    "deepseek_v3": _DEEPSEEK,
    "kimi_k2": _DEEPSEEK,
}
# In place of the output layer, in a critic; named as in transformers' ...ForTokenClassification.
VALUE_LAYER: Map = {
    "output_layer.weight": ("whole", "score.weight"),
    "output_layer.bias": ("whole", "score.bias"),
}
# A parameter's name in layers of Transformer Engine -> in plain ones.
_TRANSFORMER_ENGINE = (
    (r"self_attention\.linear_qkv\.layer_norm_weight$", "input_layernorm.weight"),
    (r"linear_(q|kv)_up_proj\.layer_norm_weight$", r"\1_layernorm.weight"),
    (r"mlp\.linear_fc1\.layer_norm_weight$", "pre_mlp_layernorm.weight"),
    (
        r"mlp\.experts\.(linear_fc\d)\.weight(\d+)$",
        r"mlp.experts.local_experts.\2.\1.weight",
    ),
)


def plain_name(name: str) -> str:
    """The name that a parameter of Transformer Engine's layers has in plain ones."""
    for theirs, ours in _TRANSFORMER_ENGINE:
        name = re.sub(theirs, ours, name)
    return name


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter, with the layer (and expert) it belongs to filled in."""

    kind: str
    hf_names: tuple[str, ...]
    expert: bool  # split over the experts' tensor-parallel ranks, another on each expert rank


class NameMap:
    """The map of one architecture. Names are global: layers counted over all pipeline stages.
    `values`: of a critic, with a value layer.
    """

    def __init__(self, architecture: Architecture, values: bool = False):
        shape = architecture.transformer
        self.tied = architecture.tied and not values
        self.vocab_size = architecture.vocab_size
        self.heads, self.groups = shape["num_attention_heads"], shape["num_query_groups"]
        self.head_dim = shape["kv_channels"]
        self.experts = shape.get("num_moe_experts") or 0
        self._patterns = [
            (re.compile(_pattern(name)), kind, hf)
            for name, (kind, *hf) in (
                FAMILIES[architecture.family] | (VALUE_LAYER if values else {})
            ).items()
        ]

    def entry(self, name: str) -> Entry:
        name = plain_name(name)
        for pattern, kind, hf in self._patterns:
            match = pattern.fullmatch(name)
            if match:
                found = match.groupdict()
                return Entry(kind, tuple(h.format(**found) for h in hf), "expert" in found)
        raise KeyError(f"no Hugging Face name for the Megatron parameter '{name}'")

    def tied_copy(self, name: str) -> bool:
        """Whether the parameter repeats the embedding (the last pipeline stage of a tied model)."""
        return self.tied and name == "output_layer.weight"

    def sources(self, name: str) -> Entry:
        """The entry to load from: a tied output layer is the embedding."""
        return self.entry("embedding.word_embeddings.weight" if self.tied_copy(name) else name)

    def to_hf(self, name: str, full: Tensor) -> list[tuple[str, Tensor]]:
        """The HF tensors that the whole (unsplit) Megatron tensor holds."""
        if self.tied_copy(name):
            return []
        entry = self.entry(name)
        if entry.kind == "vocab":
            parts = [full[: self.vocab_size]]
        elif entry.kind == "gate_up":
            parts = list(full.chunk(2))
        elif entry.kind == "qkv":
            parts = self._split_qkv(full)
        else:
            parts = [full]
        return list(zip(entry.hf_names, parts, strict=True))

    def join(self, name: str, shards: list[Tensor]) -> Tensor:
        """The whole Megatron tensor from every tensor-parallel rank's part."""
        kind = self.sources(name).kind
        if kind == "whole" or len(shards) == 1:
            return shards[0]
        if kind in ("gate_up", "fused"):
            halves = [shard.chunk(2) for shard in shards]
            return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
        return torch.cat(shards, dim=1 if kind == "columns" else 0)

    def shard(
        self, name: str, slices: Callable[[str], Any], shape: torch.Size, rank: int, size: int
    ) -> Tensor:
        """Tensor-parallel rank `rank`'s part, of `shape`; `slices(name)` is indexed lazily."""
        entry = self.sources(name)
        sources = [slices(hf) for hf in entry.hf_names]
        if entry.kind == "whole":
            return sources[0][:]
        if entry.kind == "columns":
            return sources[0][:, shape[1] * rank : shape[1] * (rank + 1)]
        if entry.kind == "qkv":
            return self._shard_qkv(sources, rank, size)
        if entry.kind == "fused":
            half, rows = _rows(sources[0]) // 2, shape[0] // 2
            starts = (rows * rank, half + rows * rank)
            return torch.cat([sources[0][start : start + rows] for start in starts])
        rows = shape[0] // len(sources)
        part = torch.cat([s[rows * rank : rows * (rank + 1)] for s in sources])
        if entry.kind == "vocab" and len(part) < rows:
            part = torch.cat([part, part.new_zeros(rows - len(part), *part.shape[1:])])
        return part

    def _shard_qkv(self, sources: list[Any], rank: int, size: int) -> Tensor:
        if self.groups % size:  # fewer groups than ranks: a rank holds a piece of one
            return self._interleave([s[:] for s in sources], self.groups).chunk(size)[rank]
        mine = self.groups // size
        per_group = (self.heads // self.groups * self.head_dim, self.head_dim, self.head_dim)
        parts = [
            s[rows * mine * rank : rows * mine * (rank + 1)]
            for s, rows in zip(sources, per_group, strict=True)
        ]
        return self._interleave(parts, mine)

    def _interleave(self, qkv: list[Tensor], groups: int) -> Tensor:
        rest = qkv[0].shape[1:]
        return torch.cat([x.reshape(groups, -1, *rest) for x in qkv], dim=1).flatten(0, 1)

    def _split_qkv(self, full: Tensor) -> list[Tensor]:
        rows = [self.heads // self.groups * self.head_dim, self.head_dim, self.head_dim]
        grouped = full.view(self.groups, sum(rows), *full.shape[1:])
        return [part.flatten(0, 1) for part in grouped.split(rows, dim=1)]


def _rows(source: Any) -> int:
    """Rows of a tensor, or of a lazy slice of a file."""
    return (source.shape if isinstance(source, Tensor) else source.get_shape())[0]


def _pattern(name: str) -> str:
    escaped = re.escape(name).replace(r"\{layer\}", r"(?P<layer>\d+)")
    return escaped.replace(r"\{expert\}", r"(?P<expert>\d+)")


def global_name(name: str, layer_offset: int, expert_offset: int = 0) -> str:
    """A parameter's plain name with its layer counted over all pipeline stages, and its expert over
    all expert ranks.
    """

    def shifted(offset: int) -> Callable[[re.Match[str]], str]:
        return lambda match: f"{match[1]}{int(match[2]) + offset}."

    name = re.sub(r"^(decoder\.layers\.)(\d+)\.", shifted(layer_offset), plain_name(name))
    return re.sub(r"(\.local_experts\.)(\d+)\.", shifted(expert_offset), name)
