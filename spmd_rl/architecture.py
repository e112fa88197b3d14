"""A Hugging Face `config.json` read as an architecture: what Megatron must build to hold those
weights.

Pure: a dictionary in, values out; imports torch only for the rotary frequencies. A family is an
entry of `FAMILIES`; `megatron:` keys that contradict the checkpoint are reported as sentences.
"""

from __future__ import annotations

import json
import math
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
    """What the checkpoint fixes. `transformer` are fields of Megatron's TransformerConfig."""

    family: str
    vocab_size: int
    max_positions: int
    tied: bool
    rope: Rope
    transformer: dict[str, Any]
    hf: dict[str, Any]


@dataclass(frozen=True)
class Family:
    """How a `model_type` differs from the Llama layout."""

    qkv_bias: bool = False
    qk_norm: bool = False


FAMILIES = {
    "llama": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
}


def read(checkpoint: str | Path) -> Architecture:
    """The architecture of an HF checkpoint directory."""
    path = Path(checkpoint) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"model.hf_checkpoint: {path} does not exist; give a Hugging Face directory"
        )
    return parse(json.loads(path.read_text()))


def parse(hf: dict[str, Any]) -> Architecture:
    name = hf.get("model_type", "")
    if name not in FAMILIES:
        raise ValueError(
            f"model.hf_checkpoint: model_type '{name}' is not supported; "
            f"supported are {', '.join(sorted(FAMILIES))}"
        )
    _refuse_unsupported(hf)
    family = FAMILIES[name]
    heads = hf["num_attention_heads"]
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
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
        add_qkv_bias=family.qkv_bias or bool(hf.get("attention_bias")),
        qk_layernorm=family.qk_norm,
    )
    return Architecture(
        family=name,
        vocab_size=hf["vocab_size"],
        max_positions=hf.get("max_position_embeddings", 2048),
        tied=bool(hf.get("tie_word_embeddings", False)),
        rope=_rope(hf, head_dim),
        transformer=transformer,
        hf=hf,
    )


def _rope(hf: dict[str, Any], head_dim: int) -> Rope:
    """transformers 4: rope_theta and rope_scaling; transformers 5: both in rope_parameters."""
    scaling = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = scaling.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0
    kind = scaling.get("rope_type") or scaling.pop("type", None) or "default"
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(
            f"model.hf_checkpoint: rope scaling '{kind}' is not supported; "
            "supported are default, linear and llama3"
        )
    fraction = scaling.pop("partial_rotary_factor", None) or hf.get("partial_rotary_factor", 1.0)
    return Rope(float(theta), int(head_dim * fraction), scaling=scaling | {"rope_type": kind})


def _refuse_unsupported(hf: dict[str, Any]) -> None:
    faults = {
        "hidden_act other than silu": hf.get("hidden_act", "silu") != "silu",
        "sliding-window attention (use_sliding_window)": bool(hf.get("use_sliding_window")),
        "biases in the MLP (mlp_bias)": bool(hf.get("mlp_bias")),
        # Llama's and Qwen3's attention_bias also puts one on the output projection
        "attention_bias": bool(hf.get("attention_bias")) and hf["model_type"] != "qwen2",
    }
    for what, present in faults.items():
        if present:
            raise ValueError(f"model.hf_checkpoint: {what} is not supported")


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
