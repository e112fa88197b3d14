"""Where a run begins: after its own newest checkpoint, from `checkpoint.load`, or anew.

Comes in: the configuration and the run's folder; goes out: a Start, or a sentence on why not.
Looks only: nothing is loaded, nothing is changed. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from spmd_rl.checkpoint import Damaged, State, directory, read
from spmd_rl.config import Config
from spmd_rl.config.stored import complete, number, of_megatron
from spmd_rl.control import Explained
from spmd_rl.fingerprint import differences, fingerprint, model

SHOWN = 60  # letters of a value in a sentence


class Start(NamedTuple):
    """What the trainer takes, and where the loop goes on."""

    origin: str  # where the run was told to begin; a restart looks for checkpoints that say it
    state: State | None = None  # None: at the beginning
    model: str | None = None  # directory of Megatron's torch_dist
    optimizer: bool = True  # of `model`, besides its weights
    random: bool = True
    weights: str | None = None  # Hugging Face directory of first weights
    notes: tuple[str, ...] = ()  # what the user should know


def find(cfg: Config, run_dir: Path) -> Start:
    """Raises Explained where the configuration cannot mean what is there."""
    wanted = cfg.checkpoint
    own, origin, notes = directory(cfg, run_dir), _origin(cfg, run_dir), []
    for path, about in _whole(complete(own), notes):
        if not origin or about["origin"] == origin:
            _judge(cfg, path, about)
            kept, notes = _has_optimizer(cfg, path), _used(notes, path)
            return Start(origin, about["state"], str(path / "model"), kept, notes=notes)
    if not origin:
        return Start(origin, notes=tuple(notes))
    start = _load(cfg, Path(wanted.load) if wanted.load else own)
    return start._replace(origin=origin, notes=(*notes, *start.notes))


def _origin(cfg: Config, run_dir: Path) -> str:
    """Empty when the run begins with nothing or with what it saved itself."""
    wanted = cfg.checkpoint
    root = directory(cfg, run_dir)
    load = Path(wanted.load) if wanted.load else root
    if load.resolve() == root.resolve() and wanted.ckpt_step is None and not wanted.finetune:
        return ""
    parts = [str(load.resolve())]
    parts += [f"ckpt_step={wanted.ckpt_step}"] if wanted.ckpt_step is not None else []
    return " ".join(parts + ["finetune"] * wanted.finetune)


def _load(cfg: Config, root: Path) -> Start:
    """From `checkpoint.load`, for the first time."""
    wanted = cfg.checkpoint
    if (root / "config.json").is_file():
        _same_model(root, model(_first(cfg)), model(str(root)))
        return Start("", weights=str(root), notes=(f"first weights: {root}",))
    if path := of_megatron(root, wanted.ckpt_step):
        _check_megatrons(path)
        note = f"Megatron's checkpoint {path}: its weights are taken, and nothing else"
        return Start("", model=str(path), optimizer=False, random=False, notes=(note,))
    notes: list[str] = []
    found, about = next(_whole(_named(root, wanted.ckpt_step), notes), (None, {}))
    if found is None:
        what = f"checkpoint.load: {root} holds no checkpoint"
        if wanted.exit_on_missing_checkpoint:
            raise Explained(". ".join([*notes, f"{what}: name another directory"]))
        return Start("", notes=(*notes, f"{what}: the run begins with {_first(cfg)}"))
    _judge(cfg, found, about)
    path, told = str(found / "model"), _used(notes, found)
    if wanted.finetune:
        return Start("", None, path, optimizer=False, random=False, notes=told)
    state: State = about["state"]
    first = cfg.rollout.start_rollout_id
    if first is not None:
        state = State(state.num_rollout, first, state.version, state.data)
    kept = not wanted.no_load_optim and _has_optimizer(cfg, found)
    return Start("", state, path, kept, not wanted.no_load_rng, notes=told)


def _named(root: Path, step: int | None) -> list[Path]:
    """The checkpoints that `root` names: itself, all below it, or the one after `step` rollouts."""
    if (root / "state.json").is_file():
        return [root]
    found = complete(root)
    wanted = [path for path in found if step is None or number(path) == step]
    if step is not None and not wanted:
        there = ", ".join(str(number(path)) for path in found) or "none"
        raise Explained(
            f"checkpoint.ckpt_step: {root} has no checkpoint after {step} rollouts; "
            f"there are: {there}"
        )
    return wanted


def _whole(paths: list[Path], notes: list[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Those that nothing is wrong with and what they say, newest first; the others are noted."""
    for path in reversed(paths):
        try:
            about = read(path)
        except Damaged as fault:
            notes.append(str(fault))
        else:
            yield path, about


def _has_optimizer(cfg: Config, path: Path) -> bool:
    """Whether it holds an optimizer's state; one that was saved without must be meant."""
    about = json.loads((path / "model" / "trainer.json").read_text())
    if not about["optimizer"] and not (
        cfg.checkpoint.no_save_optim or cfg.checkpoint.no_load_optim
    ):
        raise Explained(
            f"checkpoint {path} holds no optimizer state: set checkpoint.no_load_optim=true to "
            "start a new optimizer from its weights"
        )
    return about["optimizer"]


def _used(notes: list[str], path: Path) -> tuple[str, ...]:
    return (*notes, f"{path} is used instead") if notes else ()


def _check_megatrons(path: Path) -> None:
    if not (path / "metadata.json").is_file():
        raise Explained(
            f"checkpoint.load: {path} is no torch_dist checkpoint: convert it, or name a Hugging "
            "Face directory"
        )


def _first(cfg: Config) -> str:
    return cfg.model.ref_load or cfg.model.hf_checkpoint


def _judge(cfg: Config, path: Path, about: dict[str, Any]) -> None:
    """Refuse another model's checkpoint, and another configuration's that was not allowed."""
    now, then = fingerprint(cfg), about["configuration"]
    _same_model(path, now["model"], then["model"])
    if cfg.checkpoint.finetune:
        return
    allowed = set(cfg.checkpoint.allow_changed_keys)
    changed = [
        (name, f"{name} {_shown(a)} -> {_shown(b)}")
        for name, a, b in differences(now["keys"], then["keys"])
        if name not in allowed
    ]
    changed += [
        (name, f"the content of {name} is another")
        for name, a, b in differences(now["content"], then["content"])
        if name not in allowed and a is not None and b is not None
    ]
    if changed:
        names = ", ".join(name for name, _ in changed)
        raise Explained(
            f"checkpoint {path} is of a run with another configuration: "
            f"{'; '.join(text for _, text in changed)}. Change it back, allow it by "
            f"checkpoint.allow_changed_keys=[{names}], or give the run another logging.name"
        )


def _same_model(path: Path, now: dict[str, Any], then: dict[str, Any]) -> None:
    changed = [f"{name} {a} -> {b}" for name, a, b in differences(now, then)]
    if changed:
        raise Explained(
            f"checkpoint {path} holds another model than model.hf_checkpoint: "
            f"{'; '.join(changed)}: name the model that it was made with"
        )


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
