"""Saved rollouts come back as they were, or a share of them; a replay needs no engine."""

import asyncio

import numpy as np
import pytest

from spmd_rl.config.schema import DebugConfig
from spmd_rl.data.rows import DataError
from spmd_rl.rollout import dump
from spmd_rl.rollout.service import Service
from spmd_rl.types import Sample, Status
from tests.rollout.collecting import config


def samples(count):
    return [
        Sample(
            group_index=i // 2,
            index=i,
            prompt="2+2",
            tokens=[5, 6, 7 + i],
            response="x",
            response_length=1,
            label={"a": 4},
            reward=i % 2 / 3,
            loss_mask=[1],
            status=Status.TRUNCATED,
            metadata={"tools": []},
            rollout_log_probs=[-0.1 / (i + 1)],
            weight_versions=[i],
            rollout_routed_experts=np.full((2, 1, 2), i, np.uint8),
            remove_sample=i == 1,
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("suffix", ["pt", "json"])
def test_what_is_saved_is_loaded(tmp_path, suffix):
    path = f"{tmp_path}/{{rollout_id}}.{suffix}"
    dump.save(path, 3, samples(5))
    found = dump.load(DebugConfig(load_debug_rollout_data=path), 3)
    assert found == samples(5)
    for ours, theirs in zip(found, samples(5), strict=True):
        np.testing.assert_array_equal(ours.rollout_routed_experts, theirs.rollout_routed_experts)
    with pytest.raises(DataError, match=r"4\.\w+ cannot be read \(No such file"):
        dump.load(DebugConfig(load_debug_rollout_data=path), 4)


@pytest.mark.parametrize(
    ("share", "left"), [(1.0, [0, 1, 2, 3, 4]), (0.6, [0, 3, 4]), (0.5, [0, 4]), (0.1, [])]
)
def test_a_share_is_taken_from_both_ends(tmp_path, share, left):
    path = f"{tmp_path}/{{rollout_id}}.json"
    dump.save(path, 0, samples(5))
    debug = DebugConfig(load_debug_rollout_data=path, load_debug_rollout_data_subsample=share)
    assert [sample.index for sample in dump.load(debug, 0)] == left


def test_a_replay_has_the_rewards_masks_and_versions_that_were_saved(tmp_path):
    path = f"{tmp_path}/{{rollout_id}}.json"
    dump.save(path, 0, samples(4))
    debug = {"load_debug_rollout_data": path, "debug_train_only": True}
    cfg = config(tmp_path, debug=debug, rollout={"num_rollout": 1}, data={"prompt_data": None})

    async def replay():
        service = Service(cfg)
        try:
            return await service.collect(0, 7)
        finally:
            await service.close()

    batch, metrics, state = asyncio.run(replay())
    assert batch.raw_rewards.tolist() == pytest.approx([0, 1 / 3, 0, 1 / 3])
    assert batch.loss_mask.tolist() == [1, 0, 1, 1]
    np.testing.assert_array_equal(batch.weight_versions, [0, 1, 2, 3])
    assert metrics["rollout/truncated_ratio"] == 1.0 and state == {}
