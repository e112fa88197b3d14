"""Where a run's samples come from: our prompts with their buffer, or a class of the user.

The class is slime's: made with `args`, it has `get_samples(num)` and `__len__`, and as it needs
them `add_samples(groups)` (what a rollout began and did not finish), and either `state()` and
`load_state(state)`, with plain values, or slime's `save(rollout_id)` and `load(rollout_id)`, whose
files below `args.save` and `args.load` go into our checkpoints.
"""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path
from typing import Any

import orjson

from spmd_rl import hooks
from spmd_rl.config.schema import Config
from spmd_rl.data.buffer import Buffer, mark_begun
from spmd_rl.data.prompts import training_source
from spmd_rl.data.rows import DataError
from spmd_rl.data.template import Template
from spmd_rl.types import Group, Sample

KEY = "data.data_source_path"


def source_of(cfg: Config, template: Template) -> Buffer | UserSource:
    if cfg.data.data_source_path:
        return UserSource(cfg)
    return Buffer(cfg, training_source(cfg, template))


class UserSource:
    """The user's class, used as our own source is."""

    notes: tuple[str, ...] = ()

    def __init__(self, cfg: Config):
        assert cfg.data.data_source_path
        self.n_samples = cfg.rollout.n_samples_per_prompt
        self.folder = tempfile.TemporaryDirectory(prefix="data_source-")
        theirs = cfg.model_copy(deep=True)  # save() and load() know no other place
        theirs.checkpoint.save = theirs.checkpoint.load = self.folder.name
        self.given = hooks.load(cfg.data.data_source_path)(theirs)
        self.resumed = 0  # groups drawn that were begun, since the last `rest`
        if not hasattr(self.given, "get_samples") or not hasattr(self.given, "__len__"):
            raise DataError(
                f"{KEY} '{cfg.data.data_source_path}' has no get_samples or __len__: give it both"
            )

    def __len__(self) -> int:
        return len(self.given)

    @property
    def buffered(self) -> int:
        """Groups that wait to be gone on with, where the class tells (as slime's does)."""
        tells = getattr(self.given, "get_buffer_length", None)
        return tells() if tells else 0

    def get_samples(self, count: int) -> list[Group]:
        groups = self.given.get_samples(count)
        wrong = next((g for g in groups if not _is_group(g, self.n_samples)), None)
        if len(groups) != count or wrong is not None:
            what = f"{len(groups)} groups" if wrong is None else f"{wrong!r:.200}"
            raise DataError(
                f"{KEY}: get_samples({count}) returned {what}: return {count} lists, each of "
                f"{self.n_samples} Samples (rollout.n_samples_per_prompt)"
            )
        self.resumed += sum(any(s.response_length for s in group) for group in groups)
        return groups

    def rest(self, groups: list[Group], rollout: int) -> None:
        """Give back what `rollout` began and did not finish."""
        self.resumed = 0
        if not groups:
            return
        if not hasattr(self.given, "add_samples"):
            raise DataError(
                f"{KEY} has no add_samples, which rollout.partial_rollout needs: give it one"
            )
        mark_begun(groups, rollout)
        self.given.add_samples(groups)

    def state(self, rollout: int) -> dict[str, Any]:
        """What a checkpoint keeps. Raises DataError where JSON cannot hold it."""
        if hasattr(self.given, "state"):
            state = self.given.state()
            try:
                return {"user": orjson.loads(orjson.dumps(state))}
            except TypeError as error:
                raise DataError(f"{KEY}: state() must give plain values ({error})") from error
        if not hasattr(self.given, "save"):
            return {}
        for path in self._files():
            path.unlink()
        self.given.save(rollout)
        root = Path(self.folder.name)
        files = {
            str(path.relative_to(root)): base64.b64encode(path.read_bytes()).decode()
            for path in self._files()
        }
        return {"rollout_id": rollout, "files": files}

    def load_state(self, state: dict[str, Any]) -> None:
        self.resumed = 0
        if "user" in state:
            self.given.load_state(state["user"])
        if "files" not in state:
            return
        for name, data in state["files"].items():
            path = Path(self.folder.name, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(data))
        self.given.load(state["rollout_id"])

    def _files(self) -> list[Path]:
        return sorted(path for path in Path(self.folder.name).rglob("*") if path.is_file())


def _is_group(group: Any, count: int) -> bool:
    return (
        isinstance(group, list)
        and len(group) == count
        and all(isinstance(sample, Sample) for sample in group)
    )
