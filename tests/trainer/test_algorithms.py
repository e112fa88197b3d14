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
    "keep_old_actor": {"keep_old_actor": True},
}
USER = "tests.trainer.user_losses"
USER_CASES: dict[str, dict] = {
    "advantage": {"custom_advantage_function_path": f"{USER}:advantage"},
    "loss": {
        "loss_type": "custom_loss",
        "custom_loss_function_path": f"{USER}.plain_gradient",
    },
    "reducer": {"custom_pg_loss_reducer_function_path": f"{USER}:mean_reducer"},
    "tis": {"use_tis": True, "custom_tis_function_path": f"{USER}.halving_tis"},
    "tis_metrics": {
        "get_mismatch_metrics": True,
        "custom_tis_function_path": f"{USER}.halving_tis",
    },
    "metrics": {"get_mismatch_metrics": True},
    "postprocess": {},
    "nothing": {},
}
WRONG: dict[str, dict] = {
    "no_advantage": {"custom_advantage_function_path": f"{USER}:no_advantage"},
    "short_advantage": {"custom_advantage_function_path": f"{USER}:short_advantage"},
    "scalar_loss": {
        "loss_type": "custom_loss",
        "custom_loss_function_path": f"{USER}:scalar_loss",
    },
    "wrong_tis": {"use_tis": True, "custom_tis_function_path": f"{USER}:wrong_tis"},
    "wrong_postprocess": {},
    "frozen": {},
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
    data = RolloutData(shard, trainer.cfg, trainer.groups, trainer.device)
    mine, _ = trainer.actor.passes.forward(data)
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
        rank_user_cases(ranks, model, folder)
        rank_other_weights(ranks, model, folder)


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


def rank_user_cases(ranks: Ranks, model: str, folder: str) -> None:
    """One trainer and one step for each function; what wrong ones are told."""
    from spmd_rl.trainer.loss import Loss

    one_step = TWO_STEPS | {"global_batch_size": 12, "lr": 0.0}
    trainer = ranks.trainer(config(model, train=one_step))
    for name, algo in (USER_CASES | WRONG).items():
        train = dict(one_step)
        if name == "frozen":
            train["freeze_params_name_list"] = ["no_such_layer"]
        trainer.cfg = config(model, algo=algo, train=train)
        if name.endswith("postprocess"):
            trainer.cfg.rollout.rollout_data_postprocess_path = f"{USER}.{name}"
        try:
            if name == "frozen":
                ranks.trainer(trainer.cfg)
            trainer.loss = Loss(trainer.cfg)
            ranks.keep(folder, f"user_{name}", ranks.train(trainer, ragged_batch(siblings=False)))
        except ValueError as error:
            ranks.keep(folder, f"user_{name}", str(error))


def rank_other_weights(ranks: Ranks, model: str, folder: str) -> None:
    """A reference that follows, an old actor two updates behind, and frozen parameters."""
    algo = {"use_kl_loss": True, "ref_update_interval": 2, "keep_old_actor": True}
    train = TWO_STEPS | {"global_batch_size": 12, "lr": 3e-3,
                         "freeze_params_name_list": ["embedding", r"layers\.0\."]}  # fmt: skip
    trainer = ranks.trainer(config(model, algo=algo, train=train))
    start = {name: value.clone() for name, value in trainer.hf_tensors()}
    found = []
    for rollout in range(4):
        if rollout != 2:  # version 2 never reached the engines
            trainer.weights_pushed(rollout)
        batch = batch_of(ranks, trainer)
        version = {0: 0, 1: 1, 2: 1, 3: 3}[rollout]
        versions = torch.full((len(batch.loss_mask),), version, dtype=torch.int32).numpy()
        batch = dataclasses.replace(batch, weight_versions=versions)
        found.append(ranks.train(trainer, batch, rollout))
    end = {name: value.clone() for name, value in trainer.hf_tensors()}
    moved = {name: not torch.equal(value, start[name]) for name, value in end.items()}
    ranks.keep(folder, "other_weights", (found, moved))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("algorithms")
    model = tiny_model("qwen3", kv_heads=2)
    ok(run_ranks(2, rank_algorithms, str(model), str(folder), limit=200))
    return {p.stem: torch.load(p, weights_only=False) for p in folder.glob("*.pt")}


POLICIES = [name for name in CASES if name not in ("sft", "grpo_one_step")]


def test_an_advantage_function(results):
    half, whole = results["user_advantage"], results["user_nothing"]
    assert half["rollout/advantages"] == pytest.approx(whole["rollout/advantages"] / 2)
    assert half["train/loss"] == pytest.approx([whole["train/loss"][0] / 2])


def test_a_look_at_what_is_trained_on(results):
    """Advantages are doubled and every second token masked; denominators stay."""
    found, plain = results["user_postprocess"], results["user_nothing"]
    batch = ragged_batch(siblings=False)
    starts = batch.response_lengths.cumsum() - batch.response_lengths
    want = 0.0
    for start, size, reward in zip(starts, batch.response_lengths, batch.rewards, strict=True):
        mask = batch.loss_mask[start : start + size]
        want -= 2 * reward * mask[::2].sum() / max(mask.sum(), 1) / 12
    assert found["train/pg_loss"][0] == pytest.approx(want, rel=1e-5)
    assert found["train/pg_loss"] != plain["train/pg_loss"]


def test_a_loss_function(results):
    own, built_in = results["user_loss"], results["user_nothing"]
    assert own["train/loss"] == own["train/loss_again"] != built_in["train/loss"]
    # -logp * A has the gradient of the first step's -ratio * A
    assert own["train/grad_norm"] == pytest.approx(built_in["train/grad_norm"], rel=1e-5)
    assert own["train/entropy"] == pytest.approx(built_in["train/entropy_loss"], rel=1e-6)


def test_a_reducer_of_four_arguments(results):
    for name in ("loss", "grad_norm", "pg_loss"):
        want = results["user_nothing"][f"train/{name}"]
        assert results["user_reducer"][f"train/{name}"] == pytest.approx(want, rel=1e-5)


def test_a_correction_function_weighs_rejects_and_reports(results):
    found, plain = results["user_tis"], results["user_nothing"]
    assert found["train/my_gap"][0] != 0
    # ratio and advantage are the same at every token: of n // 2 tokens half remains
    batch = ragged_batch(siblings=False)
    starts = batch.response_lengths.cumsum() - batch.response_lengths
    want = 0.0
    for start, size, reward in zip(starts, batch.response_lengths, batch.rewards, strict=True):
        mask = batch.loss_mask[start : start + size]
        want -= 0.5 * reward * mask[: size // 2].sum() / max(mask.sum(), 1) / 12
    assert found["train/pg_loss"][0] == pytest.approx(want, rel=1e-5)
    assert found["train/entropy_loss"][0] < plain["train/entropy_loss"][0]
    only_looks = results["user_tis_metrics"]
    assert only_looks["train/loss"] == plain["train/loss"]
    assert only_looks["train/my_gap"] == found["train/my_gap"]


def test_mismatch_metrics_change_nothing(results):
    found, plain = results["user_metrics"], results["user_nothing"]
    assert found["train/loss"] == plain["train/loss"]
    for name in ("tis", "ois", "mis_log_ppl_diff", "mis_chi2_seq", "mis_rollout_log_ppl"):
        assert f"train/{name}" in found and f"train/{name}" not in plain


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_advantage", "custom_advantage_function_path set no rollout_data"),
        ("short_advantage", "custom_advantage_function_path: advantages have [1, 1"),
        ("scalar_loss", "custom_loss_function_path returned float: return (loss, metrics)"),
        ("wrong_tis", "custom_tis_function_path returned a tensor"),
        ("wrong_postprocess", "rollout_data_postprocess_path: advantages have [1, 1"),
        ("frozen", "train.freeze_params_name_list: 'no_such_layer' is found in no parameter"),
    ],
)
def test_a_wrong_function_or_pattern_is_told_so(results, name, words):
    assert words in results[f"user_{name}"]


def test_the_old_actor_is_the_one_that_sampled(results):
    """As long as every version is pushed it is the present one, bit for bit; else an older one."""
    names = ("loss", "grad_norm", "ppo_kl")
    for kept, plain in zip(results["keep_old_actor"], results["grpo"], strict=True):
        assert all(kept[f"train/{name}"] == plain[f"train/{name}"] for name in names)
    found, _ = results["other_weights"]
    drift = [metrics["train/ppo_kl"][0] for metrics in found]
    assert [abs(value) > 1e-6 for value in drift] == [False, False, True, False]


def test_the_reference_follows(results):
    """Every second rollout it becomes the policy: the KL of the next rollout begins at 0."""
    found, _ = results["other_weights"]
    kl = [metrics["train/kl_loss"][0] for metrics in found]
    assert [value == 0 for value in kl] == [True, False, True, False]


def test_frozen_parameters_keep_their_bits(results):
    _, moved = results["other_weights"]
    frozen = [name for name in moved if "embed_tokens" in name or "layers.0." in name]
    assert len(frozen) > 5 and not any(moved[name] for name in frozen)
    assert all(moved[name] for name in moved if name not in frozen)


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
