"""Groups that were begun and not finished, in front of the prompts: they are drawn first.

Comes in: what a rollout could not finish; goes out: groups for the next, and a state with every
token of them, so that a run that goes on from a checkpoint loses none (slime keeps its buffer in
memory only). It must not know engines or rewards.
"""

from __future__ import annotations

from typing import Any

import orjson

from spmd_rl import hooks
from spmd_rl.config.schema import Config
from spmd_rl.data.prompts import PromptSource
from spmd_rl.types import Group, Sample

KEY = "buffer"  # in a state


class Buffer:
    """A source of groups that groups can be given back to."""

    def __init__(self, cfg: Config, source: PromptSource):
        self.cfg, self.source = cfg, source
        self.groups: list[Group] = []
        self._pick = hooks.optional(cfg.rollout.buffer_filter_path) or pop_first
        self.resumed = 0  # groups drawn from here since the last `rest`

    def __len__(self) -> int:
        return len(self.source)

    @property
    def notes(self) -> list[str]:
        """What the user should know about the data."""
        return self.source.prompts.notes

    @property
    def given(self) -> Buffer:
        """What the user's functions get as `data_source`."""
        return self

    @property
    def buffered(self) -> int:
        """Groups that wait to be gone on with."""
        return len(self.groups)

    def get_samples(self, count: int) -> list[Group]:
        """`count` groups: those that were begun, as far as the filter lets them, then new ones."""
        known = {id(group): group for group in self.groups}
        taken = self._pick(self.cfg, None, self.groups, count) if self.groups else []
        if len(taken) > count or any(id(group) not in known for group in taken):
            raise ValueError(
                f"rollout.buffer_filter_path must return at most {count} of the buffer's groups "
                f"and remove them from it, not {len(taken)} others"
            )
        self.resumed += len(taken)
        return taken + self.source.draw(count - len(taken))

    def add_samples(self, groups: list[Group]) -> None:
        """Groups that are drawn before any prompt."""
        self.groups += groups

    def rest(self, groups: list[Group], rollout: int) -> None:
        """Keep what `rollout` began and did not finish."""
        mark_begun(groups, rollout)
        self.add_samples(groups)
        self.resumed = 0

    def state(self, rollout: int = 0) -> dict[str, Any]:
        """Where the source stands after that rollout.

        Raises ValueError for a sample that JSON cannot hold: user code may have made it.
        """
        if not self.groups:
            return self.source.state()
        try:
            data = orjson.dumps(
                [[sample.to_dict() for sample in group] for group in self.groups],
                option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS,
            )
        except TypeError as error:
            raise ValueError(
                "rollout.partial_rollout keeps samples in checkpoints as JSON, and one holds "
                f"something else in its metadata, label or reward ({error}): leave it out"
            ) from error
        return self.source.state() | {KEY: orjson.loads(data)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.source.load_state(state)
        self.resumed = 0
        self.groups = [list(map(Sample.from_dict, group)) for group in state.get(KEY, ())]


def mark_begun(groups: list[Group], rollout: int) -> None:
    """Note in which rollout a sample got its first token."""
    for sample in (sample for group in groups for sample in group):
        if sample.response_length:
            sample.metadata.setdefault("start_rollout_id", rollout)


def pop_first(
    args: Config, rollout_id: int | None, buffer: list[Group], num_samples: int
) -> list[Group]:
    """The oldest groups, slime's default for `buffer_filter_path`. Removes them from the buffer."""
    taken = buffer[:num_samples]
    del buffer[:num_samples]
    return taken
