"""Importance weights against worked values."""

import torch

from spmd_rl.algo.offpolicy import (
    icepop_weights,
    importance_weight,
    mismatch_metrics,
    truncated_weights,
)

DIFFERENCE = torch.tensor([-1, 0, 0.5, 1])


def test_truncated():
    weight, metrics = truncated_weights(DIFFERENCE, torch.zeros(4))
    torch.testing.assert_close(weight, torch.tensor([0.367879, 1, 1.648721, 2]))
    torch.testing.assert_close(metrics["tis"], DIFFERENCE.exp())
    assert metrics["tis_clipfrac"].tolist() == [0, 0, 0, 1]
    torch.testing.assert_close(metrics["tis_abs"], (DIFFERENCE.exp() - 1).abs())


def test_icepop_drops_tokens_outside():
    weight, metrics = icepop_weights(DIFFERENCE, torch.zeros(4), 0.5, 2.0)
    torch.testing.assert_close(weight, torch.tensor([0, 1, 1.648721, 0]))
    assert metrics["tis_clipfrac"].tolist() == [1, 0, 0, 1]


def test_weights_carry_no_gradient():
    old = torch.zeros(2, requires_grad=True)
    assert not importance_weight(old, torch.zeros(2)).requires_grad


def test_mismatch():
    metrics = mismatch_metrics(torch.tensor([-1.0, -2]), torch.tensor([-1.5, -2]))
    torch.testing.assert_close(metrics["train_rollout_logprob_abs_diff"], torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(metrics["train_rollout_kl"], torch.tensor([0.148721, 0.0]))
