"""Token losses against worked values, and gradients against double-precision differences."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from spmd_rl.algo.losses import (
    cispo,
    policy_loss,
    ppo_clip,
    sequence_log_ratio,
    sft_loss,
    value_loss,
)


def one(estimator, old, new, advantage, **options):
    options = {"eps_clip": 0.2, "eps_clip_high": 0.28} | options
    result = policy_loss(
        estimator, torch.tensor([new]), torch.tensor([old]), torch.tensor([advantage]), **options
    )
    return result.loss.item(), bool(result.clipped.item())


@pytest.mark.parametrize(
    "old, new, advantage, dual, loss, clipped",
    [
        (-1.0, -0.5, 1.0, None, -1.28, True),
        (-1.0, -0.5, -1.0, None, 1.648721, False),
        (-1.0, -1.5, 1.0, None, -0.606531, False),
        (-1.0, -1.5, -1.0, None, 0.8, True),
        (-3.0, -1.0, -1.0, None, 7.389056, False),
        (-3.0, -1.0, -1.0, 3.0, 3.0, False),
    ],
)
def test_ppo_clip(old, new, advantage, dual, loss, clipped):
    actual, was_clipped = one("grpo", old, new, advantage, eps_clip_c=dual)
    assert math.isclose(actual, loss, rel_tol=1e-6)
    assert was_clipped == clipped


def test_high_clip_defaults_to_the_low_one():
    assert math.isclose(one("grpo", -1.0, -0.5, 1.0, eps_clip_high=None)[0], -1.2, rel_tol=1e-6)


def test_cispo():
    loss, clipped = one("cispo", -1.0, -0.5, 1.0, eps_clip=1.0)
    assert math.isclose(loss, 0.64, rel_tol=1e-6) and clipped
    assert one("cispo", -1.0, -1.5, 1.0, eps_clip=1.0)[1] is False


def test_gspo_takes_the_mean_over_the_unmasked_tokens_of_each_sequence():
    old, new = torch.tensor([-1.0, -2, -3, -1]), torch.tensor([-0.9, -2.2, -2.5, -1])
    mask, ids = torch.tensor([1.0, 1, 0, 0]), torch.tensor([0, 0, 0, 1])
    log_ratio = sequence_log_ratio(old - new, mask, ids, 2)
    torch.testing.assert_close(log_ratio, torch.tensor([0.05, 0.05, 0.05, 0]))
    result = policy_loss("gspo", new, old, torch.ones(4), mask=mask, sample_ids=ids, num_samples=2)
    torch.testing.assert_close(result.ratio, torch.tensor([0.951229, 0.951229, 0.951229, 1]))


def test_gspo_over_context_parallel_parts_equals_the_whole():
    old, new = torch.randn(10).double(), torch.randn(10).double()
    mask, ids = (torch.rand(10) > 0.3).double(), torch.tensor([0] * 6 + [1] * 4)
    whole = sequence_log_ratio(old - new, mask, ids, 2)
    parts = [torch.tensor([0, 5, 6]), torch.tensor([1, 2, 3, 4, 7, 8, 9])]
    seen = []
    for at in parts:
        sequence_log_ratio((old - new)[at], mask[at], ids[at], 2, lambda s: seen.append(s) or s)
    for at in parts:
        part = sequence_log_ratio((old - new)[at], mask[at], ids[at], 2, lambda _: sum(seen))
        torch.testing.assert_close(part, whole[at])


def test_a_masked_token_cannot_overflow():
    new = torch.tensor([-1.0, -1.0], requires_grad=True)
    old, mask = torch.tensor([-1.0, -500.0]), torch.tensor([1, 0])
    result = policy_loss("grpo", new, old, torch.ones(2), mask=mask)
    (result.loss * mask).sum().backward()
    assert torch.isfinite(new.grad).all() and new.grad[1] == 0


def test_gradients():
    torch.manual_seed(0)
    old, advantage = torch.randn(12).double(), torch.randn(12).double()
    new = (old + 0.5 * torch.randn(12).double()).requires_grad_()
    ids, mask = torch.arange(3).repeat_interleave(4), torch.ones(12).double()

    assert gradcheck(lambda x: ppo_clip(old - x, advantage, 0.2, 0.28, 3.0).loss, new)
    assert gradcheck(
        lambda x: ppo_clip(sequence_log_ratio(old - x, mask, ids, 3), advantage, 0.2, 0.28).loss,
        new,
    )
    result = cispo(new, old - new, advantage, 1.0, 0.28)
    (gradient,) = torch.autograd.grad(result.loss.sum(), new)
    weight = torch.exp(new.detach() - old).clamp(0, 1.28)
    torch.testing.assert_close(gradient, -weight * advantage)


@pytest.mark.parametrize("estimator", ["grpo", "cispo", "reinforce_plus_plus"])
def test_gradient_on_policy_is_the_policy_gradient(estimator):
    new = torch.randn(5, requires_grad=True)
    advantage = torch.randn(5)
    policy_loss(estimator, new, new.detach(), advantage).loss.sum().backward()
    torch.testing.assert_close(new.grad, -advantage)


def test_sft_and_value_loss():
    torch.testing.assert_close(sft_loss(torch.tensor([-2.0])), torch.tensor([2.0]))
    loss, clipped = value_loss(
        torch.tensor([1.0, 0.3]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0]), 0.2
    )
    torch.testing.assert_close(loss, torch.tensor([0.64, 0.64]))  # no factor 1/2
    assert clipped.tolist() == [1, 1]
