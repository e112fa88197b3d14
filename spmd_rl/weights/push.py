"""A push: the trainer's weights become every engine's, under a new version.

Comes in: the trainer's full tensors under their Hugging Face names, which all train ranks iterate
together, and the engines' addresses. Goes out: seconds and bytes. Order: pause, flush, begin,
buckets, end with the version; afterwards each engine must report the version, and on request every
tensor must have the trainer's bits. Engines stay paused: who woke them resumes them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import timedelta

import torch.distributed as dist

from spmd_rl.config import Config
from spmd_rl.rollout import engine_args, fleet
from spmd_rl.rollout.admin import EngineError
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
        self.admins = fleet.admins(urls, key)
        if placement.colocate:
            self.sender = self._tensor_sender()
        else:
            self.sender = self._distributed_sender() if self.first else None

    def push(
        self, trainer, version: int, engines: list[int] | None = None
    ) -> tuple[dict[str, float], dict[int, EngineError]]:
        """Send everything to these engines, all by default, which stay paused.

        Returns timings, on the first train rank of each engine, and what went wrong with which
        engine. That ends nobody's part in the push: all train ranks export the tensors together.
        """
        chosen = [spec.index for spec in self.placement.engines]
        chosen = chosen if engines is None else engines
        started = time.perf_counter()
        size, failed = self._send(trainer.hf_tensors(), version, chosen)
        stats = {
            "perf/update_weights_time": time.perf_counter() - started,
            "perf/update_weights_bytes": float(size),
        }
        if self.cfg.debug.check_weight_update_equal:
            failed |= self.check_equal(trainer.hf_tensors(), chosen)
            stats["perf/check_weights_time"] = (
                time.perf_counter() - started - stats["perf/update_weights_time"]
            )
        return stats, failed

    def check_equal(
        self, tensors: Iterable[NamedTensor], engines: list[int] | None = None
    ) -> dict[int, EngineError]:
        """Raise unless every tensor of these engines has the trainer's bits. All train ranks
        together. Returns what went wrong with engines that could not be asked.
        """
        dist.barrier()  # other ranks may still be filling their engines
        if self.first:
            specs = [s for s in self.placement.engines if engines is None or s.index in engines]
            return check_engines(self.cfg, specs, self.admins, tensors)
        for _ in tensors:
            pass
        return {}

    def renew(self, engines: list[int]) -> None:
        """These engines were started again: what was known of them is void."""
        for index in engines:
            self.admins[index].renew()
        if isinstance(self.sender, DistributedSender):
            self.sender.renew(engines)

    def _send(
        self, tensors: Iterable[NamedTensor], version: int, engines: list[int]
    ) -> tuple[int, dict[int, EngineError]]:
        sender, size = self.sender, 0
        if sender:
            sender.open(engines)
        for run in split(tensors, self.limit):
            size += sum(tensor.nbytes for _, tensor in run)
            if sender:
                sender.send(run)
        return size, sender.close(version) if sender else {}

    def _tensor_sender(self) -> TensorSender:
        mine, group, admin = None, None, None
        for spec in self.placement.engines:
            members = [self.placement.train_ranks.index(rank) for rank in spec.ranks]
            # All train ranks make all groups, in one order.
            made = dist.new_group(members, backend="gloo") if len(members) > 1 else None
            if self.job.rank in spec.ranks:
                mine, group = spec, made
                admin = self.admins[spec.index] if spec.ranks[0] == self.job.rank else None
        return TensorSender(mine, group, self.job.rank, admin)

    def _distributed_sender(self) -> DistributedSender:
        backend = "nccl" if engine_args.device_of(self.cfg) == "cuda" else "gloo"
        timeout = timedelta(minutes=self.cfg.placement.distributed_timeout_minutes)
        return DistributedSender(
            self.placement.engines, self.admins, self.job.host, backend, timeout
        )
