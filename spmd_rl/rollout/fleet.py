"""The controller's view of all engines of the job: put to sleep, filled with new weights, woken.

Comes in: their addresses. It must not know how they were started or which transport a push uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from spmd_rl.config import Config
from spmd_rl.rollout.admin import EngineAdmin, EngineError

if TYPE_CHECKING:
    from spmd_rl.rollout.repair import Repairs


class EngineAddresses(NamedTuple):
    """Where generation requests go, and the key the job's engines ask for."""

    urls: list[str]  # one per engine, in engine order
    router_url: str  # the router, or the only engine
    key: str
    teacher_url: str = ""  # the job's own teacher, if it has one


CACHES = ("kv_cache", "cuda_graph")  # what an engine needs besides its weights


class Engines:
    """All engines; does nothing when the run has none (SFT). `repairs`: an engine that fails is
    mended; None: its failure is raised.
    """

    def __init__(self, cfg: Config, addresses: EngineAddresses | None):
        self.sleeps = bool(cfg.placement.offload_rollout)
        self.admins = admins(addresses.urls, addresses.key) if addresses else []
        self.pool = ThreadPoolExecutor(max(1, len(self.admins)), thread_name_prefix="engines")
        self.replays = bool(cfg.debug.load_debug_rollout_data)
        self.version = 0  # the last that was pushed
        self.repairs: Repairs | None = None

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Engine memory belongs to the trainer inside; weights must be pushed before it ends."""
        if self.repairs:
            self.repairs.collected()
        if self.sleeps:
            self._each(
                self._sound(), lambda admin: (admin.flush(), admin.sleep(("weights", *CACHES)))
            )
        yield

    def push(self, workers: Any, version: int) -> dict[str, float]:
        """Give every engine the trainer's weights as `version` and wake it. Returns timings."""
        if not self.admins:
            if self.replays:
                workers.count_push(version)
            return {}
        self.version = version
        stats = self.fill(workers, self._sound())
        return stats | (self.repairs.pushed() if self.repairs else {})

    def fill(self, workers: Any, indices: list[int]) -> dict[str, float]:
        """Give these engines the present version. The others keep their requests: they are
        interrupted only where the trainer needs the memory of their caches for the push.
        """
        others = [index for index in self._sound() if index not in indices]
        if self.sleeps:
            self._each(others, lambda admin: (admin.pause(), admin.flush(), admin.sleep(CACHES)))
            self._each(indices, lambda admin: (admin.wake(("weights",)), admin.sleep(CACHES)))
        stats, failed = {}, {}
        if indices := [index for index in self._sound() if index in indices]:
            answers = workers.push_weights(self.version, indices)
            stats = answers[0]["stats"] if answers[0] else {}
            for answer in answers:
                failed.update(answer.get("failed", {}))
        for index, why in failed.items():
            self._broke(index, EngineError(why))
        if self.sleeps:
            self._each(self._sound(), lambda admin: admin.wake(CACHES))
            self._each(others, lambda admin: admin.resume())
        self._each(indices, lambda admin: admin.resume())
        return stats

    def _each(self, indices: Iterable[int], action: Callable[[EngineAdmin], Any]) -> None:
        """At once on these engines, but for those found broken."""
        chosen = [index for index in self._sound() if index in set(indices)]
        tasks = [(index, self.pool.submit(action, self.admins[index])) for index in chosen]
        for index, task in tasks:
            try:
                task.result()
            except EngineError as error:
                self._broke(index, error)

    def _sound(self) -> list[int]:
        broken = self.repairs.broken if self.repairs else {}
        return [index for index in range(len(self.admins)) if index not in broken]

    def _broke(self, index: int, error: EngineError) -> None:
        if self.repairs is None:
            raise error
        self.repairs.broke(index, str(error))


def admins(urls: list[str], key: str) -> list[EngineAdmin]:
    """One for each engine, in engine order."""
    return [EngineAdmin(url, key, index) for index, url in enumerate(urls)]
