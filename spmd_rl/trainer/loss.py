"""Loss of one micro-batch and its metrics, from logits.

In: the logits rows of response tokens, the rollout's columns (`RolloutData`), the algorithm's
options. Out: a scalar whose plain sum over micro-batches and data-parallel ranks is the step's
loss, and sums and maxima for metrics. Runs on the last pipeline stage only; knows nothing of
schedules or optimizers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spmd_rl.algo import kl as kl_estimates
from spmd_rl.algo import losses, offpolicy
from spmd_rl.algo.aggregate import objective, weighted_sum
from spmd_rl.config.schema import Config
from spmd_rl.trainer import custom
from spmd_rl.trainer.correction import correct
from spmd_rl.trainer.data import Piece, RolloutData
from spmd_rl.trainer.heads import LogProbs


class Outcome(NamedTuple):
    """A micro-batch's loss and what it adds to the step's metrics."""

    loss: Tensor
    sums: dict[str, Tensor]  # float64 scalars; added over micro-batches and ranks
    maxima: dict[str, Tensor]


class Loss:
    """The loss that `algo.loss_type` names, with the user's functions found."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.hooks = custom.Hooks(cfg)
        kinds = {"policy_loss": self.policy, "sft_loss": self.sft, "custom_loss": self.custom}
        self.kind = kinds[cfg.algo.loss_type]

    def __call__(self, now: LogProbs, piece: Piece, data: RolloutData) -> Outcome:
        return self.kind(now, piece, data)

    def sft(self, now: LogProbs, piece: Piece, data: RolloutData) -> Outcome:
        """Negative log-likelihood of the unmasked response tokens."""
        loss = weighted_sum(data.weights[piece.rows], losses.sft_loss(now.log_probs))
        return Outcome(loss, {"loss": loss.detach()}, {})

    def custom(self, now: LogProbs, piece: Piece, data: RolloutData) -> Outcome:
        """The user's own; divided as slime divides it, by the rollouts (or tokens) of the step."""
        loss, metrics = custom.loss(self.hooks, self.cfg, now, piece, data)
        return Outcome(loss, {"loss": loss.detach(), **metrics}, {})

    def policy(self, now: LogProbs, piece: Piece, data: RolloutData) -> Outcome:
        """The estimator's policy loss with its entropy and KL terms."""
        algo, rows, count = self.cfg.algo, piece.rows, len(piece.micro_batch.samples)
        weights, mask, advantage = data.weights[rows], data.mask[rows], data.advantages[rows]
        current = now.log_probs
        old = current.detach() if data.old_log_probs is None else data.old_log_probs[rows]
        token = losses.policy_loss(
            algo.advantage_estimator,
            current,
            old,
            advantage,
            eps_clip=algo.eps_clip,
            eps_clip_high=algo.eps_clip_high,
            eps_clip_c=algo.eps_clip_c,
            mask=mask,
            sample_ids=piece.sample_ids,
            num_samples=count,
        )
        loss, extra, maxima = token.loss, {}, {}
        if algo.use_opsm:
            used = losses.opsm(
                old - current, advantage, mask, piece.sample_ids, count, algo.opsm_delta
            )
            loss, extra["opsm_clipfrac"] = loss * used, 1 - used
        if data.opd_reverse_kl is not None:
            extra["opd_reverse_kl"] = data.opd_reverse_kl[rows]
        kept = mask
        if data.rollout_log_probs is not None:
            sampled = data.rollout_log_probs[rows]
            trained = data.log_probs[rows] if data.recomputed else current.detach()
            loss, kept, metrics = correct(self.hooks, self.cfg, loss, trained, sampled, piece, data)
            extra |= metrics | ({"ois": token.ratio} if metrics else {})
            if data.recomputed or piece.step == 0:  # else the weights are not those that sampled
                extra |= offpolicy.mismatch_metrics(trained, sampled)
                differences = extra["train_rollout_logprob_abs_diff"] * (mask > 0)
                maxima["train_rollout_logprob_abs_diff_max"] = _largest(differences)
        weights_kept = weights * (kept * (mask > 0))
        kl = self._kl_term(current, old, rows, data)
        pg = self._reduce(loss, weights_kept, kept, piece, data)
        total = objective(
            pg,
            weights_kept,
            entropy=now.entropy,
            entropy_coef=algo.entropy_coef,
            kl=kl,
            kl_loss_coef=algo.kl_loss_coef,
        )
        per_token = {
            "entropy_loss": now.entropy,
            "pg_clipfrac": token.clipped,
            "ppo_kl": token.log_ratio,
            **({"kl_loss": kl} if kl is not None else {}),
        }
        sums = {"loss": total.detach().double(), "pg_loss": pg.detach().double()}
        sums |= {k: weighted_sum(weights_kept, v.detach().double()) for k, v in per_token.items()}
        sums |= {k: weighted_sum(weights, v.detach().double()) for k, v in extra.items()}
        return Outcome(total, sums, maxima)

    def _reduce(
        self, loss: Tensor, weights: Tensor, kept: Tensor, piece: Piece, data: RolloutData
    ) -> Tensor:
        if self.hooks.reducer is None:
            return weighted_sum(weights, loss)
        return custom.reduced(self.hooks, self.cfg, loss, kept, piece, data)

    def _kl_term(self, current: Tensor, old: Tensor, rows: Tensor, data: RolloutData):
        algo = self.cfg.algo
        if not algo.use_kl_loss:
            return None
        assert data.ref_log_probs is not None
        if not algo.kl_loss_coef:
            current = current.detach()
        unbiased = old if algo.use_unbiased_kl else None
        return kl_estimates.kl(current, data.ref_log_probs[rows], algo.kl_loss_type, unbiased)


def _largest(values: Tensor) -> Tensor:
    return values.max().double() if len(values) else values.new_zeros((), dtype=torch.float64)
