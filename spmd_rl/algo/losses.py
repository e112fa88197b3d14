"""Loss of each response token, before any averaging. Flat [R] in, flat [R] out; weights come from
`aggregate`.

`log_ratio` here is logp_old - logp (slime's `ppo_kl`), so the probability ratio is exp(-log_ratio).
Gradients flow through `log_probs`, `entropy` and `values` only. Sources: PPO 1707.06347, dual clip
1912.09729, GSPO 2507.18071, CISPO 2506.13585; formulas as in slime's `loss.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from spmd_rl.algo.segments import segment_mean, segment_sum


class TokenLoss(NamedTuple):
    loss: Tensor  # [R] with gradient
    clipped: Tensor  # [R] 0/1: clipping changed the loss of this token
    log_ratio: Tensor  # [R] detached; its mean is the metric ppo_kl
    ratio: Tensor  # [R] detached probability ratio


def policy_loss(
    estimator: str,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantage: Tensor,
    *,
    eps_clip: float = 0.2,
    eps_clip_high: float | None = None,
    eps_clip_c: float | None = None,
    mask: Tensor | None = None,
    sample_ids: Tensor | None = None,
    num_samples: int = 0,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> TokenLoss:
    """The estimator's policy loss of each token.

    `mask` [R]: masked tokens get ratio 1, so that nothing of theirs can overflow; gspo needs it.
    `sample_ids`, `num_samples` and `reduce` are for gspo: see `sequence_log_ratio`.
    """
    high = eps_clip if eps_clip_high is None else eps_clip_high
    log_ratio = old_log_probs.float() - log_probs.float()
    if mask is not None:
        log_ratio = torch.where(mask > 0, log_ratio, 0.0)
    if estimator == "cispo":
        return cispo(log_probs.float(), log_ratio, advantage, eps_clip, high)
    if estimator == "gspo":
        assert mask is not None and sample_ids is not None
        log_ratio = sequence_log_ratio(log_ratio, mask, sample_ids, num_samples, reduce)
    return ppo_clip(log_ratio, advantage, eps_clip, high, eps_clip_c)


def ppo_clip(
    log_ratio: Tensor, advantage: Tensor, low: float, high: float, dual: float | None = None
) -> TokenLoss:
    """max(-ratio * A, -clip(ratio, 1 - low, 1 + high) * A); where A < 0 at most -dual * A."""
    ratio = torch.exp(-log_ratio)
    plain = -ratio * advantage
    bounded = -ratio.clamp(1 - low, 1 + high) * advantage
    loss = torch.maximum(plain, bounded)
    if dual is not None:
        loss = torch.where(advantage < 0, torch.minimum(-dual * advantage, loss), loss)
    return TokenLoss(loss, (bounded > plain).float(), log_ratio.detach(), ratio.detach())


def sequence_log_ratio(
    log_ratio: Tensor,
    mask: Tensor,
    sample_ids: Tensor,
    num_samples: int,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """GSPO: each sample's mean log-ratio over its mask=1 tokens, at all of its tokens; the gradient
    goes through it.

    `reduce` adds a [2, n] tensor over context-parallel ranks (differentiably), where a rank holds
    parts of samples.
    """
    mask = mask.to(log_ratio.dtype)
    sums = torch.stack(
        [
            segment_sum(log_ratio * mask, sample_ids, num_samples),
            segment_sum(mask, sample_ids, num_samples),
        ]
    )
    if reduce is not None:
        sums = reduce(sums)
    return (sums[0] / sums[1].clamp_min(1))[sample_ids]


def cispo(
    log_probs: Tensor, log_ratio: Tensor, advantage: Tensor, low: float, high: float
) -> TokenLoss:
    """-stop_gradient(clip(ratio)) * A * logp. The paper's form has no lower bound: low >= 1."""
    ratio = torch.exp(-log_ratio.detach())
    weight = ratio.clamp(1 - low, 1 + high)
    loss = -weight * advantage * log_probs
    return TokenLoss(loss, (weight != ratio).float(), log_ratio.detach(), ratio)


def opsm(
    log_ratio: Tensor,
    advantage: Tensor,
    mask: Tensor,
    sample_ids: Tensor,
    num_samples: int,
    delta: float,
) -> Tensor:
    """[R] 0 for the tokens with A < 0 of samples whose mean log_ratio over mask=1 tokens is above
    `delta`, else 1: off-policy sequence masking (DeepSeek-V3.2, 2512.02556). No gradient.
    """
    mean = segment_mean(
        torch.where(mask > 0, log_ratio.detach(), 0.0), mask, sample_ids, num_samples
    )
    return 1.0 - ((advantage < 0) & (mean > delta)[sample_ids]).float()


def sft_loss(log_probs: Tensor) -> Tensor:
    """[R] negative log-likelihood."""
    return -log_probs


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, value_clip: float
) -> tuple[Tensor, Tensor]:
    """([R] clipped squared error without a factor 1/2, [R] 0/1 clipped)."""
    bounded = old_values + (values - old_values).clamp(-value_clip, value_clip)
    plain, limited = (values - returns).square(), (bounded - returns).square()
    return torch.maximum(plain, limited), (limited > plain).float()
