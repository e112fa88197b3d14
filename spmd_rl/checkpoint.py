"""Checkpoints: what a run needs to go on, written aside and renamed: none is ever half there.

`<save>/rollout_000012/` holds `model/` (megatron's torch_dist, written by all training ranks) and
`state.json` (position of the data, weight version; written last). The newest complete one is found
by looking, not by a tracker file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from spmd_rl.config import Config
from spmd_rl.control import Workers

NAME = re.compile(r"rollout_(\d{6,})")


@dataclass(frozen=True, slots=True)
class State:
    """Where a run stands, besides its weights."""

    num_rollout: int  # rollouts of the whole run
    rollout: int = 0  # the next one to do
    version: int = 0  # weight pushes so far
    data: dict[str, Any] = field(default_factory=dict)  # the collector's own: position, buffer

    def after(self, data: dict[str, Any]) -> State:
        """The state once this rollout's training is done; its push makes the next version."""
        return replace(self, rollout=self.rollout + 1, version=self.version + 1, data=data)


def directory(cfg: Config, run_dir: Path) -> Path:
    return Path(cfg.checkpoint.save) if cfg.checkpoint.save else run_dir / "checkpoints"


def save(cfg: Config, workers: Workers, state: State, run_dir: Path) -> Path:
    """Write one checkpoint, seen complete or not at all; remove those beyond `keep_last`."""
    root = directory(cfg, run_dir)
    final = root / f"rollout_{state.rollout:06d}"
    aside = root / f".{final.name}.part"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    workers.save(str(aside / "model"))
    _write_synced(aside / "state.json", json.dumps(asdict(state)))
    _sync_directory(aside)
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    _sync_directory(root)
    if cfg.checkpoint.keep_last:
        for old in list(complete(root))[: -cfg.checkpoint.keep_last]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def complete(root: Path) -> Iterator[Path]:
    """Complete checkpoints below `root`, oldest first."""
    if root.is_dir():
        for path in sorted(root.iterdir()):
            if NAME.fullmatch(path.name) and (path / "state.json").is_file():
                yield path


def newest(cfg: Config, run_dir: Path) -> tuple[Path, State] | None:
    """The newest complete checkpoint of `load` (else of `save`), or None."""
    root = Path(cfg.checkpoint.load) if cfg.checkpoint.load else directory(cfg, run_dir)
    if (root / "state.json").is_file():
        found = [root]
    else:
        found = list(complete(root))
    if not found:
        return None
    state = State(**json.loads((found[-1] / "state.json").read_text()))
    return found[-1], state


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
