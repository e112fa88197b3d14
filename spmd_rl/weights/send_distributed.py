"""Push to engines elsewhere: one train rank broadcasts buckets in a process group with all engine
ranks.

Names and shapes go ahead over HTTP. The group outlives a push, and is made anew when an engine is
replaced. An engine that refuses must not leave the broadcast hanging: it is asynchronous, and
watched together with the answers.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta

import torch.distributed as dist

from spmd_rl.rollout.admin import EngineAdmin, EngineError
from spmd_rl.types import EngineSpec
from spmd_rl.weights import groups, update
from spmd_rl.weights.bucket import Bucket, NamedTensor, pack

LEAVE_SECONDS = 10.0  # engines get to notice that their group is gone

Answers = dict[int, Future]  # by engine


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
        self.specs = {spec.index: spec for spec in specs}
        self.admins, self.host = admins, host
        self.backend, self.timeout = backend, timeout
        # One thread an engine: its requests stay in order, and so agree with the broadcasts.
        self.pools = [ThreadPoolExecutor(1, thread_name_prefix="push") for _ in admins]
        self.group: dist.ProcessGroup | None = None
        self.members: list[int] = []  # engines of the group
        self.name = ""
        self.count = 0
        self.sent: list[tuple[Bucket, Answers]] = []
        self.failed: dict[int, EngineError] = {}

    def open(self, engines: list[int]) -> None:
        """Begin a push to these engines."""
        self.failed, self.sent = {}, []
        chosen = {index: self.admins[index] for index in engines}
        self.failed |= update.each(chosen, update.begin)
        try:
            self._connect([index for index in engines if index not in self.failed])
        except EngineError as error:
            self._give_up(error)

    def send(self, run: list[NamedTensor]) -> None:
        if self.group is None:
            return
        try:
            self._settle()  # the engines loaded the last bucket while this one was made
            self._broadcast(run)
        except (EngineError, RuntimeError) as error:
            self._give_up(error)

    def close(self, version: int) -> dict[int, EngineError]:
        """The engines have all buckets: they are `version`. What went wrong, by engine."""
        try:
            self._settle()
        except EngineError as error:
            self._give_up(error)
        chosen = {i: self.admins[i] for i in self.members if i not in self.failed}
        self.failed |= update.each(chosen, lambda admin: update.end(admin, version))
        return self.failed

    def _connect(self, engines: list[int]) -> None:
        """Make the group, unless it is there. Engines that were started again left it."""
        if self.group is not None and self.members == engines:
            return
        self.disconnect()
        if not engines:
            return
        self.count += 1
        self.name, self.members = f"spmd_rl-push-{self.count}", engines
        world = 1 + sum(len(self.specs[index].ranks) for index in engines)
        store = groups.listen(self.host, world, self.timeout)
        offset, joins = 1, []
        for index in engines:
            args = (self.host, store.port, offset, world, self.name, self.backend)
            joins.append(self.pools[index].submit(self.admins[index].init_group, *args))
            offset += len(self.specs[index].ranks)
        self.group = groups.join(store, 0, world, self.name, self.backend, self.timeout)
        for join in joins:
            join.result()

    def disconnect(self) -> None:
        """Forget the group; engines that are gone are left out."""
        if self.group is None:
            return
        members = {index: self.admins[index] for index in self.members}
        update.each(members, lambda admin: admin.destroy_group(self.name))
        dist.destroy_process_group(self.group)
        self.group, self.members = None, []

    def renew(self, engines: list[int]) -> None:
        """These engines were started again and know nothing of the group."""
        if set(engines) & set(self.members):
            self.disconnect()

    def _broadcast(self, run: list[NamedTensor]) -> None:
        bucket = pack(run, shared=False)
        dtypes = [str(dtype).removeprefix("torch.") for dtype in bucket.dtypes]
        answers = {
            index: self.pools[index].submit(
                self.admins[index].update_from_distributed,
                *(bucket.names, dtypes, bucket.shapes, self.name),
            )
            for index in self.members
        }
        self.sent.append((bucket, answers))
        work = dist.broadcast(bucket.flat, src=0, group=self.group, async_op=True)
        assert work is not None
        while not work.is_completed():
            for answer in answers.values():
                if answer.done():
                    answer.result()
            time.sleep(0.0005)
        work.wait()

    def _settle(self) -> None:
        """Return when all engines have what was sent."""
        for _, answers in self.sent:
            for answer in answers.values():
                answer.result()
        self.sent.clear()

    def _give_up(self, error: Exception) -> None:
        """A group with a dead member is dead. Ours goes first, so that engines which wait in it
        are let go; all that have not taken the push have failed.
        """
        group, self.group = self.group, None
        if group is not None:
            dist.destroy_process_group(group)
        for _, answers in self.sent:
            wait(answers.values(), LEAVE_SECONDS)
            for index, answer in answers.items():
                own = answer.exception() if answer.done() else None
                self.failed[index] = (
                    own
                    if isinstance(own, EngineError)
                    else EngineError(
                        f"{self.admins[index].name} lost its part of a weight push: {error}"
                    )
                )
        for index in self.members:
            self.failed.setdefault(index, EngineError(str(error)))
        self.sent, self.members = [], []
