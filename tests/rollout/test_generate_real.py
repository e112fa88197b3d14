"""The collector against a real engine: tokens, log-probs, versions and seeds."""

from __future__ import annotations

import numpy as np

from spmd_rl.rollout.fleet import EngineAddresses
from tests.engine import KEY, hf_log_probs
from tests.rollout.collecting import collecting, config


def rollouts(engine, folder, count=1, **sections):
    addresses = EngineAddresses([engine.url], engine.url, KEY)
    with collecting(config(folder, **sections), folder, addresses) as collector:
        return [collector.collect(rollout, version=3) for rollout in range(count)]


def log_probs_are_the_models(engine, batch):
    """Every log-prob is what transformers gives the token there; the prompts."""
    assert batch.rollout_log_probs is not None and batch.weight_versions is not None
    assert len(batch.rollout_log_probs) == batch.response_lengths.sum()
    rows = [row.tolist() for row in batch.pieces(np.arange(len(batch)))["tokens"]]
    split = (batch.total_lengths - batch.response_lengths).tolist()
    prompts = [row[:at] for row, at in zip(rows, split, strict=True)]
    outputs = [row[at:] for row, at in zip(rows, split, strict=True)]
    expected = np.concatenate(hf_log_probs(engine.model, prompts, outputs))
    np.testing.assert_allclose(batch.rollout_log_probs, expected, atol=1e-5)
    return prompts


def test_tokens_and_log_probs_log_probs_are_the_models(engine, tmp_path):
    [rollout] = rollouts(engine, tmp_path, reward={"rm_type": "random"})
    batch = rollout.batch
    assert len(batch) == 8
    assert set(batch.loss_mask) == {1}
    np.testing.assert_array_equal(batch.rollout_ids, np.arange(8))
    prompts = log_probs_are_the_models(engine, batch)
    assert prompts[0] == prompts[1] != prompts[2]
    assert batch.truncated is not None
    np.testing.assert_array_equal(batch.truncated, batch.response_lengths == 8)
    assert rollout.metrics["rollout/response_len/max"] == 8
    assert rollout.metrics["perf/rollout_time"] > 0
    assert rollout.state["sample_offset"] == 4


def test_an_aborted_response_is_gone_on_with(engine, tmp_path):
    rollout = {
        "rollout_batch_size": 2,
        "over_sampling_batch_size": 8,
        "partial_rollout": True,
        "rollout_max_response_len": 200,
        "rollout_stop_token_ids": list(range(0, 1000, 20)),  # lengths differ
    }
    found = rollouts(engine, tmp_path, 5, reward={"rm_type": "random"}, rollout=rollout)
    aborted = {
        sample["index"]: sample["response_length"]
        for one in found
        for group in one.state.get("buffer", ())
        for sample in group
        if sample["status"] == "aborted" and sample["response_length"]
    }
    assert aborted
    lengths = {
        int(index): int(length)
        for one in found
        for index, length in zip(one.batch.rollout_ids, one.batch.response_lengths, strict=True)
    }
    resumed = aborted.keys() & lengths.keys()
    assert resumed and all(lengths[index] > aborted[index] for index in resumed)
    for one in found:
        log_probs_are_the_models(engine, one.batch)
        assert one.metrics["rollout/partial/launched_groups"] == (
            2 + one.metrics["rollout/partial/kept_groups"]
        )


def test_seeds_make_the_samples_however_they_are_sent(engine, tmp_path):
    reward = {"rm_type": "random"}
    one, two = (
        rollouts(engine, tmp_path, 2, reward=reward, rollout={"group_requests": together})
        for together in (True, False)
    )
    for mine, theirs in zip(one, two, strict=True):
        np.testing.assert_array_equal(mine.batch.tokens, theirs.batch.tokens)
    assert one[0].batch.tokens.tolist() != one[1].batch.tokens.tolist()


def test_greedy_text_is_judged_and_evaluated(engine, tmp_path):
    data = str(tmp_path / "rows.jsonl@[0:6]")
    cfg = config(
        tmp_path,
        eval={
            "eval_interval": 1,
            "eval_prompt_data": ["first", data, "second", data],
            "eval_temperature": 0.0,
            "n_samples_per_eval_prompt": 2,
            "eval_max_response_len": 5,
            "log_passrate": True,
        },
    )
    addresses = EngineAddresses([engine.url], engine.url, KEY)
    with collecting(cfg, tmp_path, addresses) as collector:
        collector.begin_evaluation(0)
        metrics = collector.finish_evaluation()
    assert metrics["eval/first"] == metrics["eval/second"] == 0.0
    assert metrics["eval/first-pass@2"] == 0.0
    assert metrics["eval/first/response_len/max"] <= 5
    assert 0 <= metrics["eval/first-truncated_ratio"] <= 1
