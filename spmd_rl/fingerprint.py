"""What makes a run the run it is: its model, the keys that change its meaning, its data's content.

A checkpoint remembers it, and a run that goes on from one must agree. What a user may change on
the way (length, placement, logging, engines, how work is cut into micro-batches) is left out.
Imports no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from spmd_rl import architecture
from spmd_rl.config import Config
from spmd_rl.config.schema import SECTIONS as SCHEMA
from spmd_rl.data.paths import split_slice

SECTIONS = ("data", "rollout", "reward", "algo", "train")  # of them all keys count, but
FREE = {
    "data.prompt_data",  # its content counts
    "data.on_bad_line",
    "rollout.num_rollout",
    "rollout.num_epoch",
    "rollout.start_rollout_id",
    "rollout.sglang_server_concurrency",
    "rollout.group_requests",
    "rollout.custom_rollout_log_function_path",
    "rollout.rollout_request_timeout",
    "reward.rm_url",
    "reward.reward_timeout",
    "reward.reward_num_workers",
    "train.micro_batch_size",
    "train.use_dynamic_batch_size",
    "train.max_tokens_per_gpu",
    "train.log_probs_max_tokens_per_gpu",
    "train.log_probs_chunk_size",
    "train.balance_data",
}
MEGATRON = (  # of its options, those that change what is learned
    "optimizer", "min_lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum",
    "bf16", "fp16", "params_dtype", "hidden_dropout", "attention_dropout", "lr_wsd_decay_iters",
    "lr_wsd_decay_style", "moe_aux_loss_coeff", "moe_router_load_balancing_type",
)  # fmt: skip
ENDS = 1 << 20  # bytes at either end of a file that stand for it, besides its size


def fingerprint(cfg: Config) -> dict[str, dict[str, Any]]:
    """Plain values: `model`, `keys` and `content` of files, each by name."""
    start = cfg.model.ref_load or cfg.model.hf_checkpoint
    return {
        "model": model(start),
        "keys": dict(_keys(cfg)),
        "content": dict(_contents(cfg, Path(start))),
    }


def model(directory: str) -> dict[str, Any]:
    """The architecture of a Hugging Face directory."""
    found = architecture.read(directory)
    rope = dataclasses.asdict(found.rope)
    return found.transformer | {
        "family": found.family,
        "vocab_size": found.vocab_size,
        "tied": found.tied,
        "rope_theta": rope["theta"],
        "rope_scaling": rope["scaling"],
    }


def differences(now: dict[str, Any], then: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(name, then, now) of what differs. A key that one of the two does not know counts as its
    default there, so that a new version of the program goes on with an older one's run.
    """
    for name in sorted(now.keys() | then.keys()):
        default = _default(name)
        a, b = then.get(name, default), now.get(name, default)
        if a != b:
            yield name, a, b


def _default(name: str) -> Any:
    section, _, key = name.partition(".")
    fields = SCHEMA[section].model_fields if section in SCHEMA else {}
    return fields[key].get_default(call_default_factory=True) if key in fields else None


def _keys(cfg: Config) -> Iterator[tuple[str, Any]]:
    for section in SECTIONS:
        for key, value in getattr(cfg, section).model_dump(mode="json").items():
            if f"{section}.{key}" not in FREE:
                yield f"{section}.{key}", value
    for key in MEGATRON:
        if key in cfg.megatron:
            yield f"megatron.{key}", cfg.megatron[key]


def _contents(cfg: Config, start: Path) -> Iterator[tuple[str, str]]:
    if cfg.data.prompt_data:
        path, part = split_slice(cfg.data.prompt_data)
        yield "data.prompt_data", _digest([Path(path)], str(part))
    if cfg.algo.use_kl_loss or cfg.algo.kl_coef:  # the reference model
        key = "model.ref_load" if cfg.model.ref_load else "model.hf_checkpoint"
        yield key, _digest(sorted(start.glob("*.safetensors")), "")


def _digest(paths: Iterable[Path], more: str) -> str:
    """Of sizes and ends: data sets of many gigabytes are not read for it."""
    seen = hashlib.blake2b(more.encode(), digest_size=16)
    for path in paths:
        size = path.stat().st_size
        with open(path, "rb") as file:
            seen.update(f"{size}:".encode() + file.read(ENDS))
            file.seek(max(size - ENDS, 0))
            seen.update(file.read(ENDS))
    return seen.hexdigest()
