"""Whole runs: both placements learn from the same engines' samples, repeat and resume bitwise."""

from pathlib import Path

import pytest
import torch

from tests.whole.jobs import metrics, succeed, weights, write_config


def evaluated(folder: Path, **changes) -> None:
    """A configuration with an evaluation before the first rollout and after each."""
    data = ["sums", str(folder / "prompts.jsonl")]
    write_config(folder, eval={"eval_interval": 1, "eval_prompt_data": data}, **changes)


def of_rollouts(run: Path) -> list[dict]:
    return [line for line in metrics(run) if "train/loss" in line]


def of_evaluations(run: Path) -> list[tuple[int, float]]:
    return [(line["rollout"], line["eval/sums"]) for line in metrics(run) if "eval/sums" in line]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """Three colocated rollouts in one go."""
    folder = tmp_path_factory.mktemp("unbroken")
    evaluated(folder)
    return succeed(folder, "num_rollout=3")


def test_a_run_leaves_what_it_promises(unbroken: Path) -> None:
    lines = of_rollouts(unbroken)
    assert [line["rollout"] for line in lines] == [0, 1, 2]
    for line in lines:
        assert max(line["train/train_rollout_logprob_abs_diff_max"]) <= 1e-5
        assert "perf/check_weights_time" in line  # every tensor was compared after the push
    assert [rollout for rollout, _ in of_evaluations(unbroken)] == [-1, 0, 1, 2]
    for name in ("config.yaml", "summary.json", "reward.png", "timeline.html"):
        assert (unbroken / name).stat().st_size > 0
    assert list((unbroken / "tensorboard").iterdir())


def test_the_model_learned_is_one_that_transformers_loads(unbroken: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(unbroken / "hf", dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(unbroken / "hf")("What is 1+4?", return_tensors="pt")
    assert model(**tokens).logits.isfinite().all()


def test_stopped_and_resumed_is_bitwise_the_same(unbroken: Path, tmp_path: Path) -> None:
    evaluated(tmp_path, checkpoint={"save_interval": 1})
    succeed(tmp_path, "num_rollout=2")
    run = succeed(tmp_path, "num_rollout=3")
    assert weights(run) == weights(unbroken)
    names = ("rollout/raw_reward", "train/loss", "train/grad_norm")
    for ours, theirs in zip(of_rollouts(run), of_rollouts(unbroken), strict=True):
        assert [ours[name] for name in names] == [theirs[name] for name in names]
    assert of_evaluations(run) == of_evaluations(unbroken)


def test_separate_ranks_make_the_same_model(unbroken: Path, tmp_path: Path) -> None:
    """Their engines evaluate what they hold while the next weights are trained."""
    placement = {"device": "cpu", "colocate": False, "rollout_num_gpus": 1}
    evaluated(tmp_path, placement=placement)
    run = succeed(tmp_path, "num_rollout=3")
    assert of_evaluations(run) == of_evaluations(unbroken)
    for ours, theirs in zip(of_rollouts(run), of_rollouts(unbroken), strict=True):
        assert ours["rollout/raw_reward"] == theirs["rollout/raw_reward"]
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-6)
        assert "perf/check_weights_time" in ours
