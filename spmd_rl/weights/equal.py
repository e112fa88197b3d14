"""The proof of a push: every engine tensor has the bits the trainer's tensors call for.

Comes in: the trainer's Hugging Face tensors and the engines' own checksums. The tensors are laid
out as SGLang lays them out (q, k, v and gate, up fused; split over tensor-parallel ranks;
vocabulary padded; a layer's experts in two) and hashed the same way, so nothing of the path from
the trainer to the engine is taken on trust. Llama, Qwen2, Qwen3, Qwen3-MoE, GLM-4, GLM-4.5.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from spmd_rl.architecture import EXPERT_COUNTS
from spmd_rl.config import Config
from spmd_rl.rollout import engine_args
from spmd_rl.rollout.admin import EngineAdmin, EngineError
from spmd_rl.types import EngineSpec
from spmd_rl.weights.bucket import NamedTensor

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "glm4", "glm4_moe")
FLOAT32_ROUTER = ("glm4_moe",)  # whose routers are fp32 in the engine, whatever its dtype
EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
FUSED = {
    "q_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "k_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "v_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "gate_proj": ("gate_up_proj", ("gate_proj", "up_proj")),
    "up_proj": ("gate_up_proj", ("gate_proj", "up_proj")),
}
VOCABULARY_MULTIPLE = 64  # SGLang pads embeddings to it
CPU_FFN_MULTIPLE = 32  # and on a CPU each rank's share of the MLP to this

Shards = list[torch.Tensor]  # one per tensor-parallel rank


class WeightsDiffer(RuntimeError):
    """An engine's tensors are not the trainer's; the text names them."""


class Layout:
    """SGLang's layout of one model over `tp` ranks; fed tensor by tensor, since they come as a
    stream.
    """

    def __init__(
        self,
        config: dict[str, Any],
        tp: int,
        ffn_multiple: int = 1,
        dtype: torch.dtype = torch.float32,
        ep: int = 1,
    ):
        self.tp, self.ffn_multiple, self.dtype, self.ep = tp, ffn_multiple * tp, dtype, ep
        self.float32_router = config.get("model_type") in FLOAT32_ROUTER
        self.experts = next((config[key] for key in EXPERT_COUNTS if config.get(key)), 0)
        self.kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        self.tied = bool(config.get("tie_word_embeddings", False))
        self._parts: dict[str, dict[str, Shards]] = {}
        self._experts: dict[str, dict[tuple[int, str], torch.Tensor]] = {}

    def feed(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, Shards]]:
        """The engine's tensors that `tensor` completes: none while parts of a fused one are
        missing.
        """
        if name == "lm_head.weight" and self.tied:
            return
        router = name.endswith((".mlp.gate.weight", ".e_score_correction_bias"))
        tensor = tensor.to(torch.float32 if router and self.float32_router else self.dtype)
        if found := EXPERT.fullmatch(name):
            yield from self._feed_expert(found[1], int(found[2]), found[3], tensor)
            return
        *path, module, kind = name.split(".")
        shards = self._shards(module, kind, tensor)
        if module not in FUSED:
            yield name, shards
            return
        fused, members = FUSED[module]
        whole = ".".join((*path, fused, kind))
        parts = self._parts.setdefault(whole, {})
        parts[module] = shards
        if len(parts) == len(members):
            del self._parts[whole]
            yield whole, [torch.cat([parts[m][r] for m in members]) for r in range(self.tp)]

    def _feed_expert(
        self, path: str, number: int, part: str, tensor: torch.Tensor
    ) -> Iterator[tuple[str, Shards]]:
        """All experts of a layer are one tensor of gates and ups, and one of downs."""
        whole, members = (
            (f"{path}.w2_weight", ("down",))
            if part == "down"
            else (f"{path}.w13_weight", ("gate", "up"))
        )
        parts = self._experts.setdefault(whole, {})
        parts[number, part] = tensor
        if len(parts) < len(members) * self.experts:
            return
        del self._experts[whole]
        each = self.experts // self.ep
        shards = []
        for rank in range(self.tp):
            mine = range(rank * each, (rank + 1) * each) if self.ep > 1 else range(self.experts)
            rows = (
                torch.cat([self._share(parts[i, m], int(m == "down"), rank) for m in members])
                for i in mine
            )
            shards.append(torch.stack(list(rows)))
        yield whole, shards

    def _share(self, tensor: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
        """A rank's part of an expert's projection; whole experts are spread over expert ranks."""
        return tensor if self.ep > 1 else tensor.chunk(self.tp, dim)[rank]

    def _shards(self, module: str, kind: str, tensor: torch.Tensor) -> Shards:
        if module in ("embed_tokens", "lm_head"):
            multiple = VOCABULARY_MULTIPLE
            if -(-len(tensor) // multiple) * multiple % self.tp:
                multiple *= self.tp
            missing = -len(tensor) % multiple
            return list(pad(tensor, (0, 0, 0, missing)).chunk(self.tp))
        if module in ("k_proj", "v_proj") and self.kv_heads < self.tp:
            heads = tensor.chunk(self.kv_heads)
            return [heads[rank * self.kv_heads // self.tp] for rank in range(self.tp)]
        if module == "gate_up_proj":  # one tensor in the file, too
            halves = [self._shards("gate_proj", kind, half) for half in tensor.chunk(2)]
            return [torch.cat(pair) for pair in zip(*halves, strict=True)]
        if module in ("gate_proj", "up_proj"):
            tensor = pad(tensor, (0, 0, 0, -len(tensor) % self.ffn_multiple))
        if module == "down_proj":
            tensor = pad(tensor, (0, -tensor.size(1) % self.ffn_multiple))
        if module in FUSED:
            return list(tensor.chunk(self.tp))
        if module in ("o_proj", "down_proj") and kind == "weight":
            return list(tensor.chunk(self.tp, dim=1))
        return [tensor] * self.tp


def check_engines(
    cfg: Config,
    specs: Iterable[EngineSpec],
    admins: list[EngineAdmin],
    tensors: Iterable[NamedTensor],
) -> dict[int, EngineError]:
    """Raise WeightsDiffer unless all engines hold exactly `tensors`. Returns what went wrong with
    those that could not be asked.
    """
    config = json.loads((Path(engine_args.model_path(cfg)) / "config.json").read_text())
    if config["model_type"] not in FAMILIES:
        raise ValueError(
            f"debug.check_weight_update_equal does not know the layout of {config['model_type']} "
            f"models (it knows {', '.join(FAMILIES)}); set it to false"
        )
    specs = list(specs)
    on_cpu, ep = engine_args.device_of(cfg) == "cpu", cfg.sglang.get("ep_size") or 1
    if ep not in (1, cfg.placement.rollout_num_gpus_per_engine):
        raise ValueError(
            f"debug.check_weight_update_equal does not know the layout of sglang.ep_size {ep}; set "
            "it to 1, or to placement.rollout_num_gpus_per_engine"
        )
    if config.get("n_shared_experts") and not (
        on_cpu or cfg.sglang.get("disable_shared_experts_fusion")
    ):
        raise ValueError(
            "debug.check_weight_update_equal does not know shared experts that SGLang fuses with "
            "the others: set sglang.disable_shared_experts_fusion: true, or the check to false"
        )
    ffn_multiple, dtype = CPU_FFN_MULTIPLE if on_cpu else 1, getattr(torch, engine_args.dtype(cfg))
    sizes = {len(spec.ranks) for spec in specs}
    expected = expected_checksums(
        tensors, {size: Layout(config, size, ffn_multiple, dtype, ep) for size in sizes}
    )
    failed: dict[int, EngineError] = {}
    for spec in specs:
        try:
            actual = admins[spec.index].checksums()
        except EngineError as error:
            failed[spec.index] = error
            continue
        for rank, (want, have) in enumerate(zip(expected[len(spec.ranks)], actual, strict=True)):
            if problem := difference(want, have):
                raise WeightsDiffer(
                    f"engine {spec.index}, tensor-parallel rank {rank}, after the push: {problem}"
                )
    return failed


def expected_checksums(
    tensors: Iterable[NamedTensor], layouts: dict[int, Layout]
) -> dict[int, list[dict[str, str]]]:
    """Per engine width and tensor-parallel rank: engine tensor name -> checksum."""
    found: dict[int, list[dict[str, str]]] = {tp: [{} for _ in range(tp)] for tp in layouts}
    for name, tensor in tensors:
        digest = _checksum(tensor.device)
        for tp, layout in layouts.items():
            for whole, shards in layout.feed(name, tensor.detach()):
                for rank, shard in enumerate(shards):
                    found[tp][rank][whole] = digest(shard.contiguous())
    return found


def difference(want: dict[str, str], have: dict[str, str]) -> str | None:
    """A sentence on what differs, None when nothing does."""
    problems = {
        "differ from the trainer's": [n for n in want if n in have and want[n] != have[n]],
        "are missing in the engine": [n for n in want if n not in have],
        "are unknown to the trainer": [n for n in have if n not in want],
    }
    said = [
        f"{len(names)} of {len(want)} tensors {what} ({', '.join(names[:3])}"
        + (", ...)" if len(names) > 3 else ")")
        for what, names in problems.items()
        if names
    ]
    return "; ".join(said) or None


def _checksum(device: torch.device) -> Callable[[torch.Tensor], str]:
    """The function SGLang's weights checker uses on that device."""
    if device.type == "cuda":
        from sglang.srt.managers.mm_utils import tensor_hash  # a Triton kernel of SGLang's own

        return lambda tensor: f"{tensor_hash(tensor):016x}"
    return sha256_checksum


def sha256_checksum(tensor: torch.Tensor) -> str:
    data = memoryview(tensor.flatten().view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
    return hashlib.sha256(data).hexdigest()[:16]
