"""Importance weights and rejection against worked values and plain loops over samples."""

import math

import pytest
import torch

from spmd_rl.algo.offpolicy import (
    Bounds,
    importance,
    log_ratio,
    mismatch_metrics,
    rejection,
    sequence_metrics,
    weight_sums,
)
from spmd_rl.algo.segments import sample_ids

DIFFERENCE = torch.tensor([-1, 0, 0.5, 1])
ONE = (torch.ones(4), torch.zeros(4, dtype=torch.int64), 1)

# Three samples of 3, 1 and 2 tokens; the second token of the first is masked.
LENGTHS = torch.tensor([3, 1, 2])
TRAINED = torch.tensor([-1.0, -9.0, -2.0, -0.5, -1.0, -3.0])
SAMPLED = torch.tensor([-1.2, -1.0, -1.9, -0.4, -1.5, -1.0])
MASK = torch.tensor([1.0, 0, 1, 1, 1, 1])
IDS = sample_ids(LENGTHS)
RAGGED = (TRAINED, SAMPLED, MASK, IDS, 3)
RATIOS = [0.2, -8.0, -0.1, -0.1, 0.5, -2.0]  # log, of each token


def test_tis_truncates():
    found = importance(DIFFERENCE, torch.zeros(4), *ONE, Bounds(0.0, 2.0))
    torch.testing.assert_close(found.weight, torch.tensor([0.367879, 1, 1.648721, 2]))
    torch.testing.assert_close(found.metrics["tis"], DIFFERENCE.exp())
    assert found.metrics["tis_clipfrac"].tolist() == [0, 0, 0, 1]
    torch.testing.assert_close(found.metrics["tis_abs"], (DIFFERENCE.exp() - 1).abs())
    assert found.keep.tolist() == [1, 1, 1, 1]


def test_modes_beyond_the_bounds():
    at = (DIFFERENCE, torch.zeros(4), *ONE, Bounds(0.5, 2.0))
    clipped, truncated, masked = (importance(*at, mode) for mode in ("clip", "truncate", "mask"))
    torch.testing.assert_close(clipped.weight, torch.tensor([0.5, 1, 1.648721, 2]))
    torch.testing.assert_close(truncated.weight, torch.tensor([0.367879, 1, 1.648721, 2]))
    icepop = masked.weight * masked.keep
    torch.testing.assert_close(icepop, torch.tensor([0, 1, 1.648721, 0]))
    assert masked.metrics["tis_clipfrac"].tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("token", RATIOS),
        ("sequence", [0.1, 0.1, 0.1, -0.1, -1.5, -1.5]),
        ("geometric", [0.05, 0.05, 0.05, -0.1, -0.75, -0.75]),
    ],
)
def test_levels_leave_masked_tokens_out(level, expected):
    torch.testing.assert_close(log_ratio(*RAGGED, level), torch.tensor(expected))


def test_a_ratio_cannot_overflow():
    far = torch.tensor([500.0])
    one = (torch.ones(1), torch.zeros(1, dtype=torch.int64), 1)
    assert log_ratio(far, -far, *one, "token").item() == 20
    assert log_ratio(-far, far, *one, "sequence").item() == -20


def test_rejection_by_ratio():
    found = rejection(*RAGGED, Bounds(0.8, 1.25))
    assert found.keep.tolist() == [1, 0, 1, 1, 0, 0]
    assert found.weight.tolist() == [1] * 6
    found = rejection(*RAGGED, Bounds(0.8, 1.25, "sequence"))
    assert found.keep.tolist() == [1, 1, 1, 1, 0, 0]
    assert found.metrics["rs_mask_fraction_low"].tolist() == [0, 0, 0, 0, 1, 1]


def test_a_veto_drops_the_sample_but_masked_tokens_have_none():
    found = rejection(*RAGGED, Bounds(0.0, 100.0), veto=0.2)
    assert found.keep.tolist() == [1, 1, 1, 1, 0, 0]
    assert found.metrics["rs_veto_fraction"].tolist() == [0, 0, 0, 0, 1, 1]


def test_trust_regions():
    wide = Bounds(0.0, 1e9)
    # k2 of each sample's largest: .02, .005, 2; k3(0.5) and k3(-2) average 2.2478
    found = rejection(*RAGGED, wide, trust_region="max", threshold=0.01)
    assert found.keep.tolist() == [0, 0, 0, 1, 0, 0]
    k3 = [(math.exp(-x) - 1 + x) for x in (0.5, -2.0)]
    mean = sum(k3) / 2
    for threshold, kept in ((mean - 0.01, 0), (mean + 0.01, 1)):
        found = rejection(*RAGGED, wide, trust_region="avg", threshold=threshold)
        assert found.keep.tolist() == [1, 1, 1, 1, kept, kept]


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_normalised_weights_have_mean_one_whatever_the_split(level):
    found = importance(*RAGGED, Bounds(0.0, 2.0, level))
    whole = weight_sums(found.weight, MASK, IDS, 3, level)
    at = [slice(0, 3), slice(3, 6)]
    parts = weight_sums(found.weight[at[0]], MASK[at[0]], IDS[at[0]], 1, level)
    parts += weight_sums(found.weight[at[1]], MASK[at[1]], IDS[at[1]] - 1, 2, level)
    torch.testing.assert_close(whole, parts)
    if level == "token":
        scaled = found.weight / (whole[0] / whole[1])
        assert abs((scaled * MASK).sum() / MASK.sum() - 1) < 1e-6


def test_nothing_carries_a_gradient():
    old = torch.zeros(4, requires_grad=True)
    for found in (importance(old, DIFFERENCE, *ONE, Bounds(0, 2)),
                  rejection(old, DIFFERENCE, *ONE, Bounds(0.5, 2))):  # fmt: skip
        assert not found.weight.requires_grad and not found.keep.requires_grad


def test_mismatch():
    metrics = mismatch_metrics(torch.tensor([-1.0, -2]), torch.tensor([-1.5, -2]))
    torch.testing.assert_close(metrics["train_rollout_logprob_abs_diff"], torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(metrics["train_rollout_kl"], torch.tensor([0.148721, 0.0]))


def test_perplexities_and_second_moments_of_samples():
    found = {name: values.tolist() for name, values in sequence_metrics(*RAGGED).items()}
    assert found["mis_training_log_ppl"] == pytest.approx([1.5] * 3 + [0.5] + [2.0] * 2)
    assert found["mis_rollout_log_ppl"] == pytest.approx([1.55] * 3 + [0.4] + [1.25] * 2)
    assert found["mis_log_ppl_diff"] == pytest.approx([-0.05] * 3 + [0.1] + [0.75] * 2)
    assert found["mis_ppl_ratio"][3] == pytest.approx(math.exp(0.1))
    chi2 = (math.exp(0.4) + math.exp(-0.2)) / 2 - 1
    assert found["mis_chi2_token"][0] == pytest.approx(chi2, rel=1e-5)
    assert found["mis_chi2_seq"][0] == pytest.approx(math.exp(0.2) - 1, rel=1e-5)
