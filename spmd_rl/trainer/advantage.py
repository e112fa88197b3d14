"""Advantages of a rollout, once, before its optimizer steps.

In: the rollout's columns with the log-probs (and values) that the algorithm needs. Out:
`data.advantages` and `data.returns` set. The order: KL, estimator (or the user's function),
distillation, whitening. Collective over data-parallel ranks; runs on the last pipeline stage.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from spmd_rl.algo.advantages import advantages, gae, whiten, whitening_sums
from spmd_rl.algo.distill import distill
from spmd_rl.algo.kl import kl
from spmd_rl.config.schema import Config
from spmd_rl.trainer import custom
from spmd_rl.trainer.data import RolloutData
from spmd_rl.trainer.parallel import Groups


def set_advantages(data: RolloutData, cfg: Config, groups: Groups, hooks: custom.Hooks) -> None:
    algo, divergence = cfg.algo, _divergence(data, cfg)
    if hooks.advantage is not None:
        found, data.returns = custom.advantages(hooks, cfg, data, divergence)
    elif algo.advantage_estimator == "ppo":
        assert data.values is not None
        shaped = -algo.kl_coef * divergence
        found, data.returns = gae(
            data.rewards,
            data.values,
            data.response_lengths,
            shaped,
            gamma=algo.gamma,
            lam=algo.lambd,
        )
    else:
        found = advantages(
            algo.advantage_estimator,
            data.rewards,
            data.response_lengths,
            data.mask,
            divergence,
            kl_coef=algo.kl_coef,
            gamma=algo.gamma,
        )
    if algo.use_opd:
        student, teacher = data.old_log_probs, data.teacher_log_probs
        assert student is not None and teacher is not None
        found, data.opd_reverse_kl = distill(found, student, teacher, algo.opd_kl_coef)
    if algo.normalize_advantages:
        sums = whitening_sums(found, data.mask)
        if groups.dp_size > 1:
            dist.all_reduce(sums, group=groups.dp)
        found = whiten(found, sums)
    data.advantages = found


def _divergence(data: RolloutData, cfg: Config) -> Tensor:
    """[R] from the reference; zeros where kl_coef is 0."""
    algo = cfg.algo
    if not algo.kl_coef:
        return torch.zeros_like(data.mask)
    assert data.old_log_probs is not None and data.ref_log_probs is not None
    return kl(data.old_log_probs, data.ref_log_probs, algo.kl_loss_type)
