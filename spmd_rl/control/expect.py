"""What rank 0 expects of the others: answers before a deadline, and the same order of commands.

Comes in: the command in progress, heartbeats, the store. Goes out: a sentence when something is
overdue.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spmd_rl.control.job import Job

DUMP_PATIENCE = 2.0  # seconds for all ranks to write their stacks


class Expectations:
    """Looked at by rank 0's watcher at every heartbeat."""

    def __init__(self, job: Job):
        self.job = job
        self._command = (0, "", 0.0, 0.0)
        self._dump_until = 0.0
        self._waits: dict[int, tuple[int, int]] = {}

    def command(self, sequence: int, name: str, end: float, seconds: float) -> None:
        """The command in progress and the monotonic time it must be over; no name: none is."""
        self._command = (sequence, name, end, seconds)

    def overdue(self, store: Any, now: float) -> str | None:
        """After a deadline: first have all ranks dump their stacks, then say who is late."""
        sequence, name, end, seconds = self._command
        if not name or now < end:
            return None
        if not self._dump_until:
            self._dump_until = now + DUMP_PATIENCE
            store.set("dump", "now")
        world = range(self.job.world)
        if now < self._dump_until and not store.check([f"dumped/{rank}" for rank in world]):
            return None
        late = [] if self.job.waiting else ["0"]
        late += [str(r) for r in world[1:] if not store.check([f"answer/{sequence}/{r}"])]
        folder = self.job.run_dir
        stacks = f"; stacks of all ranks: {folder}/logs/stacks.rank*" if folder else ""
        missed = f"command {name} missed its deadline of {seconds:g} s"
        return f"{missed}: no answer from rank {', '.join(late)}{stacks}"

    def out_of_order(self, beats: dict[int, bytes]) -> str | None:
        """A follower that waits for a command number that is not the next would wait for ever.

        Two heartbeats must say so, since one may be older than the command in progress.
        """
        for rank, beat in beats.items():
            count, sequence, waiting, _ = json.loads(beat)
            expected = sequence + 1
            if not waiting or expected in (self.job.sequence, self.job.sequence + 1):
                self._waits.pop(rank, None)
                continue
            before, counted = self._waits.get(rank, (0, 0))
            if before == expected and counted != count:
                theirs = f"rank {rank} waits for command {expected}"
                return f"the ranks disagree: {theirs}, rank 0 is at {self.job.sequence}"
            self._waits[rank] = (expected, count)
        return None
