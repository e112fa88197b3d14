"""Tiny models of every family with awkward sizes, and the layouts they are split over.

Odd layer counts, a vocabulary that no parallel size divides, heads that just divide, tied and
untied embeddings. Where stages must be equally long (VPP, PP4) a fourth layer is added.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.make_tiny_model import make_tiny_model

MOE = dict(experts=6, tied=False)
# name -> options of make_tiny_model; `like`: the family, where the name is a model's
MODELS: dict[str, dict[str, Any]] = {
    "llama": dict(kv_heads=4, layers=5, tied=False, rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=64)),
    "qwen2.5": dict(like="qwen2", hidden=96, heads=6, tied=True),
    "qwen3": dict(head_dim=24, tied=True),
    "qwen3_moe": MOE,
    "glm4": dict(kv_heads=1, tied=False),
    "glm4_moe": MOE,
    # seeds: with these, bf16 rounds no token to other experts in transformers
    "deepseek_v3": dict(tied=False, seed=1),
    "moonlight": MOE | dict(like="deepseek_v3", seed=10, q_lora_rank=None, n_group=1, topk_group=1,
                            rope_scaling=None),
}  # fmt: skip
COMMON: dict[str, Any] = dict(hidden=64, layers=3, vocab=275, ffn=172, positions=1024, perturb=0.1)


@dataclass(frozen=True)
class Layout:
    """Parallel sizes over `world` ranks, and further `megatron:` keys."""

    world: int
    sizes: dict[str, int] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)
    even: bool = False  # stages must be equally long

    def megatron(self, layers: int) -> dict[str, Any]:
        """The `megatron:` section but for the sizes."""
        found = {"use_distributed_optimizer": False, "expert_tensor_parallel_size": 1} | self.keys
        if "pp" in self.sizes and layers % self.sizes["pp"]:
            found["num_layers_in_first_pipeline_stage"] = -(-layers // self.sizes["pp"])
        return found

    def whole(self, layers: int) -> dict[str, Any]:
        """The `megatron:` section as a user writes it."""
        return self.megatron(layers) | {NAMES[short]: size for short, size in self.sizes.items()}


NAMES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
}
SP = {"sequence_parallel": True}
VPP = {"virtual_pipeline_model_parallel_size": 2}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LAYOUTS: dict[str, Layout] = {
    "one": Layout(1),
    "recompute": Layout(1, keys=FULL),
    "dp2": Layout(2),
    "tp2": Layout(2, {"tp": 2}),
    "tp2_sp": Layout(2, {"tp": 2}, SP),
    "pp2": Layout(2, {"pp": 2}),
    "pp2_vpp2": Layout(2, {"pp": 2}, VPP, even=True),
    "cp2": Layout(2, {"cp": 2}),
    "ep2": Layout(2, {"ep": 2}),
    "tp2_dp2": Layout(4, {"tp": 2}),
    "tp2_pp2": Layout(4, {"tp": 2, "pp": 2}),
    "tp2_cp2_sp": Layout(4, {"tp": 2, "cp": 2}, SP),
    "tp4_sp": Layout(4, {"tp": 4}, SP),
    "pp2_cp2": Layout(4, {"pp": 2, "cp": 2}),
    "pp4": Layout(4, {"pp": 4}, even=True),
    "tp2_pp2_vpp2": Layout(4, {"tp": 2, "pp": 2}, VPP | SP, even=True),
    "cp4": Layout(4, {"cp": 4}),
    "ep2_pp2": Layout(4, {"ep": 2, "pp": 2}),
    "ep2_tp2": Layout(4, {"ep": 2, "tp": 2}),
    "ep2_cp2": Layout(4, {"ep": 2, "cp": 2}),
    "ep2_tp2_cp2": Layout(4, {"ep": 2, "tp": 2, "cp": 2}),
}


def variant(model: str, layout: Layout) -> str:
    """The name of the model's form that suits the layout."""
    return f"{model}-even" if layout.even else model


def layers_of(name: str) -> int:
    """Layers of a model or of its even form."""
    options = COMMON | MODELS[name.removesuffix("-even")]
    return 4 if name.endswith("-even") else options["layers"]


def make(folder: Path, name: str, dtype: str = "float32", **changed: Any) -> Path:
    """The directory of a model, made where it is not there yet."""
    path = folder / f"{name}-{dtype}"
    if not (path / "config.json").is_file():
        base = name.removesuffix("-even")
        options = COMMON | MODELS[base] | {"layers": layers_of(name), "dtype": dtype} | changed
        make_tiny_model(path, options.pop("like", base), **options)
    return path
