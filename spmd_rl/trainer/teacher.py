"""The teacher of on-policy distillation: log-probs of the student's tokens from another model.

In: a Hugging Face directory, or a torch_dist one of the student's shape. A teacher of that shape is
held on the host and swapped into its place, as the reference model is; one of another shape is a
second model on the same ranks.
Collective over the train ranks. Knows no losses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spmd_rl import architecture
from spmd_rl.config import stored
from spmd_rl.config.schema import Config
from spmd_rl.trainer import checkpoint, model
from spmd_rl.trainer.data import RolloutData
from spmd_rl.trainer.heads import PolicyHead
from spmd_rl.trainer.learner import Learner
from spmd_rl.trainer.parallel import Groups
from spmd_rl.trainer.passes import Passes
from spmd_rl.trainer.reference import Reference
from spmd_rl.weights import export
from spmd_rl.weights.names import NameMap


class Teacher:
    """`opd_teacher_load`, beside its student."""

    def __init__(self, cfg: Config, student: Learner, groups: Groups, device: torch.device):
        assert cfg.algo.opd_teacher_load is not None
        directory = cfg.algo.opd_teacher_load
        self.weights: Reference | None = None
        self.cfg, self.passes = cfg, student.passes
        saved = stored.weights(directory, cfg.algo.opd_teacher_ckpt_step)
        found = student.architecture if saved else architecture.read(directory)
        if architecture.same_shape(found, student.architecture):
            now = Reference(student.chunks)
            if saved:
                learned = checkpoint.Model(student.chunks, None, None)
                checkpoint.load(saved, {"actor": learned}, groups, random=False)
            else:
                student.read(directory)
            self.weights = Reference(student.chunks)
            now.put_back()
            return
        config = model.transformer_config(found, cfg.megatron, groups, device)
        with student.memory.pool():
            own = model.build(found, config, device)
        model.read_weights(directory, export.named_tensors(own), NameMap(found), groups)
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
