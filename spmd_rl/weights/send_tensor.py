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

from spmd_rl.rollout.admin import EngineAdmin, EngineError
from spmd_rl.types import EngineSpec
from spmd_rl.weights import update
from spmd_rl.weights.bucket import Bucket, NamedTensor, allocate, pack, serialize

IN_FLIGHT = 2


class TensorSender:
    """This rank's part in filling the engine it belongs to; `spec` None: it belongs to none."""

    def __init__(self, spec: EngineSpec | None, group, rank: int, admin: EngineAdmin | None):
        """`group`: gloo group of the engine's ranks, None for an engine of one rank."""
        self.spec, self.group, self.rank, self.admin = spec, group, rank, admin
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="push")
        self.sent: deque[tuple[Bucket, Future | None]] = deque()
        self.active = False  # whether the engine gets this push
        self.failed: dict[int, EngineError] = {}
        # The first shared allocation starts torch's helper process and never returns, with the
        # interpreter held, should that be killed meanwhile. Not in the middle of a run, then.
        allocate(1, torch.device("cpu"), shared=True)

    def open(self, engines: list[int]) -> None:
        """Begin a push to these engines."""
        self.active = self.spec is not None and self.spec.index in engines
        self.failed = update.each(self._admins(), update.begin)

    def send(self, run: list[NamedTensor]) -> None:
        """Also when the engine has failed: its other ranks cannot know, and wait for this one."""
        if not self.active:
            return
        while len(self.sent) >= IN_FLIGHT:
            self._settle()
        bucket = pack(run, shared=True)
        handles = self._gather(serialize(bucket))
        posted = None
        if self.admin and not self.failed:
            posted = self.pool.submit(self.admin.update_from_tensor, handles)
        self.sent.append((bucket, posted))

    def close(self, version: int) -> dict[int, EngineError]:
        """The engine has all buckets: they are `version`. What went wrong, by engine."""
        while self.sent:
            self._settle()
        if not self.failed:
            self.failed = update.each(self._admins(), lambda admin: update.end(admin, version))
        return self.failed

    def _admins(self) -> dict[int, EngineAdmin]:
        return {self.spec.index: self.admin} if self.active and self.spec and self.admin else {}

    def _settle(self) -> None:
        """Wait for the oldest bucket's answer on all ranks of the engine; only then may its
        memory go.
        """
        bucket, posted = self.sent[0]
        if posted:
            try:
                posted.result()
            except EngineError as error:
                assert self.spec is not None
                self.failed.setdefault(self.spec.index, error)
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
