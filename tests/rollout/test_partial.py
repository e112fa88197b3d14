"""Partial rollout: what was begun is kept, survives a restart, and is gone on with."""

import asyncio
from collections import Counter

import numpy as np
import orjson

from spmd_rl.rollout.service import Service
from spmd_rl.types import Status
from tests.models import tiny_model
from tests.rollout.collecting import config
from tests.rollout.user_hooks import SEEN
from tests.stub_engine import EXPERTS, Answer, stub_engine

HALF = 3  # tokens when the abort comes


def partial(folder, **rollout):
    """Two prompts a rollout of four that are begun, two samples each."""
    settings = {"rollout_batch_size": 2, "over_sampling_batch_size": 4, "partial_rollout": True}
    return config(folder, rollout=settings | rollout)


def rollouts(cfg, answer, count=2, restart=False, routes=None):
    """Batches, metrics and states of some rollouts; with `restart` each by a service of its own."""

    async def play(engine):
        collected = []
        service = Service(cfg)
        await service.connect(engine.addresses)
        for rollout in range(count):
            if restart and collected:
                await service.close()
                service = Service(cfg)
                await service.connect(engine.addresses)
                await service.load_state(orjson.loads(orjson.dumps(collected[-1][2])))
            engine.version = str(rollout)
            collected.append(await service.collect(rollout, rollout))
        await service.close()
        return collected

    with stub_engine(answer) as engine:
        engine.routes = routes
        return asyncio.run(play(engine)), engine


def slow(number, body):
    """The last two of the first four prompts are not ready in time."""
    late = 4 <= number < 8
    return Answer(tokens=HALF, until_abort=True) if late else Answer(tokens=5)


def test_unfinished_groups_go_first_into_the_next_rollout(tmp_path):
    (first, second), engine = rollouts(partial(tmp_path), slow)
    kept = first[2]["buffer"]
    assert [[s["index"] for s in group] for group in kept] == [[4, 5], [6, 7]]
    assert {s["status"] for group in kept for s in group} == {Status.ABORTED.value}
    assert all(s["metadata"]["start_rollout_id"] == 0 for group in kept for s in group)
    for request, begun in zip(engine.requests[8:12], engine.requests[4:8], strict=True):
        assert len(request["input_ids"]) == len(begun["input_ids"]) + HALF
        now, before = request["sampling_params"], begun["sampling_params"]
        assert now["max_new_tokens"] == 8 - HALF
        assert now["sampling_seed"] == before["sampling_seed"]
    batch = second[0]
    assert batch.response_lengths.tolist() == [HALF + 5] * 4
    assert batch.weight_versions.tolist() == ([0] * HALF + [1] * 5) * 4
    assert batch.loss_mask.all()
    assert second[1]["rollout/partial/resumed_groups"] == 2
    assert second[1]["rollout/partial/offpolicy_token_frac"] == HALF / (HALF + 5)


def test_experts_go_on_where_the_last_answer_ended(tmp_path):
    cfg = partial(tmp_path)
    cfg.algo.use_rollout_routing_replay = True
    cfg.model.hf_checkpoint = str(tiny_model("qwen3_moe"))
    (_, second), engine = rollouts(cfg, slow, restart=True, routes=(2, 2))
    batch = second[0]
    assert batch.routed_lengths.tolist() == (batch.total_lengths - 1).tolist()
    places = np.concatenate([np.arange(length) for length in batch.routed_lengths])
    assert (batch.routed_experts == (places % EXPERTS)[:, None]).all()
    for request in engine.requests[8:12]:  # the last of the tokens before was not routed yet
        assert request["routed_experts_start_len"] == len(request["input_ids"]) - 1


def test_old_tokens_can_be_masked(tmp_path):
    cfg = partial(tmp_path, mask_offpolicy_in_partial_rollout=True)
    (_, second), _ = rollouts(cfg, slow)
    assert second[0].loss_mask.tolist() == ([0] * HALF + [1] * 5) * 4


def test_a_restart_between_rollouts_changes_nothing(tmp_path):
    (_, going), _ = rollouts(partial(tmp_path), slow)
    (_, again), _ = rollouts(partial(tmp_path), slow, restart=True)
    for name in ("tokens", "loss_mask", "rewards", "weight_versions", "rollout_log_probs"):
        assert getattr(going[0], name).tolist() == getattr(again[0], name).tolist()


def test_a_finished_member_of_an_unfinished_group_is_not_generated_again(tmp_path):
    def one_late(number, body):
        return Answer(tokens=HALF, until_abort=True) if number in (5, 7) else Answer(tokens=5)

    (first, second), engine = rollouts(partial(tmp_path, group_requests=False), one_late)
    kept = first[2]["buffer"]
    assert [[s["status"] for s in group] for group in kept] == [["completed", "aborted"]] * 2
    assert all(group[0]["reward"] is not None for group in kept)
    assert second[0].response_lengths.tolist() == [5, HALF + 5] * 2


def test_sample_hooks_see_a_finished_sample_once_though_its_group_comes_again(tmp_path):
    def one_late(number, body):
        return Answer(tokens=HALF, until_abort=True) if number in (5, 7) else Answer(tokens=5)

    SEEN.clear()
    hook = "tests.rollout.user_hooks.counting_hook"
    (_, second), _ = rollouts(
        partial(tmp_path, group_requests=False, rollout_sample_hook_path=hook), one_late
    )
    seen = Counter(SEEN["indices"])
    assert set(second[0].rollout_ids.tolist()) <= set(seen) and max(seen.values()) == 1


def test_in_deterministic_mode_what_was_begun_is_finished(tmp_path):
    cfg = partial(tmp_path)
    cfg.sglang["enable_deterministic_inference"] = True
    (first, second), engine = rollouts(cfg, lambda number, body: Answer(tokens=5))
    kept = first[2]["buffer"]
    assert [[s["status"] for s in group] for group in kept] == [["completed"] * 2] * 2
    assert engine.aborts == 0 and second[0].response_lengths.tolist() == [5] * 4


def test_the_buffer_filter_chooses(tmp_path):
    cfg = partial(tmp_path, buffer_filter_path="tests.rollout.user_hooks.newest_first")
    (_, second), _ = rollouts(cfg, slow)
    assert second[2]["buffer"][0][0]["index"] == 4  # the oldest waits
