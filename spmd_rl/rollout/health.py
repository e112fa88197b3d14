"""Health checks: engines that hang end nothing and answer nothing, so they are asked now and then.

Comes in: the engines' admins and how often to ask; goes out: which did not answer. Asks only while
`look` is called, which is while engines generate: asleep or being filled they answer no one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from spmd_rl.config import Config
from spmd_rl.rollout.admin import EngineAdmin


class Health:
    def __init__(self, cfg: Config, admins: list[EngineAdmin]):
        rollout = cfg.rollout
        self.interval = rollout.rollout_health_check_interval
        self.timeout = rollout.rollout_health_check_timeout
        self.first_wait = rollout.rollout_health_check_first_wait
        self.admins = admins
        self._pool = ThreadPoolExecutor(max(1, len(admins)), thread_name_prefix="health")
        self._asked: dict[int, Future[bool]] = {}
        self._due: dict[int, float] = {}

    def begin(self, engines: Iterable[int]) -> None:
        """These have just got weights and generate from now on."""
        due = time.monotonic() + self.first_wait + self.interval
        self._due.update(dict.fromkeys(engines, due))

    def pause(self, engines: Iterable[int]) -> None:
        """Ask these no more; none is being asked when this returns."""
        asked = []
        for index in engines:
            self._due.pop(index, None)
            if index in self._asked:
                asked.append(self._asked.pop(index))
        wait(asked)

    def look(self) -> dict[int, str]:
        """Engine -> what is wrong with it, of those found wanting since the last look."""
        now, found = time.monotonic(), {}
        for index, due in list(self._due.items()):
            asked = self._asked.get(index)
            if asked is None:
                if now >= due:
                    admin = self.admins[index]
                    self._asked[index] = self._pool.submit(admin.generates, self.timeout)
            elif asked.done():
                del self._asked[index]
                self._due[index] = now + self.interval
                if not asked.result():
                    del self._due[index]
                    found[index] = (
                        f"{self.admins[index].name} failed its health check: no token within "
                        f"{self.timeout:g} s (rollout.rollout_health_check_timeout)"
                    )
        return found
