"""The teacher of on-policy distillation: log-probs of the student's tokens from another model.

In: a Hugging Face directory. A teacher of the student's shape is held on the host and swapped into
its place, as the reference model is; one of another shape is a second model on the same ranks.
Collective over the train ranks. Knows no losses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spmd_rl import architecture
from spmd_rl.architecture import Architecture
from spmd_rl.config.schema import Config
from spmd_rl.trainer import model
from spmd_rl.trainer.data import RolloutData
from spmd_rl.trainer.heads import PolicyHead
from spmd_rl.trainer.learner import Learner
from spmd_rl.trainer.parallel import Groups
from spmd_rl.trainer.passes import Passes
from spmd_rl.trainer.reference import Reference
from spmd_rl.weights import export, hf
from spmd_rl.weights.names import NameMap


class Teacher:
    """`opd_teacher_load`, beside its student."""

    def __init__(self, cfg: Config, student: Learner, groups: Groups, device: torch.device):
        assert cfg.algo.opd_teacher_load is not None
        directory = cfg.algo.opd_teacher_load
        found = architecture.read(directory)
        self.weights: Reference | None = None
        self.cfg, self.passes = cfg, student.passes
        if same_shape(found, student.architecture):
            now = Reference(student.chunks)
            _read(directory, student.chunks, found, groups)
            self.weights = Reference(student.chunks)
            now.put_back()
            return
        config = model.transformer_config(found, cfg.megatron, groups, device)
        with student.memory.pool():
            own = model.build(found, config, device)
        _read(directory, own, found, groups)
        for chunk in own:
            chunk.requires_grad_(False)
        self.passes = Passes(own, groups, PolicyHead(cfg, groups, found.vocab_size))

    def log_probs(self, data: RolloutData) -> Tensor:
        """[R] of the shard's response tokens (zeros on stages before the last)."""
        if self.weights is None:  # micro-batches of its own: they cache what suits one model
            own = RolloutData(data.shard, self.cfg, data.groups, data.device)
            return self.passes.forward(own)[0]
        with self.weights.swapped_in():
            return self.passes.forward(data)[0]


def same_shape(one: Architecture, other: Architecture) -> bool:
    """Whether the weights of one fit into the other, and mean the same there."""
    return all(
        getattr(one, name) == getattr(other, name)
        for name in ("family", "vocab_size", "tied", "rope", "transformer", "post_norms")
    )


def _read(directory: str, chunks: list[Any], found: Architecture, groups: Groups) -> None:
    split, experts = (groups.tp_rank, groups.tp_size), (groups.etp_rank, groups.etp_size)
    hf.load(directory, export.named_tensors(chunks), NameMap(found), split, experts)
