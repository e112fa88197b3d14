"""Push to engines elsewhere: one train rank broadcasts buckets in a process group with all engine
ranks.

Names and shapes go ahead over HTTP. The group outlives a push, and is made anew when an engine is
replaced. An engine that refuses must not leave the broadcast hanging: it is asynchronous, and
watched together with the answers.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from spmd_rl.rollout.admin import EngineAdmin, EngineError
from spmd_rl.types import EngineSpec
from spmd_rl.weights import groups
from spmd_rl.weights.bucket import Bucket, NamedTensor, pack


class DistributedSender:
    """The sending rank's side."""

    def __init__(
        self,
        specs: tuple[EngineSpec, ...],
        admins: list[EngineAdmin],
        host: str,
        backend: str,
        timeout: timedelta,
    ):
        self.specs, self.admins, self.host = specs, admins, host
        self.backend, self.timeout = backend, timeout
        # One thread an engine: its requests stay in order, and so agree with the broadcasts.
        self.pools = [ThreadPoolExecutor(1, thread_name_prefix="push") for _ in admins]
        self.group: dist.ProcessGroup | None = None
        self.name = ""
        self.count = 0
        self.sent: list[tuple[Bucket, list[Future]]] = []

    def connect(self) -> None:
        """Make the group, unless it is there."""
        if self.group is not None:
            return
        self.count += 1
        self.name = f"spmd_rl-push-{self.count}"
        world = 1 + sum(len(spec.ranks) for spec in self.specs)
        store = groups.listen(self.host, world, self.timeout)
        offset, joins = 1, []
        for spec, admin, pool in zip(self.specs, self.admins, self.pools, strict=True):
            args = (self.host, store.port, offset, world, self.name, self.backend)
            joins.append(pool.submit(admin.init_group, *args))
            offset += len(spec.ranks)
        self.group = groups.join(store, 0, world, self.name, self.backend, self.timeout)
        for join in joins:
            join.result()

    def disconnect(self) -> None:
        """Forget the group; engines that are gone are left out."""
        if self.group is None:
            return
        for admin in self.admins:
            with suppress(EngineError):
                admin.destroy_group(self.name)
        dist.destroy_process_group(self.group)
        self.group = None

    def send(self, run: list[NamedTensor]) -> None:
        self.finish()  # the engines loaded the last bucket while this one was made
        bucket = pack(run, shared=False)
        dtypes = [str(dtype).removeprefix("torch.") for dtype in bucket.dtypes]
        answers = [
            pool.submit(
                admin.update_from_distributed, bucket.names, dtypes, bucket.shapes, self.name
            )
            for admin, pool in zip(self.admins, self.pools, strict=True)
        ]
        work = dist.broadcast(bucket.flat, src=0, group=self.group, async_op=True)
        assert work is not None
        while not work.is_completed():
            for answer in answers:
                if answer.done():
                    answer.result()
            time.sleep(0.0005)
        work.wait()
        self.sent.append((bucket, answers))

    def finish(self) -> None:
        """Return when all engines have what was sent."""
        for _, answers in self.sent:
            for answer in answers:
                answer.result()
        self.sent.clear()
