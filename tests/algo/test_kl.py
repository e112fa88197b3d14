"""KL estimators against worked values and double precision."""

import math

import pytest
import torch

from spmd_rl.algo.kl import KINDS, kl

GOLDEN = {
    0.5: {"k1": 0.5, "k2": 0.125, "k3": 0.106531, "low_var_kl": 0.106531},
    -0.5: {"k1": -0.5, "k2": 0.125, "k3": 0.148721, "low_var_kl": 0.148721},
    -7.0: {"k3": 1088.6332, "low_var_kl": 10.0},
    7.0: {"k3": 6.000912, "low_var_kl": 6.000912},
}


@pytest.mark.parametrize("difference", GOLDEN)
def test_worked_values(difference):
    for kind, expected in GOLDEN[difference].items():
        value = kl(torch.tensor([difference]), torch.zeros(1), kind).item()
        assert math.isclose(value, expected, rel_tol=1e-6, abs_tol=5e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_log_probs_have_no_divergence_and_an_empty_batch_works(kind):
    assert kl(torch.tensor([-1.5]), torch.tensor([-1.5]), kind).item() == 0
    assert kl(torch.zeros(0), torch.zeros(0), kind).shape == (0,)


def test_unbiased_multiplies_by_the_ratio_before_the_clamp_and_lets_the_gradient_through():
    new = torch.tensor([-1.0, -8.0], requires_grad=True)
    old, ref = torch.tensor([-1.5, -8.0]), torch.tensor([-1.2, -1.0])
    value = kl(new, ref, "low_var_kl", old_log_probs=old)
    k3 = math.exp(-0.2) - 1 + 0.2
    assert math.isclose(value[0].item(), math.exp(0.5) * k3, rel_tol=1e-5)
    assert value[1].item() == 10
    value[0].backward()
    slope = math.exp(0.5) * (k3 + 1 - math.exp(-0.2))
    assert math.isclose(new.grad[0].item(), slope, rel_tol=1e-5)


def test_unknown_kind_names_the_key():
    with pytest.raises(ValueError, match="algo.kl_loss_type 'kl'"):
        kl(torch.zeros(1), torch.zeros(1), "kl")
