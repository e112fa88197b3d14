"""Every algorithm's way through a rollout of two optimizer steps on two data-parallel ranks."""

from __future__ import annotations

import dataclasses
import traceback

import pytest
import torch

from tests.models import tiny_model
from tests.ranks import run_ranks
from tests.trainer.cases import Ranks, config, ok, ragged_batch, shard_of

TWO_STEPS = {
    "lr": 1e-2,
    "clip_grad": 1.0,
    "use_dynamic_batch_size": True,
    "max_tokens_per_gpu": 64,
    "global_batch_size": 6,
}
CASES: dict[str, dict] = {
    "grpo": {},
    "grpo_one_step": {"one_step": True},
    "gspo": {"advantage_estimator": "gspo", "eps_clip": 4e-4},
    "cispo": {"advantage_estimator": "cispo", "eps_clip": 1.0},
    "rloo": {"advantage_estimator": "rloo"},
    "rollout_logprobs": {"use_rollout_logprobs": True},
    "tis": {"use_tis": True},
    "r_plus_plus": {
        "advantage_estimator": "reinforce_plus_plus",
        "normalize_advantages": True,
        "kl_coef": 0.1,
    },
    "baseline": {
        "advantage_estimator": "reinforce_plus_plus_baseline",
        "normalize_advantages": True,
        "use_kl_loss": True,
        "kl_loss_coef": 0.1,
    },
    "sft": {"loss_type": "sft_loss"},
}


def batch_of(ranks, trainer, masked_rank: int | None = None):
    """The ragged batch with the trainer's log-probs as the engine's; perhaps a rank all masked."""
    from spmd_rl.trainer.data import RolloutData

    batch = ragged_batch(siblings=False)
    batch.loss_mask[: batch.response_lengths[0]] = 1
    if masked_rank is not None:
        batch.loss_mask[:] = 0
        batch.loss_mask[: batch.response_lengths[0]] = 1
    import torch.distributed as dist

    shard = shard_of(batch, trainer.cfg, trainer.placement, trainer.groups.dp_rank)
    mine = trainer.passes.log_probs(RolloutData(shard, trainer.cfg, trainer.groups, trainer.device))
    # back into the batch's order: this rank's samples are those whose tokens the shard holds
    whole = torch.zeros(len(batch.loss_mask), dtype=torch.float64)
    starts = batch.response_lengths.cumsum() - batch.response_lengths
    place = {int(i): k for k, i in enumerate(batch.rollout_ids)}
    begin = 0
    for i, size in zip(shard.batch.rollout_ids, shard.batch.response_lengths, strict=True):
        first = starts[place[int(i)]]
        whole[first : first + size] = mine[begin : begin + size].double()
        begin += size
    dist.all_reduce(whole)
    return dataclasses.replace(batch, rollout_log_probs=whole.float().numpy())


def rank_algorithms(model: str, folder: str) -> None:
    with Ranks() as ranks:
        for name, algo in CASES.items():
            algo = dict(algo)
            train = TWO_STEPS | ({"global_batch_size": 12} if algo.pop("one_step", False) else {})
            cfg = config(model, algo=algo, train=train, debug={"ci_test": True})
            trainer = ranks.trainer(cfg)
            metrics = [ranks.train(trainer, batch_of(ranks, trainer), k) for k in (0, 1)]
            ranks.keep(folder, name, metrics)
        rank_odd_cases(ranks, model, folder)


def rank_odd_cases(ranks: Ranks, model: str, folder: str) -> None:
    """One rank without a single unmasked token; an engine that disagrees under ci_test."""
    whitened = {"normalize_advantages": True}
    trainer = ranks.trainer(config(model, algo=whitened, train=TWO_STEPS))
    ranks.keep(folder, "masked", ranks.train(trainer, batch_of(ranks, trainer, masked_rank=1)))
    trainer = ranks.trainer(config(model, train=TWO_STEPS, debug={"ci_test": True}))
    try:
        ranks.train(trainer, ragged_batch(siblings=False))
    except RuntimeError:
        ranks.keep(folder, "gate", traceback.format_exc())


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("algorithms")
    model = tiny_model("qwen3", kv_heads=2)
    ok(run_ranks(2, rank_algorithms, str(model), str(folder), limit=200))
    return {p.stem: torch.load(p, weights_only=False) for p in folder.glob("*.pt")}


POLICIES = [name for name in CASES if name not in ("sft", "grpo_one_step")]


@pytest.mark.parametrize("name", POLICIES)
def test_the_first_step_is_on_policy_and_the_second_is_not(results, name):
    for metrics in results[name]:
        first, second = metrics["train/ppo_kl"]
        assert abs(first) < 1e-6 and abs(second) > 1e-5
        assert len(metrics["train/loss"]) == len(metrics["train/grad_norm"]) == 2
        assert all(norm > 0 for norm in metrics["train/grad_norm"])
        gaps = metrics["train/train_rollout_logprob_abs_diff_max"]
        assert max(gaps) < 1e-5  # log-probs of the weights that sampled, not of the updated ones
        assert abs(metrics["rollout/rollout_log_probs"]) > 1


def test_one_step_needs_no_old_log_probs(results):
    for metrics in results["grpo_one_step"]:
        assert metrics["train/ppo_kl"] == [0.0] and metrics["train/pg_clipfrac"] == [0.0]
        assert "perf/log_probs_time" not in metrics
        assert max(metrics["train/train_rollout_logprob_abs_diff_max"]) < 1e-5
    assert "perf/log_probs_time" in results["grpo"][0]


def test_the_reference_stays_where_it_was(results):
    first, second = results["baseline"]
    assert first["train/kl_loss"][0] == 0 and second["train/kl_loss"][0] != 0
    gap = [abs(m["rollout/log_probs"] - m["rollout/ref_log_probs"]) for m in (first, second)]
    assert gap[0] == 0 and gap[1] > 1e-4
    assert "perf/ref_log_probs_time" in first


def test_whitened_advantages(results):
    assert abs(results["r_plus_plus"][0]["rollout/advantages"]) < 1
    metrics = results["masked"]
    assert all(torch.isfinite(torch.tensor(metrics["train/loss"])))


def test_tis_weighs_by_one_where_the_engine_agrees(results):
    tis = results["tis"][0]
    assert tis["train/tis"][0] == pytest.approx(1, abs=1e-5)
    assert tis["train/tis_clipfrac"] == [0.0, 0.0]
    assert tis["train/loss"][0] == pytest.approx(results["grpo"][0]["train/loss"][0], abs=1e-5)


def test_sft_learns(results):
    first, second = results["sft"]
    assert second["train/loss"][1] < first["train/loss"][0]
    assert first["train/loss"][0] > 3
    assert "train/ppo_kl" not in first


def test_a_gate_says_what_is_wrong(results):
    assert "debug.ci_test, rollout 0: log-probs of trainer and engine differ by" in results["gate"]
