"""A push: the trainer's weights become every engine's, under a new version.

Comes in: the trainer's full tensors under their Hugging Face names, which all train ranks iterate
together, and the engines' addresses. Goes out: seconds and bytes. Order: pause, flush, begin,
buckets, end with the version, resume; afterwards each engine must report the version, and on
request every tensor must have the trainer's bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch.distributed as dist

from spmd_rl.config import Config
from spmd_rl.rollout import engine_args, fleet
from spmd_rl.rollout.admin import EngineAdmin, EngineError
from spmd_rl.types import Placement
from spmd_rl.weights.bucket import NamedTensor, split
from spmd_rl.weights.equal import check_engines
from spmd_rl.weights.send_distributed import DistributedSender
from spmd_rl.weights.send_tensor import TensorSender


class Pusher:
    """One train rank's part in pushes. Made on all train ranks together."""

    def __init__(self, cfg: Config, placement: Placement, job, urls: list[str], key: str):
        self.cfg, self.placement, self.job = cfg, placement, job
        self.first = job.rank == placement.train_ranks[0]
        self.limit = cfg.debug.update_weight_buffer_size
        self.key = key
        if placement.colocate:
            self.sender = self._tensor_sender(urls)
        else:
            self.sender = self._distributed_sender(urls) if self.first else None

    def push(self, trainer, version: int) -> dict[str, float]:
        """Send everything; returns timings on the first train rank of each engine."""
        started = time.perf_counter()
        size = self._send(trainer.hf_tensors(), version)
        stats = {
            "perf/update_weights_time": time.perf_counter() - started,
            "perf/update_weights_bytes": float(size),
        }
        if self.cfg.debug.check_weight_update_equal:
            self.check_equal(trainer.hf_tensors())
            stats["perf/check_weights_time"] = (
                time.perf_counter() - started - stats["perf/update_weights_time"]
            )
        return stats

    def check_equal(self, tensors: Iterable[NamedTensor]) -> None:
        """Raise unless every engine tensor has the trainer's bits. All train ranks together."""
        dist.barrier()  # other ranks may still be filling their engines
        if self.first:
            check_engines(self.cfg, self.placement.engines, self.all_admins, tensors)
        else:
            for _ in tensors:
                pass

    def reconnect(self, urls: list[str]) -> None:
        """Engines were replaced: speak to the new ones from now on."""
        self._drop()
        self.__init__(self.cfg, self.placement, self.job, urls, self.key)

    def _send(self, tensors: Iterable[NamedTensor], version: int) -> int:
        sender, size = self.sender, 0
        admins = sender.admins if sender else []
        each(admins, begin)
        if isinstance(sender, DistributedSender):
            sender.connect()
        for run in split(tensors, self.limit):
            size += sum(tensor.nbytes for _, tensor in run)
            if sender:
                sender.send(run)
        if sender:
            sender.finish()
        each(admins, lambda admin: end(admin, version))
        return size

    def _tensor_sender(self, urls: list[str]) -> TensorSender:
        mine, group, admin = None, None, None
        self.all_admins = fleet.admins(urls, self.key)
        for spec in self.placement.engines:
            members = [self.placement.train_ranks.index(rank) for rank in spec.ranks]
            # All train ranks make all groups, in one order.
            made = dist.new_group(members, backend="gloo") if len(members) > 1 else None
            if self.job.rank in spec.ranks:
                mine, group = spec, made
                admin = self.all_admins[spec.index] if spec.ranks[0] == self.job.rank else None
        return TensorSender(mine, group, self.job.rank, admin)

    def _distributed_sender(self, urls: list[str]) -> DistributedSender:
        self.all_admins = fleet.admins(urls, self.key)
        backend = "nccl" if engine_args.device_of(self.cfg) == "cuda" else "gloo"
        timeout = timedelta(minutes=self.cfg.placement.distributed_timeout_minutes)
        return DistributedSender(
            self.placement.engines, self.all_admins, self.job.host, backend, timeout
        )

    def _drop(self) -> None:
        if isinstance(self.sender, DistributedSender):
            self.sender.disconnect()


def begin(admin: EngineAdmin) -> None:
    """The engine stops, forgets what it computed with the old weights, and opens itself."""
    admin.pause()
    admin.flush()
    admin.begin_update()


def end(admin: EngineAdmin, version: int) -> None:
    admin.end_update(version)
    reported = admin.version()
    if reported != str(version):
        raise EngineError(
            f"{admin.name} reports weights of version {reported} after version {version} was pushed"
        )
    admin.resume()


def each(admins: list[EngineAdmin], action: Callable[[EngineAdmin], None]) -> None:
    """At once on all engines; raises the first failure."""
    if admins:
        with ThreadPoolExecutor(len(admins)) as pool:
            list(pool.map(action, admins))
