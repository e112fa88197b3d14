"""The loss of a step from token losses: worked values, any split, against a plain loop."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spmd_rl.algo.aggregate import objective, token_weights, weighted_sum
from spmd_rl.algo.segments import sample_ids, segment_mean

LOSSES = torch.tensor([1.0, 1, 4, 4, 4, 4, 9])
LENGTHS = torch.tensor([2, 4, 1])


def test_worked_values():
    ids, mask = sample_ids(LENGTHS), torch.ones(7)
    weights = token_weights(mask, ids, LENGTHS, 3, 7)
    torch.testing.assert_close(weighted_sum(weights, LOSSES), torch.tensor(4.666667))
    weights = token_weights(mask, ids, LENGTHS, 3, 7, per_token=True)
    torch.testing.assert_close(weighted_sum(weights, LOSSES), torch.tensor(3.857143))


def test_siblings_share_a_denominator():
    # samples 0 and 1 are one rollout of 2 + 4 tokens, sample 2 another of 1 token
    totals = torch.tensor([6, 6, 1])
    weights = token_weights(torch.ones(7), sample_ids(LENGTHS), totals, 2, 7)
    torch.testing.assert_close(weighted_sum(weights, LOSSES), torch.tensor((18 / 6 + 9) / 2))


def test_fully_masked_samples_count_in_the_denominator_only():
    mask = torch.tensor([1.0, 1, 0, 0, 0, 0, 1])
    totals = torch.tensor([2, 1, 1])
    weights = token_weights(mask, sample_ids(LENGTHS), totals, 3, 4)
    torch.testing.assert_close(weighted_sum(weights, LOSSES), torch.tensor((1 + 0 + 9) / 3))
    weights = token_weights(mask, sample_ids(LENGTHS), totals, 3, 4, per_token=True)
    torch.testing.assert_close(weighted_sum(weights, LOSSES), torch.tensor(11 / 4))


def test_a_masked_infinity_does_not_spread():
    weights = torch.tensor([0.5, 0.0])
    assert weighted_sum(weights, torch.tensor([2.0, float("inf")])).item() == 1


def test_objective_signs():
    weights = torch.tensor([0.5, 0.5])
    value = objective(
        torch.tensor(1.5),
        weights,
        entropy=torch.tensor([2.0, 2.0]),
        entropy_coef=0.1,
        kl=torch.tensor([1.0, 3.0]),
        kl_loss_coef=0.5,
    )
    torch.testing.assert_close(value, torch.tensor(1.5 - 0.2 + 1.0))


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=10),
    st.booleans(),
    st.integers(1, 4),
    st.integers(0, 2**31),
)
def test_value_and_gradient_do_not_depend_on_the_split(lengths, per_token, parts, seed):
    rng = np.random.default_rng(seed)
    loss = torch.tensor(rng.normal(size=sum(lengths)), requires_grad=True)
    mask = torch.tensor(rng.integers(0, 2, sum(lengths)).astype(np.uint8))
    ids = sample_ids(torch.tensor(lengths))
    means = segment_mean(loss, mask, ids, len(lengths))
    totals = torch.zeros(len(lengths), dtype=torch.int64).index_add(0, ids, mask.long())
    totals = totals.clamp_min(1)
    if per_token:
        expected = (loss * mask).sum() / totals.sum()
    else:
        expected = means.mean()
    weights = token_weights(mask, ids, totals, len(lengths), int(totals.sum()), per_token)
    split = torch.tensor(rng.integers(0, parts, len(lengths)))[ids]
    value = sum(weighted_sum(weights[split == k], loss[split == k]) for k in range(parts))
    torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-6)
    gradients = [torch.autograd.grad(x, loss)[0] for x in (value, expected)]
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-6)
