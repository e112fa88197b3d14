"""Loss of one micro-batch and its metrics, from logits.

In: the logits rows of response tokens, the rollout's columns (`RolloutData`), the algorithm's
options. Out: a scalar whose plain sum over micro-batches and data-parallel ranks is the step's
loss, and sums and maxima for metrics. Runs on the last pipeline stage only; knows nothing of
schedules or optimizers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from spmd_rl.algo import kl as kl_estimates
from spmd_rl.algo import losses, offpolicy
from spmd_rl.algo.aggregate import objective, weighted_sum
from spmd_rl.config.schema import Config
from spmd_rl.trainer.data import Piece, RolloutData
from spmd_rl.trainer.logprob import log_probs_and_entropy
from spmd_rl.trainer.parallel import Groups


class Outcome(NamedTuple):
    """A micro-batch's loss and what it adds to the step's metrics."""

    loss: Tensor
    sums: dict[str, Tensor]  # float64 scalars; added over micro-batches and ranks
    maxima: dict[str, Tensor]


class LogProbs(NamedTuple):
    """Current log-probs and entropies of a piece's response tokens, [r]."""

    log_probs: Tensor
    entropy: Tensor


class Head:
    """From logits to log-probs and entropies: temperature, vocabulary shards, cp."""

    def __init__(self, cfg: Config, groups: Groups, vocab_size: int):
        sft = cfg.algo.loss_type == "sft_loss"
        self.temperature = 1.0 if sft else cfg.rollout.rollout_temperature
        self.chunk_size = cfg.train.log_probs_chunk_size
        self.vocab_size = vocab_size
        self.groups = groups

    def __call__(self, logits: Tensor, piece: Piece) -> LogProbs:
        """[1, rows, vocabulary / tp] -> values of whole responses, also where cp splits them."""
        values = log_probs_and_entropy(
            logits[0],
            piece.micro_batch.targets,
            self.vocab_size,
            self.temperature,
            self.chunk_size,
            self.groups.tp,
        )
        if self.groups.cp_size > 1:
            size = len(piece.rows)
            values = tuple(_Gather.apply(v, piece.slots, size, self.groups.cp) for v in values)
        return LogProbs(*values)


class _Gather(torch.autograd.Function):
    """Values of all context-parallel ranks in order. Each rank computes the whole loss from them,
    so backward only takes this rank's share: parameters' gradients are added over the ranks.
    """

    @staticmethod
    def forward(ctx, values: Tensor, slots: Tensor, size: int, group) -> Tensor:
        ctx.save_for_backward(slots)
        whole = values.new_zeros(size).index_copy_(0, slots, values)
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (slots,) = ctx.saved_tensors
        return grads[0].index_select(0, slots), None, None, None


def sft(now: LogProbs, piece: Piece, data: RolloutData, cfg: Config) -> Outcome:
    """Negative log-likelihood of the unmasked response tokens."""
    loss = objective(data.weights[piece.rows], losses.sft_loss(now.log_probs))
    return Outcome(loss, {"loss": loss.detach()}, {})


def policy(now: LogProbs, piece: Piece, data: RolloutData, cfg: Config) -> Outcome:
    """The estimator's policy loss with its entropy and KL terms."""
    algo, rows = cfg.algo, piece.rows
    weights, mask = data.weights[rows], data.mask[rows]
    current = now.log_probs
    old = current.detach() if data.old_log_probs is None else data.old_log_probs[rows]
    token = losses.policy_loss(
        algo.advantage_estimator,
        current,
        old,
        data.advantages[rows],
        eps_clip=algo.eps_clip,
        eps_clip_high=algo.eps_clip_high,
        eps_clip_c=algo.eps_clip_c,
        mask=mask,
        sample_ids=piece.sample_ids,
        num_samples=len(piece.micro_batch.samples),
    )
    loss, extra, maxima = token.loss, {}, {}
    if data.rollout_log_probs is not None:
        sampled = data.rollout_log_probs[rows]
        if algo.use_tis:
            correction, extra = offpolicy.truncated_weights(
                old, sampled, algo.tis_clip_low, algo.tis_clip
            )
            loss = loss * correction
            extra["ois"] = token.ratio
        gap = _gap(now, piece, data, cfg)
        if gap is not None:
            extra |= offpolicy.mismatch_metrics(gap, sampled)
            differences = extra["train_rollout_logprob_abs_diff"] * (mask > 0)
            maxima["train_rollout_logprob_abs_diff_max"] = _largest(differences)
    kl = _kl_term(current, old, rows, data, cfg)
    total = objective(
        weights,
        loss,
        entropy=now.entropy if algo.entropy_coef else None,
        entropy_coef=algo.entropy_coef,
        kl=kl,
        kl_loss_coef=algo.kl_loss_coef,
    )
    per_token = {
        "pg_loss": loss,
        "entropy_loss": now.entropy,
        "pg_clipfrac": token.clipped,
        "ppo_kl": token.log_ratio,
        **({"kl_loss": kl} if kl is not None else {}),
        **extra,
    }
    sums = {k: weighted_sum(weights, v.detach().double()) for k, v in per_token.items()}
    return Outcome(total, {"loss": total.detach(), **sums}, maxima)


def _kl_term(current: Tensor, old: Tensor, rows: Tensor, data: RolloutData, cfg: Config):
    if not cfg.algo.use_kl_loss:
        return None
    assert data.ref_log_probs is not None
    unbiased = old if cfg.algo.use_unbiased_kl else None
    return kl_estimates.kl(current, data.ref_log_probs[rows], cfg.algo.kl_loss_type, unbiased)


def _gap(now: LogProbs, piece: Piece, data: RolloutData, cfg: Config) -> Tensor | None:
    """Log-probs under the weights that sampled: recomputed, or those of the first step."""
    if data.old_log_probs is not None and not cfg.algo.use_rollout_logprobs:
        return data.old_log_probs[piece.rows]
    return now.log_probs.detach() if piece.step == 0 else None


def _largest(values: Tensor) -> Tensor:
    return values.max().double() if len(values) else values.new_zeros((), dtype=torch.float64)
