"""The lengths both sides of the whole-step bench are given."""

import pytest

from tools.bench_step import MEAN, response_lengths


def test_equal_lengths():
    assert response_lengths("equal", 128) == [MEAN] * 128


@pytest.mark.parametrize("samples", [64, 128, 256])
def test_long_tail(samples):
    lengths = response_lengths("tail", samples)
    mean = sum(lengths) / samples
    assert len(lengths) == samples and min(lengths) >= 1
    assert abs(mean - MEAN) < 1.5  # as many tokens a step as with equal lengths
    assert max(lengths) / mean >= (4 if samples >= 128 else 3.5)
    assert lengths == response_lengths("tail", samples)
