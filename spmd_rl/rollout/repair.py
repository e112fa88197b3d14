"""Engine repair, on rank 0: which engines are broken, and how they are made to generate again.

Comes in: notices of the ranks that engines ended, what the collector met, health checks, failures
of pushes. An engine found broken is started again by its host, given the present version by the
train ranks and handed back to the collector, which kept its unfinished samples. It must not know
what is generated. No rank is in a collective while engines generate: every step is a command.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from spmd_rl.config import Config
from spmd_rl.rollout.engines import EngineDied
from spmd_rl.rollout.fleet import Engines
from spmd_rl.rollout.health import Health
from spmd_rl.rollout.router import Router

DEATHS = 3  # of one engine, without a rollout in between, that fail the job


class Collecting(Protocol):
    """What the collector process is told and tells (rollout.collector.Collector)."""

    def broke(self, indices: list[int]) -> None: ...

    def mended(self, index: int, starts: int) -> None: ...

    def reported(self) -> list[tuple[int, int, str]]: ...


class Repairs:
    """`broken` has the engines to mend, and why; nobody talks to them meanwhile."""

    def __init__(
        self,
        cfg: Config,
        engines: Engines,
        workers: Any,
        router: Router,
        collector: Collecting,
        notices: Any,
        say: Callable[[str], None],
    ):
        self.engines, self.workers, self.collector = engines, workers, collector
        self.router, self.notices, self.say = router, notices, say
        self.health = Health(cfg, engines.admins)
        self.broken: dict[int, str] = {}
        self.starts = Counter({index: 0 for index in range(len(engines.admins))})
        self.restarts = 0  # since the last push
        self._in_a_row: Counter[int] = Counter()

    # -- what happens ---------------------------------------------------------------------------

    def watch(self) -> None:
        """To be called a few times a second while engines generate: mends what breaks."""
        self._listen()
        for index, why in self.health.look().items():
            self.broke(index, why)
        if self.broken:
            self._mend()
        if self.router.ended:
            began, why = time.monotonic(), self.router.ended
            self.router.start()  # its requests went past it meanwhile
            seconds = time.monotonic() - began
            self.say(f"the router was started again in {seconds:.1f} s: {last_line(why)}")

    def collected(self) -> None:
        """A rollout is complete; engines will not be asked to generate before the next push."""
        self.health.pause(self.starts)
        self._listen()
        for index in self._sound():
            self._in_a_row.pop(index, None)

    def pushed(self) -> dict[str, float]:
        """Every sound engine has the present version: give it to the others too. Metrics."""
        self._listen()
        self._mend()
        self.health.begin(self._sound())
        restarts, self.restarts = self.restarts, 0
        return {"perf/engine_restarts": float(restarts)}

    def broke(self, index: int, why: str) -> None:
        self.broken.setdefault(index, why)

    # -- what is done ---------------------------------------------------------------------------

    def _listen(self) -> None:
        for index, starts, why in self.collector.reported():
            if starts == self.starts[index]:
                self.broke(index, why)
        for index, starts, why in self.notices.read():
            if starts == self.starts[index]:
                self.broken[index] = why  # its host knows best

    def _mend(self) -> None:
        """Until no engine is broken: other engines may break while one is mended."""
        while self.broken:
            began = time.monotonic()
            self.health.pause(self.starts)  # a push may interrupt the others
            self.collector.broke(list(self.broken))
            self._listen()  # the cause of what was noticed first
            reasons = dict(self.broken)
            self._count(reasons)
            started = self._start(reasons)
            self.engines.fill(self.workers, started)
            self._listen()
            for index in started:
                if index not in self.broken:
                    self.collector.mended(index, self.starts[index])
                    self.say(
                        f"engine {index} was started again in {time.monotonic() - began:.1f} s: "
                        + last_line(reasons[index])
                    )
            self.health.begin(self._sound())

    def _sound(self) -> list[int]:
        return [index for index in self.starts if index not in self.broken]

    def _count(self, reasons: dict[int, str]) -> None:
        for index, why in reasons.items():
            self._in_a_row[index] += 1
            if self._in_a_row[index] >= DEATHS:
                raise EngineDied(
                    f"{why}\nengine {index} broke {DEATHS} times in a row, the last time: "
                    + last_line(why)
                )

    def _start(self, reasons: dict[int, str]) -> list[int]:
        """Those that came up again; the others stay broken, for a new reason."""
        for index in reasons:
            self.starts[index] += 1
            self.engines.admins[index].renew()
        failed: dict[int, str] = {}
        for answer in self.workers.restart_engines({i: self.starts[i] for i in reasons}):
            failed.update(answer)
        self.restarts += len(reasons)
        self.broken = {i: why for i, why in self.broken.items() if i not in reasons} | failed
        return [index for index in reasons if index not in failed]


def last_line(text: str) -> str:
    return text.rstrip().rpartition("\n")[2]
