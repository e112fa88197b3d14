"""Advantages against worked values and a plain double-precision loop over ragged samples."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spmd_rl.algo.advantages import advantages, gae, whiten, whitening_sums
from spmd_rl.algo.segments import discounted_suffix_sum


def tensor(values):
    return torch.tensor(values, dtype=torch.float32)


def close(actual, expected, atol=1e-6):
    torch.testing.assert_close(
        actual.double(), torch.tensor(expected, dtype=torch.float64), atol=atol, rtol=1e-5
    )


@pytest.mark.parametrize("estimator", ["grpo", "gspo", "cispo", "rloo"])
def test_reward_at_every_token_and_kl_coef_without_effect(estimator):
    lengths, mask = torch.tensor([2, 1, 3]), tensor([1, 0, 1, 1, 1, 1])
    values = advantages(
        estimator, tensor([0.5, -1, 2]), lengths, mask, kl=torch.ones(6), kl_coef=0.1
    )
    close(values, [0.5, 0.5, -1, 2, 2, 2])


@pytest.mark.parametrize(
    "gamma, expected", [(1.0, [0.94, 0.95, 0.97, 0]), (0.5, [0.2225, 0.465, 0.97, 0])]
)
def test_reinforce_plus_plus(gamma, expected):
    values = advantages(
        "reinforce_plus_plus",
        tensor([1]),
        torch.tensor([4]),
        tensor([1, 1, 1, 0]),
        kl=tensor([0.1, 0.2, 0.3, 0.4]),
        kl_coef=0.1,
        gamma=gamma,
    )
    close(values, expected)


def test_reinforce_plus_plus_refuses_a_fully_masked_sample():
    with pytest.raises(ValueError, match=r"samples \[1\] of this rank have none"):
        advantages("reinforce_plus_plus", tensor([1, 1]), torch.tensor([1, 2]), tensor([1, 0, 0]))


def test_baseline_subtracts_kl_at_each_token():
    values = advantages(
        "reinforce_plus_plus_baseline",
        tensor([0.5, -0.5]),
        torch.tensor([2, 1]),
        torch.ones(3),
        kl=tensor([0.1, 0.2, 0.3]),
        kl_coef=0.1,
    )
    close(values, [0.49, 0.48, -0.53])


@pytest.mark.parametrize(
    "gamma, lam, advantage, returns",
    [
        (1.0, 1.0, [0.5, 0.6, 0.7], [1, 1, 1]),
        (0.9, 0.95, [0.260567, 0.4685, 0.7], [0.760567, 0.8685, 1.0]),
    ],
)
def test_gae(gamma, lam, advantage, returns):
    values = tensor([0.5, 0.4, 0.3])
    actual = gae(tensor([1]), values, torch.tensor([3]), gamma=gamma, lam=lam)
    close(actual[0], advantage)
    close(actual[1], returns)


ragged = st.lists(st.integers(0, 40), min_size=1, max_size=8)


@settings(deadline=None)
@given(ragged, st.sampled_from([1.0, 0.99, 0.5, 0.0]), st.integers(0, 2**31))
def test_suffix_sum_equals_the_recurrence(lengths, decay, seed):
    values = np.random.default_rng(seed).normal(size=sum(lengths))
    expected, end = np.zeros_like(values), 0
    for length in lengths:
        end += length
        carry = 0.0
        for t in range(end - 1, end - length - 1, -1):
            carry = expected[t] = values[t] + decay * carry
    actual = discounted_suffix_sum(torch.tensor(values), torch.tensor(lengths), decay)
    close(actual, expected.tolist(), atol=1e-12)


def test_suffix_sum_of_a_long_sample():
    rng = np.random.default_rng(0)
    lengths = [1, 5000, 0, 129]
    values = rng.normal(size=sum(lengths))
    flat = discounted_suffix_sum(torch.tensor(values), torch.tensor(lengths), 0.999)
    carry, end = 0.0, 5001
    for t in range(end - 1, 0, -1):
        carry = values[t] + 0.999 * carry
    assert abs(flat[1].item() - carry) < 1e-9
    assert flat[0].item() == values[0]


@settings(deadline=None)
@given(ragged, st.integers(0, 2**31))
def test_gae_of_ragged_samples_equals_a_loop(lengths, seed):
    rng = np.random.default_rng(seed)
    total, gamma, lam = sum(lengths), 0.97, 0.9
    values, kl, rewards = (
        rng.normal(size=total),
        rng.normal(size=total),
        rng.normal(size=len(lengths)),
    )
    expected, end = np.zeros(total), 0
    for reward, length in zip(rewards, lengths, strict=True):
        end += length
        carry = following = 0.0
        for t in range(end - 1, end - length - 1, -1):
            gain = kl[t] + (reward if t == end - 1 else 0)
            carry = gain + gamma * following - values[t] + gamma * lam * carry
            expected[t], following = carry, values[t]
    actual, returns = gae(
        torch.tensor(rewards),
        torch.tensor(values),
        torch.tensor(lengths),
        torch.tensor(kl),
        gamma=gamma,
        lam=lam,
    )
    close(actual, expected.tolist(), atol=1e-10)
    close(returns, (expected + values).tolist(), atol=1e-10)


def test_whitening():
    values = tensor([1, 2, 3, 4])
    close(
        whiten(values, whitening_sums(values, torch.ones(4))),
        [-1.161895, -0.387298, 0.387298, 1.161895],
    )
    values, mask = tensor([1, 2, 3, 100]), tensor([1, 1, 1, 0])
    close(whiten(values, whitening_sums(values, mask)), [-1, 0, 1, 98], atol=1e-5)


def test_whitening_is_the_same_when_the_sums_are_added_over_ranks():
    values, mask = torch.randn(50) * 3 + 2, (torch.rand(50) > 0.3).float()
    whole = whiten(values, whitening_sums(values, mask))
    parts = [slice(0, 20), slice(20, 20), slice(20, 50)]  # one rank has no tokens
    sums = torch.stack([whitening_sums(values[at], mask[at]) for at in parts]).sum(0)
    torch.testing.assert_close(torch.cat([whiten(values[at], sums) for at in parts]), whole)
    kept = whole[mask > 0]
    assert abs(kept.mean()) < 1e-6 and abs(kept.std() - 1) < 1e-6


def test_whitening_refuses_a_rollout_without_tokens():
    with pytest.raises(ValueError, match="algo.normalize_advantages"):
        whiten(torch.ones(2), whitening_sums(torch.ones(2), torch.zeros(2)))
