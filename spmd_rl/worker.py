"""What a rank can be told to do. Rank 0 does its own share of every command too.

Commands carry names and plain values; tensors move inside them through process groups. Heavy
packages are imported inside the commands that need them: a rollout-only rank never imports
megatron-core.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spmd_rl import control
from spmd_rl.batch.plan import plan_batch
from spmd_rl.config import Config
from spmd_rl.control import Job, command
from spmd_rl.rollout import engine_args
from spmd_rl.rollout.engines import EngineHost
from spmd_rl.types import Batch, Placement

ENGINES = "engines"  # what the key that engines and router ask for is made for


class Worker:
    """One rank's part of the job: the engines it is the parent of, and its share of the trainer."""

    def __init__(self, cfg: Config, placement: Placement, job: Job, run_dir: Path):
        self.cfg, self.placement, self.job, self.run_dir = cfg, placement, job, run_dir
        self.trains = job.rank in placement.train_ranks
        self.host: EngineHost | None = None
        self.version: int | None = None  # the last that was pushed

    @command
    def launch_engines(self) -> None:
        """Start this node's engines; returns at once, they come up while the trainer is built.

        Where an engine sizes its cache by the memory that it finds free, it starts only after the
        trainer that shares its GPU has been built and put aside: in `engines_ready`.
        """
        teacher = self.placement.teacher
        every = (*self.placement.engines, *([teacher] if teacher else []))
        specs = [spec for spec in every if spec.host_rank == self.job.rank]
        if specs:
            key = self.job.secret.key(ENGINES)
            self.notices = control.Notices(self.job)
            self.host = EngineHost(self.cfg, specs, self.run_dir, self.job, key, self.engine_ended)
            if not engine_args.after_trainer(self.cfg):
                self.host.launch()

    @command
    def build_trainer(
        self, num_steps: int, checkpoint: str | None, take: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Join the training ranks, build the model, take its weights or a checkpoint.

        `take`: whether its `optimizer` and `random` state too; a directory of first `weights`.
        """
        if not self.trains:
            return {}
        from spmd_rl.batch.ship import Shipping
        from spmd_rl.trainer.actor import Trainer
        from spmd_rl.trainer.parallel import backend

        timeout = 60.0 * self.cfg.placement.distributed_timeout_minutes
        self.job.train_group(self.placement.train_ranks, backend(self.cfg), timeout)
        self.trainer = Trainer(self.cfg, self.placement, self.job.rank, num_steps)
        self.shipping = Shipping(self.placement, self.job.rank, None)
        if take["weights"]:
            self.trainer.load_weights(take["weights"])
        if checkpoint:
            self.trainer.load_checkpoint(checkpoint, take["optimizer"], take["random"])
        self.trainer.offload()
        return self.trainer.describe()

    @command
    def engines_ready(self) -> list[tuple[int, str]]:
        """(index, URL) of this node's engines, once they answer."""
        if self.host is None:
            return []
        if engine_args.after_trainer(self.cfg):
            self.host.launch()
        return self.host.wait_ready()

    def engine_ended(self, index: int, text: str) -> None:
        """An engine of this node ended by itself: the cause of whatever else is seen of it. Called
        by the host's own thread."""
        assert self.host is not None
        mended = self.cfg.rollout.use_fault_tolerance and not self.host.engines[index].spec.teacher
        if mended:
            self.notices.post([index, self.host.engines[index].starts, text])
        else:
            self.job.fail(text)

    @command
    def restart_engines(self, starts: dict[int, int]) -> dict[int, str]:
        """Start these engines of this node again (`starts`: how often each was), on memory the
        trainer does not hold. Returns why some did not come up.
        """
        if self.trains:
            self.trainer.offload()
            self.pusher.renew(list(starts))
        return self.host.restart(starts) if self.host else {}

    @command
    def connect(self, urls: list[str]) -> None:
        """Tell the train ranks where the engines are, for weight pushes."""
        if self.trains:
            from spmd_rl.weights.push import Pusher

            key = self.job.secret.key(ENGINES)
            self.pusher = Pusher(self.cfg, self.placement, self.job, urls, key)

    @command
    def train(self, rollout: int, batch: Batch | None = None) -> dict[str, Any]:
        """Take this rank's shard of the batch, which rank 0 has, and do the rollout's steps."""
        if not self.trains:
            return {}
        plans = None if batch is None else plan_batch(batch, self.cfg, self.placement)
        shard = self.shipping.hand_out(batch, plans)
        self.trainer.onload()
        self.trainer.load(shard)
        return self.trainer.train(rollout)

    @command
    def push_weights(self, version: int, engines: list[int]) -> dict[str, dict]:
        """Give these engines this version; the trainer's memory is theirs afterwards. They stay
        paused. Returns `stats`, and why engines `failed`; without use_fault_tolerance that is
        raised.
        """
        if not self.trains:
            return {}
        self.trainer.onload()
        stats, failed = self.pusher.push(self.trainer, version, engines)
        if failed and not self.cfg.rollout.use_fault_tolerance:
            raise next(iter(failed.values()))
        if version != self.version:  # else it goes to engines that were started again
            self.trainer.weights_pushed(version)
        self.version = version
        self.trainer.offload()
        control.give_back()
        return {"stats": stats, "failed": {index: str(why) for index, why in failed.items()}}

    @command
    def count_push(self, version: int) -> None:
        """The run whose rollouts are trained on again pushed here."""
        if self.trains:
            self.trainer.onload()
            self.trainer.weights_pushed(version)
            self.trainer.offload()

    @command
    def begin_save(self, path: str) -> None:
        """Copy this rank's share of a checkpoint and start to write it."""
        if self.trains:
            self.trainer.onload()
            self.trainer.begin_save(path)

    @command
    def saving(self) -> bool:
        """Whether this rank's share is still being written."""
        return self.trains and self.trainer.saver.writing

    @command
    def finish_save(self) -> dict[str, Any]:
        """Wait until all shares are on disk; how it went (empty where nothing is trained)."""
        return self.trainer.finish_save() if self.trains else {}

    @command
    def save_hf(self, path: str) -> None:
        if self.trains:
            self.trainer.onload()
            self.trainer.save_hf(path)

    @command
    def close(self) -> None:
        if self.host:
            self.host.stop()
