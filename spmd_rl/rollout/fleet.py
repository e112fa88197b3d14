"""The controller's view of all engines of the job: put to sleep, filled with new weights, woken.

Comes in: their addresses. It must not know how they were started or which transport a push uses.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

from spmd_rl.config import Config
from spmd_rl.rollout.admin import EngineAdmin


class EngineAddresses(NamedTuple):
    """Where generation requests go, and the key the job's engines ask for."""

    urls: list[str]  # one per engine, in engine order
    router_url: str  # the router, or the only engine
    key: str


CACHES = ("kv_cache", "cuda_graph")  # what an engine needs besides its weights


class Engines:
    """All engines; does nothing when the run has none (SFT)."""

    def __init__(self, cfg: Config, addresses: EngineAddresses | None):
        self.sleeps = bool(cfg.placement.offload_rollout)
        self.admins = admins(addresses.urls, addresses.key) if addresses else []
        self.pool = ThreadPoolExecutor(max(1, len(self.admins)), thread_name_prefix="engines")

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Engine memory belongs to the trainer inside; weights must be pushed before it ends."""
        if self.sleeps:
            self._each(lambda admin: (admin.flush(), admin.sleep(("weights", *CACHES))))
        yield

    def push(self, workers, version: int) -> dict[str, float]:
        """Give every engine the trainer's weights as `version` and wake it. Returns timings."""
        if not self.admins:
            return {}
        if self.sleeps:
            self._each(lambda admin: admin.wake(("weights",)))
        stats = workers.push_weights(version)[0]
        if self.sleeps:
            self._each(lambda admin: admin.wake(CACHES))
        return stats

    def _each(self, action) -> None:
        list(self.pool.map(action, self.admins))


def admins(urls: list[str], key: str) -> list[EngineAdmin]:
    """One for each engine, in engine order."""
    return [EngineAdmin(url, key, index) for index, url in enumerate(urls)]
