"""A model that learns: this rank's part of it with its optimizer and schedule.

In: a configuration of which `model`, `train` and `megatron` are read, and micro-batches. Out:
numbers of response tokens, optimizer steps, Hugging Face tensors. The actor is one and, with
algo.advantage_estimator ppo, the critic another. Every method is collective over the train ranks.
Knows no losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spmd_rl import architecture
from spmd_rl.config.schema import Config
from spmd_rl.trainer import freeze, model, optimizer
from spmd_rl.trainer.data import Piece
from spmd_rl.trainer.heads import PolicyHead, ValueHead
from spmd_rl.trainer.memory import Memory
from spmd_rl.trainer.parallel import Groups
from spmd_rl.trainer.passes import Passes
from spmd_rl.weights import export, hf
from spmd_rl.weights.names import VALUE_LAYER, NameMap


class Learner:
    """`values`: a value layer stands in place of the output layer (see model.ValueLayer)."""

    def __init__(
        self,
        cfg: Config,
        groups: Groups,
        device: torch.device,
        num_steps: int,
        values: bool = False,
    ):
        self.groups, self.values = groups, values
        self.name = "critic" if values else "actor"
        self.memory = Memory(device, bool(cfg.placement.offload_train), self.name)
        self.start = cfg.model.ref_load or cfg.model.hf_checkpoint
        self.architecture = architecture.read(self.start)
        self.names = NameMap(self.architecture, values)
        with self.memory.pool():
            self._build(cfg, device, num_steps)
        head = PolicyHead(cfg, groups, self.architecture.vocab_size)
        self.passes = Passes(self.wrapped, groups, ValueHead(groups) if values else head)
        self._numbers: list[dict[str, float]] = []  # of the steps since they were asked for

    def _build(self, cfg: Config, device: torch.device, num_steps: int) -> None:
        self.config = model.transformer_config(self.architecture, cfg.megatron, self.groups, device)
        seed = cfg.train.seed if self.values else None
        self.chunks = model.build(self.architecture, self.config, device, seed)
        parameters = export.named_parameters(self.chunks)
        model.mark_split(parameters, self.names)
        freeze.apply(parameters, cfg.train, self.groups, self.values)
        self.read(self.start)
        self.wrapped = optimizer.wrap(self.chunks, self.config, cfg.megatron)
        self.optimizer = optimizer.build(self.wrapped, self.config, cfg)
        optimizer.after_steps(self.wrapped)
        self.schedule = optimizer.build_schedule(self.optimizer, cfg, num_steps)

    def steps(
        self, pieces: list[list[Piece]], loss: Callable[[Any, Piece], Any]
    ) -> list[tuple[dict, dict]]:
        """An optimizer step for each list of micro-batches; (sums, maxima) of each for metrics."""
        optimizer.before_steps(self.wrapped)
        found = [self._step(step, mine, loss) for step, mine in enumerate(pieces)]
        optimizer.after_steps(self.wrapped)
        return found

    def _step(
        self, step: int, pieces: list[Piece], loss: Callable[[Any, Piece], Any]
    ) -> tuple[dict, dict]:
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums, maxima = self.passes.step(pieces, loss)
        rate = self.optimizer.param_groups[0]["lr"]
        updated, norm, _ = self.optimizer.step()
        if not updated:
            raise RuntimeError(
                f"optimizer step {step} of the {self.name} was skipped: gradients are not finite"
            )
        self.schedule.step(increment=1)
        self._numbers.append({"grad_norm": norm, "lr-pg_0": rate})
        return sums, maxima

    def numbers(self) -> dict[str, list[float]]:
        """Gradient norm and learning rate of each step since the last call."""
        taken, self._numbers = self._numbers, []
        return {name: [step[name] for step in taken] for name in (taken[0] if taken else ())}

    def hf_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor), streamed in one order; every rank sees each."""
        yield from export.hf_tensors(self.chunks, self.names, self.groups)

    def load_weights(self, directory: str | Path) -> None:
        """Other first weights, from a Hugging Face directory."""
        self.read(directory)
        self.optimizer.reload_model_params()

    def read(self, directory: str | Path) -> None:
        """This rank's part of a Hugging Face directory's weights. A value layer that it does not
        hold stays as it is."""
        held = hf.tensor_names(directory) if self.values else ()
        tensors = (
            (name, tensor)
            for name, tensor in export.named_tensors(self.chunks)
            if not self.values
            or name not in VALUE_LAYER
            or self.names.entry(name).hf_names[0] in held
        )
        model.read_weights(directory, tensors, self.names, self.groups)
