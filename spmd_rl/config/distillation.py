"""Checks of on-policy distillation: its keys, and whether the teacher reads the same tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from spmd_rl.config.errors import Fault
from spmd_rl.config.schema import Config


def check(cfg: Config) -> Iterator[Fault]:
    algo = cfg.algo
    if not algo.use_opd:
        if algo.opd_teacher_load is not None:
            yield Fault(
                ("algo.opd_teacher_load", "algo.use_opd"),
                "algo.opd_teacher_load has no effect: set algo.use_opd: true",
            )
        return
    if algo.opd_type is None or algo.opd_teacher_load is None:
        yield Fault(
            ("algo.use_opd", "algo.opd_type", "algo.opd_teacher_load"),
            "algo.use_opd needs a teacher: set algo.opd_type: megatron, and algo.opd_teacher_load "
            "to its Hugging Face directory",
        )
    if algo.loss_type != "policy_loss":
        yield Fault(
            ("algo.use_opd", "algo.loss_type"),
            f"algo.use_opd has no effect with algo.loss_type {algo.loss_type}: leave one out",
        )


def check_tokens(cfg: Config, teacher: Path) -> Iterator[Fault]:
    """A teacher with another tokenizer would judge other words."""
    ours, theirs = _vocabulary(Path(cfg.model.hf_checkpoint)), _vocabulary(teacher)
    if ours is not None and theirs is not None and ours != theirs:
        yield Fault(
            ("algo.opd_teacher_load", "model.hf_checkpoint"),
            f"algo.opd_teacher_load {teacher} has another vocabulary than model.hf_checkpoint: "
            "choose a teacher with the same tokenizer",
        )


def _vocabulary(folder: Path) -> object:
    """None where no tokenizer.json says."""
    try:
        return json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
