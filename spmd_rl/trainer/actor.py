"""The trainer of one rank: holds its part of the model, turns shards into updates, gives weights
out.

In: the configuration, the placement, then a `Shard` for each rollout. Out: metrics, Hugging Face
tensors, checkpoints. Every method is collective over the train ranks. Knows no engines, no files
but checkpoints, no control plane.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spmd_rl import architecture
from spmd_rl.algo.mismatch import Watch
from spmd_rl.config.schema import Config
from spmd_rl.trainer import (
    advantage,
    checkpoint,
    correction,
    cpu_compat,
    freeze,
    loss,
    mismatch,
    model,
    optimizer,
    parallel,
    replay,
    report,
)
from spmd_rl.trainer.data import Piece, RolloutData
from spmd_rl.trainer.memory import Memory
from spmd_rl.trainer.passes import Passes
from spmd_rl.trainer.reference import Pushed, Reference
from spmd_rl.types import Placement, Shard
from spmd_rl.weights import export, hf
from spmd_rl.weights.names import NameMap


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
        self.memory = Memory(self.device, bool(cfg.placement.offload_train))
        self.start = cfg.model.ref_load or cfg.model.hf_checkpoint
        self.architecture = architecture.read(self.start)
        self.names = NameMap(self.architecture)
        with self.memory.pool():
            self._build(num_steps)
        head = loss.Head(cfg, self.groups, self.architecture.vocab_size)
        self.passes = Passes(self.wrapped, self.groups, head)
        self.replay = replay.of(cfg.algo, self.chunks, self.architecture, self.groups)
        self.reference = Reference(self.chunks) if _needs_reference(cfg) else None
        self.data: RolloutData | None = None
        self.first_rollout: int | None = None
        self.saver = checkpoint.Saver(self.groups, self.device, cfg.checkpoint.async_save)
        self._host_values: list[dict[str, float]] = []
        self.loss = loss.Loss(cfg)
        self.pushed = Pushed(self.chunks) if cfg.algo.keep_old_actor else None
        self.version: int | None = None  # of the last push
        self.watch = Watch(str(self.config.params_dtype).removeprefix("torch."))

    def _build(self, num_steps: int) -> None:
        cfg, groups = self.cfg, self.groups
        self.config = model.transformer_config(self.architecture, cfg.megatron, groups, self.device)
        self.chunks = model.build(self.architecture, self.config, self.device)
        parameters = export.named_parameters(self.chunks)
        model.mark_split(parameters, self.names)
        freeze.apply(parameters, cfg.train, groups)
        self._read(self.start)
        self.wrapped = optimizer.wrap(self.chunks, self.config, cfg.megatron)
        self.optimizer = optimizer.build(self.wrapped, self.config, cfg)
        optimizer.after_steps(self.wrapped)
        self.schedule = optimizer.build_schedule(self.optimizer, cfg, num_steps)

    def describe(self) -> dict[str, Any]:
        """What was built, for the log. Not collective."""
        return {
            "family": self.architecture.family,
            "parameters": hf.count(self.start),
            "dtype": str(self.config.params_dtype).removeprefix("torch."),
            "layers": self.config.transformer_impl,
            "device": str(self.device),
        }

    def load(self, shard: Shard) -> None:
        """Take this rank's shard of the next rollout."""
        self.data = RolloutData(shard, self.cfg, self.groups, self.device)
        self.replay.load(self.data)

    def train(self, rollout: int) -> dict[str, Any]:
        """Log-probs, advantages and the rollout's optimizer steps; metrics over all ranks."""
        assert self.data is not None, "load() comes before train()"
        data, timers = self.data, report.Timers(self.device)
        self.saver.copied()
        cpu_compat.enable(self.device)
        if self.first_rollout is None:
            self.first_rollout = rollout
        with timers.phase("train"):
            if self.cfg.algo.loss_type != "sft_loss":
                self._prepare(data, timers)
            with timers.phase("actor_train"), self.replay.following():
                optimizer.before_steps(self.wrapped)
                steps = [self._step(data, step) for step in range(data.num_steps)]
                optimizer.after_steps(self.wrapped)
        metrics = self._metrics(data, steps, timers, rollout)
        interval = self.cfg.algo.ref_update_interval
        if self.reference is not None and interval and (rollout + 1) % interval == 0:
            self.reference.take()
        self.data = None
        return metrics

    def _prepare(self, data: RolloutData, timers: report.Timers) -> None:
        """Everything a policy loss needs that is computed once a rollout."""
        algo = self.cfg.algo
        if self.reference is not None:
            with timers.phase("ref_log_probs"), self.reference.swapped_in():
                data.ref_log_probs = self.passes.log_probs(data)
        if correction.needs_log_probs(self.cfg, data.num_steps):
            with timers.phase("log_probs"), self._sampling_weights(data), self.replay.choosing():
                data.keep_pass(*self.passes.log_probs_and_entropy(data))
                data.old_log_probs = data.log_probs
        if algo.use_rollout_logprobs:
            data.old_log_probs = data.rollout_log_probs
        if self.groups.last_stage:
            advantage.set_advantages(data, self.cfg, self.groups, self.loss.hooks)
            if algo.use_tis and algo.tis_batch_normalize:
                data.mean_weight = correction.mean_weight(self.cfg, data, self.groups)

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

    def _step(self, data: RolloutData, step: int) -> tuple[dict, dict]:
        """One optimizer step; its metrics on this rank."""
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

        def loss_of(logits: Tensor, piece: Piece) -> loss.Outcome:
            now = self.passes.head(logits, piece)
            data.keep_step(piece, now.log_probs, now.entropy)
            return self.loss(now, piece, data)

        sums, maxima = self.passes.step(data.step(step), loss_of)
        rate = self.optimizer.param_groups[0]["lr"]
        updated, norm, _ = self.optimizer.step()
        if not updated:
            raise RuntimeError(f"optimizer step {step} was skipped: gradients are not finite")
        self.schedule.step(increment=1)
        self._host_values.append({"grad_norm": norm, "lr-pg_0": rate})
        return sums, maxima

    def _metrics(
        self, data: RolloutData, steps: list, timers: report.Timers, rollout: int
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
        for name in self._host_values[0]:
            metrics[f"train/{name}"] = [values[name] for values in self._host_values]
        self._host_values.clear()
        seconds = timers.seconds["actor_train"]
        metrics["perf/actor_train_tok_per_s"] = metrics.pop("tokens") / seconds
        if self.cfg.debug.ci_test and self.cfg.algo.loss_type == "policy_loss":
            assert self.first_rollout is not None
            report.check_gates(metrics, self.cfg, rollout, self.first_rollout)
        return metrics | replayed | timers.metrics()

    def hf_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor), streamed in one order; every rank sees each."""
        yield from export.hf_tensors(self.chunks, self.names, self.groups)

    def save_hf(self, directory: str | Path) -> None:
        """A checkpoint that transformers loads. Train rank 0 writes; all take part."""
        if dist.get_rank() == 0:
            template = self.cfg.model.hf_checkpoint
            hf.save(directory, self.hf_tensors(), template, self.config.params_dtype)
        else:
            for _ in self.hf_tensors():
                pass
        dist.barrier()

    def begin_save(self, directory: str | Path) -> None:
        """Start to save weights, optimizer, schedule and random state, while engines generate."""
        wanted = self.cfg.checkpoint
        optimizer = None if wanted.no_save_optim else self.optimizer
        random = not wanted.no_save_rng
        self.saver.begin(directory, self.chunks, optimizer, self.schedule, random)

    def finish_save(self) -> dict[str, Any]:
        """The end of the save begun last, when all is on disk; see checkpoint.Saver.finish."""
        return self.saver.finish()

    def load_checkpoint(
        self, directory: str | Path, optimizer: bool = True, random: bool = True
    ) -> None:
        """Weights and, as wanted, the optimizer with its schedule, and the random state."""
        self.saver.copied()
        kept = self.optimizer if optimizer else None
        checkpoint.load(directory, self.chunks, kept, self.schedule, self.groups, random)
        if kept is None:
            self.optimizer.reload_model_params()

    def load_weights(self, directory: str | Path) -> None:
        """First weights from another Hugging Face directory than the reference model's."""
        self._read(directory)
        self.optimizer.reload_model_params()

    def _read(self, directory: str | Path) -> None:
        """This rank's part of a Hugging Face directory's weights."""
        groups = self.groups
        hf.load(
            directory,
            export.named_tensors(self.chunks),
            self.names,
            (groups.tp_rank, groups.tp_size),
            (groups.etp_rank, groups.etp_size),
        )

    def offload(self) -> None:
        """Give device memory back while engines generate."""
        self.saver.copied()
        self.memory.offload()

    def onload(self) -> None:
        self.memory.onload()


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
