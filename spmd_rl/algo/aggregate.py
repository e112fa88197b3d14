"""From losses of tokens to the loss of an optimizer step, exactly the same under any split over
micro-batches and ranks.

Each response token gets a weight from numbers known when the step is planned, and the step's loss
is the plain sum of weight times token loss over every micro-batch of every rank. Metrics average
with the same weights.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_weights(
    mask: Tensor,
    sample_ids: Tensor,
    mask_totals: Tensor,
    num_rollouts: Tensor | int,
    num_tokens: Tensor | int,
    per_token: bool = False,
) -> Tensor:
    """[R] float32 weights.

    Per sample (default): mask / (mask total over the sample's siblings * rollouts in the step), so
    every rollout counts the same. Per token (`calculate_per_token_loss`): mask / tokens in the
    step. `mask_totals` [n] are at least 1; `num_rollouts` and `num_tokens` are of the step, or [n]
    of each sample's step.
    """
    if per_token:
        count = torch.as_tensor(num_tokens, device=mask.device).expand(len(mask_totals))
    else:
        count = mask_totals * torch.as_tensor(num_rollouts, device=mask.device)
    return (mask.double() / count.double()[sample_ids]).float()


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """Sum of weights * values; a masked token's inf or nan does not spread."""
    return (weights * torch.where(weights > 0, values, 0.0)).sum()


def objective(
    policy: Tensor,
    weights: Tensor,
    *,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    kl: Tensor | None = None,
    kl_loss_coef: float = 0.0,
) -> Tensor:
    """policy - entropy_coef * mean entropy + kl_loss_coef * mean kl, with gradient; `policy` is a
    scalar, the means are sums with the weights.
    """
    if entropy is not None and entropy_coef:
        policy = policy - entropy_coef * weighted_sum(weights, entropy)
    if kl is not None and kl_loss_coef:
        policy = policy + kl_loss_coef * weighted_sum(weights, kl)
    return policy
