"""Weights that correct for the engine that sampled and the trainer that learns not being the same.

In: flat [R] log-probs of the same tokens from the trainer (before the update) and from the engine.
Out: a weight and a 0/1 keep for each token (applied after clipping, before averaging; denominators
stay those of the original mask) and metrics of each token, to be averaged like the loss. Nothing
here has a gradient. Sources: TIS https://fengyao.notion.site/off-policy-rl, IcePop (ring-1t), MIS
https://richardli.xyz/rl-collapse; names and defaults as in slime's `mis.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spmd_rl.algo.segments import segment_mean, segment_sum

LEVELS = ("token", "sequence", "geometric")
MODES = ("truncate", "clip", "mask")
LIMIT = 20.0  # of a log-ratio, so that exp cannot overflow


class Correction(NamedTuple):
    weight: Tensor  # [R] multiplies the policy loss
    keep: Tensor  # [R] 0/1: rejected tokens leave every sum
    metrics: dict[str, Tensor]  # [R] each


class Bounds(NamedTuple):
    """What a ratio may be, and at which level it is taken."""

    low: float
    high: float
    level: str = "token"


def log_ratio(
    old_log_probs: Tensor,
    rollout_log_probs: Tensor,
    mask: Tensor,
    ids: Tensor,
    count: int,
    level: str,
) -> Tensor:
    """[R] logp_old - logp_rollout of the token, summed (sequence) or averaged (geometric) over the
    mask=1 tokens of its sample; within [-20, 20].
    """
    difference = old_log_probs.detach().float() - rollout_log_probs.float()
    inside = torch.where(mask > 0, difference, 0.0)
    if level == "sequence":
        difference = segment_sum(inside, ids, count)[ids]
    elif level == "geometric":
        difference = segment_mean(inside, mask, ids, count)[ids]
    return difference.clamp(-LIMIT, LIMIT)


def importance(
    old_log_probs: Tensor,
    rollout_log_probs: Tensor,
    mask: Tensor,
    ids: Tensor,
    count: int,
    bounds: Bounds,
    mode: str = "clip",
) -> Correction:
    """Importance weights. `truncate`: at most `high` (TIS); `clip`: within [low, high]; `mask`: as
    they are, and tokens outside are dropped (IcePop, MIS).
    """
    ratio = torch.exp(log_ratio(old_log_probs, rollout_log_probs, mask, ids, count, bounds.level))
    keep = torch.ones_like(ratio)
    if mode == "mask":
        keep = ((ratio >= bounds.low) & (ratio <= bounds.high)).to(ratio.dtype)
        weight, changed = ratio, 1 - keep
    else:
        weight = ratio.clamp(0.0 if mode == "truncate" else bounds.low, bounds.high)
        changed = (weight != ratio).to(ratio.dtype)
    metrics = {"tis": ratio, "tis_clipfrac": changed, "tis_abs": (ratio - 1).abs()}
    return Correction(weight, keep, metrics)


def rejection(
    old_log_probs: Tensor,
    rollout_log_probs: Tensor,
    mask: Tensor,
    ids: Tensor,
    count: int,
    bounds: Bounds,
    *,
    veto: float | None = None,
    trust_region: str | None = None,
    threshold: float | None = None,
) -> Correction:
    """Rejection sampling: weight 1, tokens whose ratio lies outside the bounds dropped.

    `veto`: a sample with an unmasked token of a smaller ratio is dropped whole. `trust_region`: so
    is one whose largest ("max") k2 or mean ("avg") k3 divergence is above `threshold`.
    """
    tokens = log_ratio(old_log_probs, rollout_log_probs, mask, ids, count, "token")
    ratio = torch.exp(log_ratio(old_log_probs, rollout_log_probs, mask, ids, count, bounds.level))
    low, high = (ratio < bounds.low).to(ratio.dtype), (ratio > bounds.high).to(ratio.dtype)
    keep = (1 - low) * (1 - high)
    metrics = {"rs_mask_fraction_low": low, "rs_mask_fraction_high": high}
    if veto is not None:
        vetoed = _any((torch.exp(tokens) < veto) & (mask > 0), ids, count)
        metrics["rs_veto_fraction"] = vetoed
        keep = keep * (1 - vetoed)
    if trust_region is not None:
        assert threshold is not None
        if trust_region == "max":
            outside = _any((tokens.square() / 2 > threshold) & (mask > 0), ids, count)
        else:
            k3 = torch.exp(-tokens) - 1 + tokens
            mean = segment_mean(torch.where(mask > 0, k3, 0.0), mask, ids, count)
            outside = (mean > threshold).to(ratio.dtype)[ids]
        metrics["rs_trust_region_reject_fraction"] = outside
        keep = keep * (1 - outside)
    return Correction(torch.ones_like(ratio), keep, metrics)


def weight_sums(weight: Tensor, mask: Tensor, ids: Tensor, count: int, level: str) -> Tensor:
    """[2] float64: the sum of weights and how many, over mask=1 tokens (at sequence and geometric
    level: over samples). Added over all data-parallel ranks, their quotient is the mean that
    `tis_batch_normalize` divides by.
    """
    weight, mask = weight.double(), mask.double()
    if level == "token":
        return torch.stack([(weight * mask).sum(), mask.sum()])
    means = segment_mean(weight, mask, ids, count)
    return torch.stack([means.sum(), means.new_tensor(float(count))])


def mismatch_metrics(log_probs: Tensor, rollout_log_probs: Tensor) -> dict[str, Tensor]:
    """Of each token, the gap between trainer and engine: absolute difference and the k3 estimate of
    KL(rollout || trainer).
    """
    difference = log_probs.detach().float() - rollout_log_probs.float()
    return {
        "train_rollout_logprob_abs_diff": difference.abs(),
        "train_rollout_kl": torch.exp(difference) - 1 - difference,
    }


def sequence_metrics(
    log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor, ids: Tensor, count: int
) -> dict[str, Tensor]:
    """`get_mismatch_metrics`: perplexities and second moments, each at every token [R] of its
    sample. chi2 is E[ratio^2] - 1 over a sample's tokens, or of the whole sample's ratio.
    """
    args = (log_probs, rollout_log_probs, mask, ids, count)
    mean = segment_mean(torch.where(mask > 0, log_probs.detach().float(), 0.0), mask, ids, count)
    engine = segment_mean(torch.where(mask > 0, rollout_log_probs, 0.0), mask, ids, count)
    difference = engine - mean
    square = torch.exp(2 * log_ratio(*args, "token"))
    token = segment_mean(torch.where(mask > 0, square, 0.0), mask, ids, count) - 1
    of_samples = {
        "mis_training_log_ppl": -mean,
        "mis_rollout_log_ppl": -engine,
        "mis_log_ppl_diff": difference,
        "mis_log_ppl_abs_diff": difference.abs(),
        "mis_ppl_ratio": torch.exp(difference),
        "mis_chi2_token": token,
    }
    found = {name: values[ids] for name, values in of_samples.items()}
    return found | {"mis_chi2_seq": torch.exp(2 * log_ratio(*args, "sequence")) - 1}


def _any(flags: Tensor, ids: Tensor, count: int) -> Tensor:
    """[R] 1 where any token of the sample is flagged."""
    return (segment_sum(flags.float(), ids, count) > 0).float()[ids]
