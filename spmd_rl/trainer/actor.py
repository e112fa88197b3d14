"""The trainer of one rank: holds its part of the models, turns shards into updates, gives weights
out.

In: the configuration, the placement, then a `Shard` for each rollout. Out: metrics, Hugging Face
tensors, checkpoints. Every method is collective over the train ranks. Knows no engines, no files
but checkpoints, no control plane.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spmd_rl.algo.mismatch import Watch
from spmd_rl.config.schema import Config
from spmd_rl.trainer import (
    advantage,
    checkpoint,
    correction,
    cpu_compat,
    critic,
    custom,
    dump,
    loss,
    mismatch,
    parallel,
    replay,
    report,
)
from spmd_rl.trainer.data import Piece, RolloutData
from spmd_rl.trainer.heads import LogProbs
from spmd_rl.trainer.learner import Learner
from spmd_rl.trainer.reference import Pushed, Reference
from spmd_rl.trainer.teacher import Teacher
from spmd_rl.types import Placement, Shard
from spmd_rl.weights import hf

Steps = list[tuple[dict[str, Tensor], dict[str, Tensor]]]  # (sums, maxima) of each


class Trainer:
    """Built once torch.distributed is initialised over the train ranks only."""

    def __init__(
        self,
        cfg: Config,
        placement: Placement,
        rank: int,
        num_steps: int,
        device: torch.device | None = None,
    ):
        self.cfg, self.placement, self.rank = cfg, placement, rank
        self.device = device or _device(cfg, placement, rank)
        cpu_compat.enable(self.device)
        if cfg.train.deterministic:
            torch.use_deterministic_algorithms(True)
        self.groups = parallel.initialise(placement, cfg.megatron, cfg.train.seed)
        self.actor = Learner(cfg, self.groups, self.device, num_steps - _critic_only(cfg))
        self.critic: Learner | None = None
        if cfg.use_critic:
            self.actor.memory.offload()  # room for the critic's first weights
            theirs = critic.config_of(cfg)
            self.critic = Learner(theirs, self.groups, self.device, num_steps, values=True)
            self.critic.memory.offload()
            self.actor.memory.onload()
        actor = self.actor
        self.replay = replay.of(cfg.algo, actor.chunks, actor.architecture, self.groups)
        self.reference = Reference(self.actor.chunks) if _needs_reference(cfg) else None
        self.teacher = None
        if cfg.algo.use_opd and cfg.algo.opd_type == "megatron":
            self.teacher = Teacher(cfg, self.actor, self.groups, self.device)
        self.data: RolloutData | None = None
        self.first_rollout: int | None = None  # the first in which the actor learned
        self.saver = checkpoint.Saver(self.groups, self.device, cfg.checkpoint.async_save)
        self.loss = loss.Loss(cfg)
        self.pushed = Pushed(self.actor.chunks) if cfg.algo.keep_old_actor else None
        self.version: int | None = None  # of the last push
        self.watch = Watch(self._dtype, cfg.rollout.partial_rollout)

    def describe(self) -> dict[str, Any]:
        """What was built, for the log. Not collective."""
        found = {
            "family": self.actor.architecture.family,
            "parameters": hf.count(self.actor.start),
            "dtype": self._dtype,
            "layers": self.actor.config.transformer_impl,
            "device": str(self.device),
        }
        return found | ({"critic": self.critic.start} if self.critic else {})

    @property
    def _dtype(self) -> str:
        return str(self.actor.config.params_dtype).removeprefix("torch.")

    def load(self, shard: Shard) -> None:
        """Take this rank's shard of the next rollout."""
        self.data = RolloutData(shard, self.cfg, self.groups, self.device)
        self.replay.load(self.data)

    def train(self, rollout: int) -> dict[str, Any]:
        """Log-probs, values, advantages and the rollout's optimizer steps; metrics over all
        ranks.
        """
        assert self.data is not None, "load() comes before train()"
        data, timers, algo = self.data, report.Timers(self.device), self.cfg.algo
        self.saver.copied()
        cpu_compat.enable(self.device)
        learns = self.critic is None or rollout >= algo.num_critic_only_steps
        if learns and self.first_rollout is None:
            self.first_rollout = rollout
        steps: list[Steps] = []
        with timers.phase("train"):
            if algo.loss_type != "sft_loss":
                self._log_probs(data, timers)
            if self.critic is not None:
                with self._critics_turn():
                    steps.append(self._train_critic(self.critic, data, timers, rollout))
            else:
                self._advantages(data, rollout)
            if learns:
                with timers.phase("actor_train"), self.replay.following():
                    steps.append(self.actor.steps(data.steps(), partial(self._loss_of, data)))
        metrics = self._metrics(data, _merged(steps), timers, rollout)
        interval = algo.ref_update_interval
        if self.reference is not None and interval and (rollout + 1) % interval == 0:
            self.reference.take()
        dump.save(self.cfg, rollout, self.rank, data)
        self.data = None
        return metrics

    def _log_probs(self, data: RolloutData, timers: report.Timers) -> None:
        """Those that a policy loss needs and that are computed once a rollout."""
        algo = self.cfg.algo
        if self.reference is not None:
            with timers.phase("ref_log_probs"), self.reference.swapped_in():
                data.ref_log_probs, _ = self.actor.passes.forward(data)
        if self.teacher is not None:
            with timers.phase("teacher_log_probs"):
                data.teacher_log_probs = self.teacher.log_probs(data)
        if correction.needs_log_probs(self.cfg, data.num_steps):
            with timers.phase("log_probs"), self._sampling_weights(data), self.replay.choosing():
                data.keep_pass(*self.actor.passes.forward(data))
                data.old_log_probs = data.log_probs
        if algo.use_rollout_logprobs:
            data.old_log_probs = data.rollout_log_probs

    def _advantages(self, data: RolloutData, rollout: int) -> None:
        """Those of the rollout, and the user's last look at it."""
        if self.groups.last_stage:
            learns_rewards = self.cfg.algo.loss_type != "sft_loss"
            if learns_rewards:
                advantage.set_advantages(data, self.cfg, self.groups, self.loss.hooks)
            custom.postprocess(self.loss.hooks, self.cfg, rollout, data)
            if learns_rewards and self.cfg.algo.use_tis and self.cfg.algo.tis_batch_normalize:
                data.mean_weight = correction.mean_weight(self.cfg, data, self.groups)

    def _train_critic(
        self, learner: Learner, data: RolloutData, timers: report.Timers, rollout: int
    ) -> Steps:
        """Values of the rollout, advantages from them, and the critic's steps."""
        with timers.phase("values"):
            (data.values,) = learner.passes.forward(data)
        self._advantages(data, rollout)
        with timers.phase("critic_train"):
            return learner.steps(data.steps(), partial(critic.value_loss, self.cfg, data))

    @contextlib.contextmanager
    def _critics_turn(self) -> Iterator[None]:
        """With placement.offload_train only one of the two models is on the device at a time."""
        assert self.critic is not None
        self.actor.memory.offload()
        self.critic.memory.onload()
        yield
        self.critic.memory.offload()
        self.actor.memory.onload()

    def _sampling_weights(self, data: RolloutData) -> contextlib.AbstractContextManager[None]:
        """The model is the one that sampled, as far as `keep_old_actor` says so."""
        if self.pushed is None:
            return contextlib.nullcontext()
        return self.pushed.swapped_in(data.shard.batch.weight_versions, self.groups)

    def weights_pushed(self, version: int) -> None:
        """The engines have these weights now, under this version."""
        self.version = version
        if self.pushed is not None:
            self.pushed.keep(version)

    def _loss_of(self, data: RolloutData, now: LogProbs, piece: Piece) -> loss.Outcome:
        data.keep_step(piece, now.log_probs, now.entropy)
        return self.loss(now, piece, data)

    def _metrics(
        self, data: RolloutData, steps: Steps, timers: report.Timers, rollout: int
    ) -> dict[str, Any]:
        metrics: dict[str, Any] = {}
        replayed = self.replay.metrics()
        if self.groups.last_stage:
            metrics = report.collect(data, steps, self.groups)
            if self.cfg.algo.loss_type != "sft_loss":
                temperature = self.cfg.rollout.rollout_temperature
                metrics |= mismatch.report(data, self.watch, self.groups, self.version, temperature)
        if self.groups.pp_size > 1:
            box = [metrics]
            last = dist.get_process_group_ranks(self.groups.pp)[-1]
            dist.broadcast_object_list(box, src=last, group=self.groups.pp)
            metrics = box[0]
        for learner in self._learners():
            prefix = critic.PREFIX if learner.values else ""
            metrics |= {f"train/{prefix}{k}": v for k, v in learner.numbers().items()}
        tokens, seconds = metrics.pop("tokens"), timers.seconds.get("actor_train")
        if seconds:
            metrics["perf/actor_train_tok_per_s"] = tokens / seconds
            if self.cfg.debug.ci_test and self.cfg.algo.loss_type == "policy_loss":
                assert self.first_rollout is not None
                report.check_gates(metrics, self.cfg, rollout, self.first_rollout)
        return metrics | replayed | timers.metrics()

    def hf_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor), streamed in one order; every rank sees each."""
        yield from self.actor.hf_tensors()

    def save_hf(self, directory: str | Path) -> None:
        """A checkpoint that transformers loads. Train rank 0 writes; all take part."""
        if dist.get_rank() == 0:
            template = self.cfg.model.hf_checkpoint
            hf.save(directory, self.hf_tensors(), template, self.actor.config.params_dtype)
        else:
            for _ in self.hf_tensors():
                pass
        dist.barrier()

    def begin_save(self, directory: str | Path) -> None:
        """Start to save weights, optimizers, schedules and random state, while engines generate."""
        wanted = self.cfg.checkpoint
        self._onload_all()
        models = self._stored(not wanted.no_save_optim)
        self.saver.begin(directory, models, not wanted.no_save_rng, self._moving_reference())

    def finish_save(self) -> dict[str, Any]:
        """The end of the save begun last, when all is on disk; see checkpoint.Saver.finish."""
        return self.saver.finish()

    def load_checkpoint(
        self, directory: str | Path, optimizer: bool = True, random: bool = True
    ) -> None:
        """Weights and, as wanted, the optimizers with their schedules, and the random state."""
        self.saver.copied()
        self._onload_all()
        # Weights alone begin another run, whose reference has not moved yet.
        reference = self._moving_reference() if optimizer or random else None
        checkpoint.load(directory, self._stored(optimizer), self.groups, random, reference)
        if not optimizer:
            for learner in self._learners():
                learner.optimizer.reload_model_params()

    def load_weights(self, directory: str | Path) -> None:
        """First weights from another Hugging Face directory than the reference model's."""
        self._onload_all()
        self.actor.load_weights(directory)
        if self.critic is not None and not self.cfg.model.critic_load:
            self.critic.load_weights(directory)

    def _learners(self) -> list[Learner]:
        return [self.actor, *([self.critic] if self.critic else [])]

    def _stored(self, optimizer: bool) -> dict[str, checkpoint.Model]:
        return {
            it.name: checkpoint.Model(it.chunks, it.optimizer if optimizer else None, it.schedule)
            for it in self._learners()
        }

    def _moving_reference(self) -> Reference | None:
        return self.reference if self.cfg.algo.ref_update_interval else None

    def offload(self) -> None:
        """Give device memory back while engines generate."""
        self.saver.copied()
        for learner in self._learners():
            learner.memory.offload()

    def onload(self) -> None:
        """Take memory for the actor; the critic has it in turn."""
        if self.critic is not None and self.critic.memory.saver is not None:
            self.saver.copied()
            self.critic.memory.offload()
        self.actor.memory.onload()

    def _onload_all(self) -> None:
        """Both models, until the next offload() or onload()."""
        for learner in self._learners():
            learner.memory.onload()


def _device(cfg: Config, placement: Placement, rank: int) -> torch.device:
    wanted = cfg.placement.device
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    device = torch.device("cuda", rank % placement.ranks_per_node)
    torch.cuda.set_device(device)
    return device


def _needs_reference(cfg: Config) -> bool:
    algo = cfg.algo
    return algo.loss_type != "sft_loss" and (algo.use_kl_loss or algo.kl_coef != 0)


def _critic_only(cfg: Config) -> int:
    """Optimizer steps that only the critic takes; the actor's schedule is shorter by them."""
    if not cfg.use_critic:
        return 0
    return cfg.algo.num_critic_only_steps * (cfg.rollout.num_steps_per_rollout or 1)


def _merged(steps: list[Steps]) -> Steps:
    """Of each step what all models say."""
    return [
        (
            {k: v for sums, _ in of for k, v in sums.items()},
            {k: v for _, maxima in of for k, v in maxima.items()},
        )
        for of in zip(*steps, strict=True)
    ]
