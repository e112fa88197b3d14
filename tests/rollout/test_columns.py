"""Samples to columns: order, masks, rewards, and faults of user code."""

import numpy as np
import pytest

from spmd_rl.config.schema import Config
from spmd_rl.rollout.columns import to_batch
from spmd_rl.types import Sample, Status


def config(n=2, **sections):
    rollout = {"rollout_batch_size": 2, "n_samples_per_prompt": n}
    return Config.model_validate({"model": {"hf_checkpoint": "x"}, "rollout": rollout, **sections})


def sample(index, reward, length=3, n=2, **values):
    defaults = {
        "tokens": [1, 2, *range(10, 10 + length)],
        "response_length": length,
        "rollout_log_probs": [-0.5 - index] * length,
        "weight_versions": [index] * length,
        "status": Status.COMPLETED,
    }
    return Sample(group_index=index // n, index=index, reward=reward, **(defaults | values))


def test_columns_in_index_order():
    groups = [
        [sample(3, 0, 1), sample(2, 1, 2)],
        [sample(0, 1, 3, status=Status.TRUNCATED), sample(1, 0, 4)],
    ]
    batch = to_batch(groups, config())
    assert batch.total_lengths.tolist() == [5, 6, 4, 3]
    assert batch.response_lengths.tolist() == [3, 4, 2, 1]
    assert batch.tokens.tolist()[:11] == [1, 2, 10, 11, 12, 1, 2, 10, 11, 12, 13]
    assert batch.truncated is not None and batch.truncated.tolist() == [1, 0, 0, 0]
    assert batch.rollout_ids.tolist() == [0, 1, 2, 3]
    assert batch.raw_rewards.tolist() == [1, 0, 1, 0]
    assert batch.weight_versions is not None
    assert batch.weight_versions.tolist() == [0] * 3 + [1] * 4 + [2] * 2 + [3]
    assert batch.loss_mask.dtype == np.uint8 and batch.loss_mask.tolist() == [1] * 10
    assert batch.tokens.dtype == np.int32 and batch.rollout_log_probs is not None
    assert batch.rollout_log_probs.dtype == np.float32
    np.testing.assert_allclose(batch.rewards, [0.70710578, -0.70710578] * 2, atol=2e-6)


GOLDEN = [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("algo", "expected"),
    [
        ({}, [0.866024, -0.866024, -0.866024, 0.866024]),
        ({"advantage_estimator": "gspo"}, [0.866024, -0.866024, -0.866024, 0.866024]),
        ({"disable_grpo_std_normalization": True}, [0.5, -0.5, -0.5, 0.5]),
        ({"disable_rewards_normalization": True}, GOLDEN),
        ({"advantage_estimator": "rloo"}, [2 / 3, -2 / 3, -2 / 3, 2 / 3]),
        ({"advantage_estimator": "reinforce_plus_plus_baseline"}, [0.5, -0.5, -0.5, 0.5]),
        ({"advantage_estimator": "reinforce_plus_plus"}, GOLDEN),
    ],
)
def test_rewards_are_normalised_within_a_prompt(algo, expected):
    groups = [
        [sample(i, reward, n=4) for i, reward in enumerate(GOLDEN)],
        [sample(i, 1, n=4) for i in range(4, 8)],
    ]
    rewards = to_batch(groups, config(4, algo=algo)).rewards
    np.testing.assert_allclose(rewards[:4], expected, atol=1e-6)
    raw = expected == GOLDEN
    np.testing.assert_array_equal(rewards[4:], np.ones(4) if raw else np.zeros(4))


def test_siblings_share_their_rollout_and_count_once():
    first = [sample(0, 1, rollout_id=0), sample(0, 1, rollout_id=0), sample(1, 0)]
    batch = to_batch([first], config(algo={"disable_grpo_std_normalization": True}))
    assert batch.rollout_ids.tolist() == [0, 0, 1]
    assert batch.rewards.tolist() == [0.5, 0.5, -0.5]


def test_masks():
    groups = [[sample(0, 1, loss_mask=[1, 0, 1]), sample(1, 0, remove_sample=True)]]
    batch = to_batch(groups, config())
    assert batch.loss_mask.tolist() == [1, 0, 1, 0, 0, 0]
    assert batch.rewards[1] < 0  # a removed sample still counts among its siblings


def test_reward_objects():
    group = [sample(0, {"score": 1.0, "acc": True}), sample(1, {"score": -1.0, "acc": False})]
    batch = to_batch([group], config(reward={"reward_key": "score"}))
    assert batch.raw_rewards.tolist() == [1, -1]
    with pytest.raises(ValueError, match="score, acc: set reward.reward_key"):
        to_batch([group], config())
    with pytest.raises(ValueError, match="has no 'x'"):
        to_batch([group], config(reward={"reward_key": "x"}))


def test_versions_and_log_probs_nobody_recorded():
    group = [sample(0, 1, weight_versions=[], rollout_log_probs=[]), sample(1, 0)]
    batch = to_batch([group], config(), version=9)
    assert batch.weight_versions is not None
    assert batch.weight_versions.tolist() == [9, 9, 9, 1, 1, 1]
    assert batch.rollout_log_probs is None
    with pytest.raises(ValueError, match="sample 0 has no rollout_log_probs"):
        to_batch([group], config(algo={"use_tis": True}))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"loss_mask": [1, 1]}, "sample 0 has 2 entries in loss_mask, but response_length 3"),
        ({"rollout_log_probs": [0.0]}, "1 entries in rollout_log_probs"),
        ({"weight_versions": [1] * 5}, "5 entries in weight_versions"),
        ({"response_length": 9}, "response_length 9, but 5 tokens"),
        ({"response_length": -1}, "response_length -1"),
        ({"reward": None}, "sample 0 has no reward"),
        ({"reward": float("nan")}, "the reward of sample 0 is nan"),
    ],
)
def test_faults_of_user_code_name_the_sample(values, words):
    reward = values.pop("reward", 1)
    with pytest.raises(ValueError, match=words):
        to_batch([[sample(0, reward, **values), sample(1, 0)]], config())


def test_rewards_of_the_users_own_post_processing():
    group = [sample(0, None), sample(1, None)]
    batch = to_batch([group], config(), rewards=([1.0, 2.0], [0.25, -0.25]))
    assert batch.raw_rewards.tolist() == [1, 2] and batch.rewards.tolist() == [0.25, -0.25]
    with pytest.raises(ValueError, match="returned 1 rewards for 2 samples"):
        to_batch([group], config(), rewards=([1.0], [1.0]))
