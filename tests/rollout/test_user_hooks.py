"""Contract tests of every function a user may give. test_collector.py has them raise and die."""

import pytest

from tests.rollout.collecting import config, in_this_process
from tests.stub_engine import stub_engine

HERE = "tests.rollout.user_hooks"


def collect(folder, evaluation=False, **sections):
    with stub_engine() as engine:
        return in_this_process(config(folder, **sections), engine.addresses, evaluation)


@pytest.mark.parametrize("separator", [":", "."])
def test_rewards_async_by_either_spelling(tmp_path, separator):
    path = f"{HERE}{separator}length_reward"
    rollout = collect(tmp_path, reward={"custom_rm_path": path})
    assert rollout.batch.raw_rewards.tolist() == [4.0] * 8
    assert rollout.metrics["rollout/raw_reward"] == 4.0
    assert rollout.metrics["rollout/zero_std/count_4.0"] == 4


def test_plain_rewards_and_the_configuration_as_args(tmp_path):
    rollout = collect(tmp_path, reward={"custom_rm_path": f"{HERE}.plain_reward"})
    assert rollout.batch.raw_rewards.tolist() == pytest.approx([4 + i / 100 for i in range(8)])


def test_reward_objects(tmp_path):
    reward = {"custom_rm_path": f"{HERE}.object_reward", "reward_key": "score"}
    assert collect(tmp_path, reward=reward).batch.raw_rewards.tolist() == [0, 1] * 4


def test_group_rewards(tmp_path):
    reward = {"custom_rm_path": f"{HERE}.group_reward", "group_rm": True}
    assert collect(tmp_path, reward=reward).batch.raw_rewards.tolist() == [0, 1] * 4
    reward = {"custom_rm_path": f"{HERE}.wrong_group_reward", "group_rm": True}
    with pytest.raises(ValueError, match="returned 1 rewards for a group of 2 samples"):
        collect(tmp_path, reward=reward)


def test_a_plain_function_that_blocks_holds_up_no_other_sample(tmp_path):
    rollout = collect(tmp_path, reward={"custom_rm_path": f"{HERE}.blocking_reward"})
    assert rollout.batch.raw_rewards.tolist() == [1.0] * 8


def test_post_processing(tmp_path):
    reward = {
        "custom_rm_path": f"{HERE}.reward_by_index",
        "custom_reward_post_process_path": f"{HERE}.halve",
    }
    batch = collect(tmp_path, reward=reward).batch
    assert batch.raw_rewards.tolist() == [0, 1] * 4
    assert batch.rewards.tolist() == [0, 0.5] * 4


def test_multi_turn(tmp_path):
    rollout = {"custom_generate_function_path": f"{HERE}.two_turns"}
    batch = collect(tmp_path, rollout=rollout, reward={"rm_type": "random"}).batch
    assert batch.response_lengths.tolist() == [11] * 8
    assert batch.loss_mask.reshape(8, 11).tolist() == [[1] * 4 + [0] * 3 + [1] * 4] * 8
    assert batch.weight_versions is not None and set(batch.weight_versions) == {1}


def test_plain_generate_and_its_evaluation_flag(tmp_path):
    rollout = {"custom_generate_function_path": f"{HERE}.sync_generate"}
    data = str(tmp_path / "rows.jsonl")
    evaluation = {"eval_interval": 1, "eval_prompt_data": [data]}
    told = collect(tmp_path, evaluation=True, rollout=rollout, eval=evaluation)
    assert told["eval/aime"] == 9.0
    batch = collect(tmp_path, rollout=rollout).batch
    assert batch.tokens.tolist() == [1, 8] * 8
    assert batch.raw_rewards.tolist() == [8.0] * 8
    assert batch.weight_versions is not None and set(batch.weight_versions) == {4}


def test_fan_out(tmp_path):
    rollout = {"custom_generate_function_path": f"{HERE}.fan_out"}
    batch = collect(tmp_path, rollout=rollout).batch
    assert batch.rollout_ids.tolist() == [i for i in range(8) for _ in range(2)]


def test_a_generate_function_must_return_samples(tmp_path):
    rollout = {"custom_generate_function_path": f"{HERE}.no_sample"}
    with pytest.raises(TypeError, match="must return a Sample or a list of them, not 'text'"):
        collect(tmp_path, rollout=rollout)


@pytest.mark.parametrize(
    ("name", "reason"), [("drop_odd_groups", "rejected"), ("drop_with_reason", "odd_group")]
)
def test_filters(tmp_path, name, reason):
    rollout = {
        "dynamic_sampling_filter_path": f"{HERE}.{name}",
        "over_sampling_batch_size": 6,
    }
    result = collect(
        tmp_path,
        rollout=rollout,
        reward={"rm_type": "random"},
        sglang={"enable_deterministic_inference": True},
    )
    assert result.batch.rollout_ids.tolist() == [0, 1, 4, 5, 8, 9, 12, 13]
    assert result.metrics[f"rollout/dynamic_filter/drop_{reason}"] == 3
    assert result.state["sample_group_index"] == 12


def test_the_shipped_filter(tmp_path):
    rollout = {
        "dynamic_sampling_filter_path": "spmd_rl.rollout.filters.check_reward_nonzero_std",
    }
    result = collect(tmp_path, rollout=rollout, reward={"custom_rm_path": f"{HERE}.uneven_reward"})
    assert result.metrics["rollout/dynamic_filter/drop_zero_std_1.0"] >= 1
    assert sorted(result.batch.raw_rewards.tolist()) == [0.0] * 4 + [1.0] * 4
