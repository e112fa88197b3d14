"""The gap between the engine that sampled and the trainer that learns, and weights that correct for
it.

In: flat [R] log-probs of the same tokens from the trainer (before the update) and from the engine.
Out: per-token weights for the policy loss (applied after clipping, before averaging) and per-token
metrics: multiply by the aggregation weights and add. Sources: TIS https://fengyao.notion.site/off-
policy-rl, IcePop (ring-1t), as in slime.
"""

from __future__ import annotations

import torch
from torch import Tensor


def truncated_weights(
    old_log_probs: Tensor, rollout_log_probs: Tensor, low: float = 0.0, high: float = 2.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """TIS: exp(logp_old - logp_rollout) clamped to [low, high].

    Metrics: tis (unclamped), tis_clipfrac, tis_abs.
    """
    weight = importance_weight(old_log_probs, rollout_log_probs)
    return _corrected(weight, weight.clamp(low, high))


def icepop_weights(
    old_log_probs: Tensor, rollout_log_probs: Tensor, low: float, high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """IcePop: the weight where it lies in [low, high], else 0 (the token is dropped)."""
    weight = importance_weight(old_log_probs, rollout_log_probs)
    return _corrected(weight, torch.where((weight >= low) & (weight <= high), weight, 0.0))


def importance_weight(old_log_probs: Tensor, rollout_log_probs: Tensor) -> Tensor:
    """[R] detached exp(logp_old - logp_rollout)."""
    return torch.exp(old_log_probs.detach().float() - rollout_log_probs.float())


def mismatch_metrics(log_probs: Tensor, rollout_log_probs: Tensor) -> dict[str, Tensor]:
    """Per-token metrics of the gap between trainer and engine: absolute difference and KL(rollout
    || trainer).
    """
    difference = log_probs.detach().float() - rollout_log_probs.float()
    return {
        "train_rollout_logprob_abs_diff": difference.abs(),
        "train_rollout_kl": torch.exp(difference) - 1 - difference,
    }


def _corrected(weight: Tensor, used: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    metrics = {
        "tis": weight,
        "tis_clipfrac": (used != weight).float(),
        "tis_abs": (weight - 1).abs(),
    }
    return used, metrics
