"""Checkpoints: what a run needs to go on, written aside and renamed: none is ever half there.

`<save>/rollout_000012/` is the run after 12 rollouts: `model/` (Megatron's torch_dist, written by
all training ranks) and `state.json` (position of the data, weight version, which configuration, and
every file's size; written last). It gets its name once the metrics of its last rollout are on disk
too, so a run that goes on from it neither loses a line nor writes one twice.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from spmd_rl import disk
from spmd_rl.config import Config
from spmd_rl.config.stored import complete, number
from spmd_rl.control import Explained, Workers
from spmd_rl.fingerprint import fingerprint
from spmd_rl.rollout.fleet import Engines
from spmd_rl.runlog import RunLog

STATE = "state.json"
FORMAT = 1
FULL = (errno.ENOSPC, errno.EDQUOT)
HASHED = 1 << 20  # bytes up to which a file's content is compared, not its size alone


class Damaged(ValueError):
    """A checkpoint that cannot be used, and why."""

    def __init__(self, path: Path, why: str):
        super().__init__(f"checkpoint {path} is damaged and left alone: {why}")


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

    def due(self, interval: int | None) -> bool:
        """Whether something with an interval happens now; after the last rollout it always does."""
        return bool(interval) and (self.rollout % interval == 0 or self.rollout == self.num_rollout)


def directory(cfg: Config, run_dir: Path) -> Path:
    return Path(cfg.checkpoint.save) if cfg.checkpoint.save else run_dir / "checkpoints"


class Checkpoints:
    """Writes a run's checkpoints. `origin`: where the run was told to begin, so that a restart
    knows its own; `state`: where it begins.
    """

    def __init__(self, cfg: Config, workers: Workers, log: RunLog, origin: str, state: State):
        self.cfg, self.workers, self.log, self.origin = cfg, workers, log, origin
        self.root = directory(cfg, log.run_dir)
        self.configuration = fingerprint(cfg)
        self.begun = state.rollout  # the newest there is, or will be
        self.pending: State | None = None  # begun, and without its name yet
        self.written = False  # all that is missing is the name
        for left in self.root.glob(".rollout_*.part"):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)

    def save(self, state: State) -> None:
        """Take a copy of everything; with `async_save` the disk is not waited for."""
        self.commit(wait=True)
        self.pending, self.written, self.begun = state, False, state.rollout
        try:
            (self._aside / "model").mkdir(parents=True)
        except OSError as error:
            raise self._failed(str(error)) from error
        self.workers.begin_save(str(self._aside / "model"))
        if not self.cfg.checkpoint.async_save:
            self._finish()

    def commit(self, wait: bool = False) -> None:
        """Let what is written count; the rollouts in it have been logged by now."""
        if self.pending is None:
            return
        if not (wait or self.written) and any(self.workers.saving()):
            return
        if not self.written:
            self._finish()
        state, aside, final = self.pending, self._aside, self._final
        self.log.sync()
        try:
            about = {
                "format": FORMAT,
                "state": asdict(state),
                "origin": self.origin,
                "configuration": self.configuration,
                "files": {str(p.relative_to(aside)): _seal(p) for p in _files(aside)},
            }
            disk.write_synced(aside / STATE, json.dumps(about, indent=1))
            for folder in (aside / "model", aside):
                disk.sync_directory(folder)
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            disk.sync_directory(self.root)
        except OSError as error:
            raise self._failed(str(error), full=error.errno in FULL) from error
        self.pending = None
        self._remove_old(state.rollout)

    def finish(self, state: State, engines: Engines) -> None:
        """Before the end: a run that stops early is saved, and nothing stays half written."""
        unsaved = state.rollout < state.num_rollout and state.rollout != self.begun
        if unsaved and not self.cfg.debug.debug_rollout_only:
            with engines.asleep(), self.log.phase("save_model"):
                self.save(state)
        self.commit(wait=True)

    def _finish(self) -> None:
        answers = [answer for answer in self.workers.finish_save() if answer]
        failures = [answer for answer in answers if "failure" in answer]
        if failures:
            size = sum(answer["bytes"] for answer in answers)
            raise self._failed(failures[0]["failure"], failures[0]["full"], size)
        self.written = True

    def _failed(self, why: str, full: bool = False, size: int = 0) -> Explained:
        """The sentence for a save that failed; what it left is removed."""
        shutil.rmtree(self._aside, ignore_errors=True)
        last = max(complete(self.root), default=None)
        good = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        if not full:
            return Explained(
                f"checkpoint.save: {self.root} cannot be written ({why}); {good}: "
                "choose another directory or mend this one, and start the run again"
            )
        free = shutil.disk_usage(self.root).free
        needs = f"a checkpoint needs {size:,} bytes" if size else "a checkpoint needs more"
        return Explained(
            f"checkpoint.save: no space left in {self.root}: {needs}, {free:,} are free; {good}: "
            "make room or choose another directory, and start the run again"
        )

    @property
    def _final(self) -> Path:
        assert self.pending is not None
        return self.root / f"rollout_{self.pending.rollout:06d}"

    @property
    def _aside(self) -> Path:
        return self.root / f".{self._final.name}.part"

    def _remove_old(self, rollout: int) -> None:
        """Those before the newest, beyond `keep_last` in all. Later ones are of another try."""
        keep = self.cfg.checkpoint.keep_last
        older = [path for path in complete(self.root) if number(path) < rollout]
        for path in older[: len(older) - (keep - 1)] if keep and len(older) >= keep else ():
            remove(path)


def remove(path: Path) -> None:
    """Its name goes first: a checkpoint that is half removed must not look like one."""
    aside = path.with_name(f".{path.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def read(path: Path) -> dict[str, Any]:
    """What state.json says, its state as a `State`; Damaged where something is wrong that shows."""
    try:
        about = json.loads((path / STATE).read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']}, not {FORMAT}")
        about |= {"state": State(**about["state"]), "files": dict(about["files"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"its {STATE} cannot be read ({error or type(error).__name__})"
        raise Damaged(path, why) from error
    for name, (size, digest) in about["files"].items():
        file = path / name
        if not file.is_file():
            raise Damaged(path, f"{name} is missing")
        if file.stat().st_size != size:
            raise Damaged(path, f"{name} has {file.stat().st_size:,} of {size:,} bytes")
        if digest is not None and _digest(file) != digest:
            raise Damaged(path, f"the content of {name} has changed")
    return about


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != STATE)


def _seal(path: Path) -> tuple[int, str | None]:
    size = path.stat().st_size
    return size, _digest(path) if size <= HASHED else None


def _digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
