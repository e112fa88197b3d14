"""Push to engines on the same devices: only handles travel over HTTP, the engine copies from our
memory.

Every train rank of an engine exports its own copy of a bucket (on a GPU: memory the engine's rank
on that GPU can map); the engine's first rank gathers the handles over gloo and posts them. Two
buckets are in flight: the engine loads one while the next is made.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.distributed as dist

from spmd_rl.rollout.admin import EngineAdmin
from spmd_rl.types import EngineSpec
from spmd_rl.weights.bucket import Bucket, NamedTensor, allocate, pack, serialize

IN_FLIGHT = 2


class TensorSender:
    """This rank's part in filling the engine it belongs to; `spec` None: it belongs to none."""

    packs = True  # every rank takes part, not only the one that posts

    def __init__(self, spec: EngineSpec | None, group, rank: int, admin: EngineAdmin | None):
        """`group`: gloo group of the engine's ranks, None for an engine of one rank."""
        self.spec, self.group, self.rank, self.admin = spec, group, rank, admin
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="push")
        self.sent: deque[tuple[Bucket, Future | None]] = deque()
        # The first shared allocation starts torch's helper process and never returns, with the
        # interpreter held, should that be killed meanwhile. Not in the middle of a run, then.
        allocate(1, torch.device("cpu"), shared=True)

    @property
    def admins(self) -> list[EngineAdmin]:
        """Engines this rank speaks to."""
        return [self.admin] if self.admin else []

    def send(self, run: list[NamedTensor]) -> None:
        if self.spec is None:
            return
        while len(self.sent) >= IN_FLIGHT:
            self._settle()
        bucket = pack(run, shared=True)
        handles = self._gather(serialize(bucket))
        posted = None
        if self.admin:
            posted = self.pool.submit(self.admin.update_from_tensor, handles)
        self.sent.append((bucket, posted))

    def finish(self) -> None:
        """Return when the engine has all buckets."""
        while self.sent:
            self._settle()

    def _settle(self) -> None:
        """Wait for the oldest bucket's answer on all ranks of the engine; only then may its
        memory go.
        """
        bucket, posted = self.sent[0]
        if posted:
            posted.result()
        if self.group is not None:
            dist.barrier(self.group)
        self.sent.popleft()

    def _gather(self, handle: str) -> list[str]:
        assert self.spec is not None
        if self.group is None:
            return [handle]
        first = self.admin is not None
        handles: list[str] = [""] * len(self.spec.ranks)
        dist.gather_object(handle, handles if first else None, group=self.group, group_dst=0)
        return handles
