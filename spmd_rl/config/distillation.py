"""Checks of on-policy distillation: its keys, and whether the teacher reads the same tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from spmd_rl.config import model_files, stored
from spmd_rl.config.errors import Fault
from spmd_rl.config.schema import Config


def check(cfg: Config) -> Iterator[Fault]:
    algo = cfg.algo
    if not algo.use_opd:
        for key in ("opd_teacher_load", "opd_teacher_ckpt_step"):
            if getattr(algo, key) is not None:
                yield Fault(
                    (f"algo.{key}", "algo.use_opd"),
                    f"algo.{key} has no effect: set algo.use_opd: true",
                )
        return
    if algo.opd_type == "sglang":
        yield from _served(cfg)
    elif algo.opd_type is None or algo.opd_teacher_load is None:
        yield Fault(
            ("algo.use_opd", "algo.opd_type", "algo.opd_teacher_load"),
            "algo.use_opd needs a teacher: set algo.opd_type: megatron, and algo.opd_teacher_load "
            "to its Hugging Face directory; or algo.opd_type: sglang, and that or reward.rm_url",
        )
    if algo.loss_type != "policy_loss":
        yield Fault(
            ("algo.use_opd", "algo.loss_type"),
            f"algo.use_opd has no effect with algo.loss_type {algo.loss_type}: leave one out",
        )


def _served(cfg: Config) -> Iterator[Fault]:
    """A teacher behind HTTP."""
    algo, reward = cfg.algo, cfg.reward
    if algo.opd_teacher_load is None and reward.rm_url is None:
        yield Fault(
            ("algo.opd_type", "reward.rm_url", "algo.opd_teacher_load"),
            "algo.opd_type sglang needs a teacher: give the address of its server as "
            "reward.rm_url, or its Hugging Face directory as algo.opd_teacher_load",
        )
    elif algo.opd_teacher_load is None and reward.rm_type == "remote_rm":
        yield Fault(
            ("reward.rm_url", "reward.rm_type", "algo.opd_type"),
            "reward.rm_url cannot be both the judge of reward.rm_type remote_rm and the teacher "
            "of algo.opd_type sglang: let the job serve algo.opd_teacher_load, or judge by "
            "reward.custom_rm_path",
        )
    if cfg.rollout.rollout_temperature != 1:
        yield Fault(
            ("rollout.rollout_temperature", "algo.opd_type"),
            "algo.opd_type sglang needs rollout.rollout_temperature 1, not "
            f"{cfg.rollout.rollout_temperature}: SGLang tells the log-probs of a prompt without "
            "temperature. Set it to 1, or algo.opd_type: megatron",
        )


def check_files(cfg: Config) -> Iterator[Fault]:
    """Whether algo.opd_teacher_load is a model of the same words."""
    key, path = "algo.opd_teacher_load", cfg.algo.opd_teacher_load
    if not cfg.algo.use_opd or path is None:
        return
    step = cfg.algo.opd_teacher_ckpt_step
    if cfg.algo.opd_type == "megatron" and stored.weights(path, step) is not None:
        return  # of the policy's shape: the trainer will see
    if step is not None:
        yield Fault(
            ("algo.opd_teacher_ckpt_step", key),
            f"algo.opd_teacher_ckpt_step {step}: {key} {path} holds no such torch_dist checkpoint "
            "for algo.opd_type megatron: name another step, or leave it out",
        )
        return
    if cfg.algo.opd_type == "sglang":
        found = yield from model_files.read(key, path)
    else:
        found = yield from model_files.trainable(key, path, "a teacher in the trainer")
    ours, theirs = _vocabulary(Path(cfg.model.hf_checkpoint)), _vocabulary(Path(path))
    if found is not None and ours is not None and theirs is not None and ours != theirs:
        yield Fault(
            (key, "model.hf_checkpoint"),
            f"{key} {path} has another vocabulary than model.hf_checkpoint: choose a teacher with "
            "the same tokenizer",
        )


def _vocabulary(folder: Path) -> object:
    """None where no tokenizer.json says."""
    try:
        return json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
