"""Checks of the keys of ppo's critic, and of the model that they point at.

Comes in: a `Config`; goes out: faults. What belongs to every estimator is in check.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from spmd_rl import architecture
from spmd_rl.config import model_files
from spmd_rl.config.errors import Fault
from spmd_rl.config.schema import SECTIONS, Config

KEYS = (
    "model.critic_load",
    "algo.lambd",
    "algo.value_clip",
    "algo.num_critic_only_steps",
    "train.critic_lr",
    "train.critic_lr_warmup_iters",
)


def check(cfg: Config) -> Iterator[Fault]:
    if not cfg.use_critic:
        for name in KEYS:
            section, key = name.split(".")
            value = getattr(getattr(cfg, section), key)
            if value != SECTIONS[section].model_fields[key].get_default():
                yield Fault(
                    (name, "algo.advantage_estimator"),
                    f"{name} {value} has no effect without a critic: set "
                    "algo.advantage_estimator: ppo, or leave it out",
                )
    warmup, decay = cfg.train.critic_lr_warmup_iters, cfg.train.lr_decay_iters
    if cfg.train.lr_decay_style != "constant" and decay is not None and warmup >= decay:
        yield Fault(
            ("train.critic_lr_warmup_iters", "train.lr_decay_iters"),
            f"train.critic_lr_warmup_iters {warmup} does not end before train.lr_decay_iters "
            f"{decay}: lower it, or raise the latter",
        )


def check_files(cfg: Config) -> Iterator[Fault]:
    """Whether model.critic_load holds weights of the actor's architecture."""
    if not cfg.use_critic or cfg.model.critic_load is None:
        return
    key, folder = "model.critic_load", Path(cfg.model.critic_load)
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        yield Fault(
            (key,),
            f"{key} {folder} is no Hugging Face directory with config.json and .safetensors: give "
            "one, or leave it out to begin with the actor's weights",
        )
        return
    critic = yield from model_files.trainable(key, str(folder), "trained as a critic")
    try:
        actor = architecture.read_shape(cfg.model.hf_checkpoint)
    except (ValueError, KeyError):
        return  # said already
    if critic is not None and not architecture.same_shape(critic, actor, values=True):
        yield Fault(
            (key, "model.hf_checkpoint"),
            f"{key} {folder} has another architecture than model.hf_checkpoint "
            f"{cfg.model.hf_checkpoint}: give a model of the same family and size",
        )
