"""Group normalisation of rewards, against hand-computed values and a plain loop."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spmd_rl.algo.rewards import normalise


def test_scaled_by_the_deviation_of_the_group():
    values = normalise([1, 0, 0, 1], [0] * 4, "grpo")
    np.testing.assert_allclose(values, [0.866024, -0.866024, -0.866024, 0.866024], atol=1e-6)
    values = normalise([1, 0, 0, 0, 0, 0, 0, 0], [7] * 8, "gspo")
    np.testing.assert_allclose(values, [2.474867] + [-0.353552] * 7, atol=1e-6)


def test_without_deviation():
    values = normalise([1, 1, 0, 0], [0] * 4, "grpo", use_std=False)
    np.testing.assert_array_equal(values, [0.5, 0.5, -0.5, -0.5])
    values = normalise([1, 1, 0, 0], [0] * 4, "reinforce_plus_plus_baseline")
    np.testing.assert_array_equal(values, [0.5, 0.5, -0.5, -0.5])


def test_rloo_is_the_reward_minus_the_mean_of_the_others():
    values = normalise([3, 1, 1, 5], [0, 0, 0, 0], "rloo")
    np.testing.assert_allclose(values, [3 - 7 / 3, 1 - 3, 1 - 3, 5 - 5 / 3], rtol=1e-6)


@pytest.mark.parametrize("estimator", ["grpo", "cispo", "rloo", "reinforce_plus_plus_baseline"])
def test_equal_rewards_and_single_samples_give_exact_zeros(estimator):
    values = normalise([0.1, 0.1, 0.1, 0.7], [0, 0, 0, 1], estimator)
    np.testing.assert_array_equal(values, np.zeros(4))


@pytest.mark.parametrize("estimator", ["ppo", "reinforce_plus_plus"])
def test_estimators_that_take_raw_rewards(estimator):
    np.testing.assert_array_equal(normalise([1, 0], [0, 0], estimator), [1, 0])
    np.testing.assert_array_equal(normalise([1, 0], [0, 0], "grpo", enabled=False), [1, 0])


def test_samples_of_one_rollout_count_once():
    # the first trajectory was split into three samples with the same reward
    values = normalise([1, 1, 1, 0], [0] * 4, "grpo", rollout_ids=[5, 5, 5, 6], use_std=False)
    np.testing.assert_array_equal(values, [0.5, 0.5, 0.5, -0.5])


@given(
    st.lists(
        st.tuples(st.floats(-5, 5, width=32), st.integers(0, 3)),
        min_size=1,
        max_size=20,
    )
)
def test_groups_of_any_size_in_any_order(rows):
    raw, groups = np.array([r for r, _ in rows]), np.array([g for _, g in rows])
    values = normalise(raw, groups, "grpo")
    assert values.dtype == np.float32
    for g in set(groups):
        mine = raw[groups == g].astype(np.float64)
        centred = mine - mine.mean()
        if len(mine) > 1:
            centred /= mine.std(ddof=1) + 1e-6
        np.testing.assert_allclose(values[groups == g], centred, atol=1e-5, rtol=1e-5)
