"""Rewards of samples to advantages of response tokens, once for a whole rollout (not per optimizer
step).

In: rewards [n] as `rewards.normalise` left them, response lengths [n], loss mask and KL flat [R].
Out: flat [R] float32. Whole responses are needed here, so under context parallelism the caller
gathers log-probs first. The order within a rollout: KL, estimator, whitening. Source: slime's
`compute_advantages_and_returns`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spmd_rl.algo.segments import discounted_suffix_sum, last_unmasked, sample_ids

BROADCAST = ("grpo", "gspo", "cispo", "rloo")  # the reward at every token; kl_coef has no effect


def advantages(
    estimator: str,
    rewards: Tensor,
    lengths: Tensor,
    mask: Tensor,
    kl: Tensor | None = None,
    *,
    kl_coef: float = 0.0,
    gamma: float = 1.0,
) -> Tensor:
    """[R] advantages. `kl` [R] may be None where kl_coef is 0."""
    ids = sample_ids(lengths)
    shaped = torch.zeros(len(ids), device=ids.device)
    if kl is not None and kl_coef:
        shaped = -kl_coef * kl.float()
    if estimator in BROADCAST:
        return rewards.float()[ids]
    if estimator == "reinforce_plus_plus_baseline":
        return rewards.float()[ids] + shaped
    if estimator == "reinforce_plus_plus":
        return discounted_returns(rewards, lengths, mask, shaped, gamma)
    raise ValueError(f"algo.advantage_estimator '{estimator}' has no advantage function")


def discounted_returns(
    rewards: Tensor, lengths: Tensor, mask: Tensor, shaped: Tensor, gamma: float
) -> Tensor:
    """REINFORCE++: sum over s >= t of gamma^(s-t) * token reward.

    A token's reward is its `shaped` term (0 where masked), plus the sample's reward at its last
    unmasked token. Masked tokens inside the span still discount.
    """
    last = last_unmasked(mask, sample_ids(lengths), len(lengths))
    if bool((last < 0).any()):
        empty = (last < 0).nonzero().view(-1).tolist()
        raise ValueError(
            "algo.advantage_estimator reinforce_plus_plus puts the reward on the last unmasked "
            f"token, but samples {empty[:8]} of this rank have none; filter them out or use grpo"
        )
    token_rewards = (shaped * mask).index_add(0, last, rewards.to(shaped.dtype))
    return discounted_suffix_sum(token_rewards, lengths, gamma)


def gae(
    rewards: Tensor,
    values: Tensor,
    lengths: Tensor,
    shaped: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: (advantages [R], returns [R]).

    `values` [R] are the critic's; the value after the last token is 0. The reward sits on the last
    response token, masked or not; `shaped` [R] (-kl_coef * kl) on every token.
    """
    ends = lengths.cumsum(0)
    has_tokens = lengths > 0
    token_rewards = torch.zeros_like(values) if shaped is None else shaped.to(values.dtype)
    token_rewards = token_rewards.index_add(
        0, ends[has_tokens] - 1, rewards[has_tokens].to(values.dtype)
    )
    next_values = torch.cat([values[1:], values.new_zeros(1)])[: len(values)]
    next_values = next_values.index_fill(0, ends[has_tokens] - 1, 0)
    delta = token_rewards + gamma * next_values - values
    advantage = discounted_suffix_sum(delta, lengths, gamma * lam)
    return advantage, advantage + values


def whitening_sums(advantage: Tensor, mask: Tensor) -> Tensor:
    """[3] float64 sums of m, a*m, a*a*m: the caller adds them over all data- and context-parallel
    ranks.

    Every rank must take part in that sum, also one without response tokens.
    """
    a, m = advantage.double(), mask.double()
    return torch.stack([m.sum(), (a * m).sum(), (a * a * m).sum()])


def whiten(advantage: Tensor, sums: Tensor) -> Tensor:
    """[R] advantages with mean 0 and deviation 1 over the mask=1 tokens of the rollout; masked ones
    move along.
    """
    count, total, squares = sums.tolist()
    if count == 0:
        raise ValueError(
            "algo.normalize_advantages needs at least one unmasked response token in a rollout, "
            "and there is none"
        )
    mean = total / count
    variance = max(squares / count - mean * mean, 0.0)
    if count >= 2:
        variance *= count / (count - 1)
    return ((advantage.double() - mean) / (variance + 1e-8) ** 0.5).to(advantage.dtype)
