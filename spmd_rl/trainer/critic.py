"""PPO's critic: a second model on the same ranks, which learns what return to expect at each token.

In: the rollout's columns with values and returns. Out: the critic's configuration, the loss of one
of its micro-batches. The model itself is an ordinary Learner.
"""

from __future__ import annotations

from spmd_rl.algo import losses
from spmd_rl.algo.aggregate import weighted_sum
from spmd_rl.config.schema import Config
from spmd_rl.trainer.data import Piece, RolloutData
from spmd_rl.trainer.heads import Values
from spmd_rl.trainer.loss import Outcome

PREFIX = "critic-"  # of its metrics below train/, as slime has it


def config_of(cfg: Config) -> Config:
    """The configuration as the critic reads it: its own first weights and learning rate."""
    train = cfg.train
    model = {"ref_load": cfg.model.critic_load or cfg.model.ref_load}
    rates = {
        "lr": train.lr if train.critic_lr is None else train.critic_lr,
        "lr_warmup_iters": train.critic_lr_warmup_iters,
        "lr_warmup_fraction": None,
    }
    sections = {
        "model": cfg.model.model_copy(update=model),
        "train": train.model_copy(update=rates),
    }
    return cfg.model_copy(update=sections)


def value_loss(cfg: Config, data: RolloutData, now: Values, piece: Piece) -> Outcome:
    """Clipped squared error of the values, averaged as the policy's loss is."""
    assert data.values is not None and data.returns is not None
    rows, weights = piece.rows, data.weights[piece.rows]
    token, clipped = losses.value_loss(
        now.values, data.values[rows], data.returns[rows], cfg.algo.value_clip
    )
    loss = weighted_sum(weights, token)
    sums = {
        f"{PREFIX}loss": loss.detach(),
        f"{PREFIX}value_loss": loss.detach(),
        f"{PREFIX}value_clipfrac": weighted_sum(weights, clipped.double()),
    }
    return Outcome(loss, sums, {})
