"""The record of a run: names, axes, resume, and what is made of it."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spmd_rl import plots
from spmd_rl.config.schema import Config
from spmd_rl.metrics import FILE, Metrics, read
from spmd_rl.summary import load, summarise, write_summary


def config(**logging) -> Config:
    return Config.model_validate(
        {
            "model": {"hf_checkpoint": "unused"},
            "rollout": {"rollout_batch_size": 4, "n_samples_per_prompt": 2},
            "train": {"global_batch_size": 4},
            "logging": logging,
        }
    )


def events(run_dir, name):
    accumulator = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return [(event.step, round(event.value, 4)) for event in accumulator.Scalars(name)]


def values(rollout: int) -> dict:
    return {
        "rollout/raw_reward": rollout / 10,
        "train/loss": [1.0 + rollout, 2.0 + rollout],
        "train/grad_norm": 0.5,
        "perf/step_time": 2.0,
    }


def test_names_axes_and_files(tmp_path):
    metrics = Metrics(config(), tmp_path)
    metrics.log_eval(-1, {"eval/sums": 0.25, "eval/sums/response_len/mean": 9})
    for rollout in range(3):
        metrics.log(rollout, values(rollout))
    metrics.log_eval(2, {"eval/sums": 0.75})
    metrics.close()
    lines = read(tmp_path / FILE)
    assert [line["rollout"] for line in lines] == [-1, 0, 1, 2, 2]
    assert lines[2] | values(1) == lines[2]
    assert events(tmp_path, "rollout/raw_reward") == [(0, 0.0), (1, 0.1), (2, 0.2)]
    assert events(tmp_path, "train/loss") == [(0, 1), (1, 2), (2, 2), (3, 3), (4, 3), (5, 4)]
    assert events(tmp_path, "train/grad_norm") == [(1, 0.5), (3, 0.5), (5, 0.5)]
    assert events(tmp_path, "eval/sums") == [(0, 0.25), (2, 0.75)]


def test_resume_drops_what_is_done_again(tmp_path):
    metrics = Metrics(config(), tmp_path)
    metrics.log_eval(-1, {"eval/sums": 0.25})
    for rollout in range(5):
        metrics.log(rollout, values(rollout))
    metrics.close()
    with open(tmp_path / FILE, "a") as file:
        file.write('{"rollout": 5, "ti')  # the crash came in the middle of a line
    resumed = Metrics(config(), tmp_path, start_rollout=3)
    resumed.log(3, values(7))
    resumed.close()
    assert [line["rollout"] for line in read(tmp_path / FILE)] == [-1, 0, 1, 2, 3]
    assert events(tmp_path, "rollout/raw_reward") == [(0, 0), (1, 0.1), (2, 0.2), (3, 0.7)]
    assert events(tmp_path, "eval/sums") == [(0, 0.25)]


def test_a_new_run_in_the_same_folder_starts_empty(tmp_path):
    for _ in range(2):
        metrics = Metrics(config(), tmp_path)
        metrics.log(0, values(0))
        metrics.close()
    assert len(read(tmp_path / FILE)) == 1


def test_values_that_are_not_finite_stay_valid_json(tmp_path):
    metrics = Metrics(config(), tmp_path)
    metrics.log(0, {"train/loss": float("nan"), "train/grad_norm": [1.0, float("inf")]})
    metrics.close()
    text = (tmp_path / FILE).read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text)["train/grad_norm"] == [1.0, None]
    assert events(tmp_path, "train/grad_norm") == [(0, 1.0)]


def test_missing_wandb_is_a_sentence(tmp_path):
    try:
        import wandb  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="use_wandb.*pip install wandb"):
            Metrics(config(use_wandb=True), tmp_path)


def test_plots_and_summary(tmp_path):
    metrics = Metrics(config(), tmp_path)
    metrics.log_eval(-1, {"eval/sums": 0.25, "eval/sums-truncated_ratio": 0})
    for rollout in range(3):
        generated = {"perf/check_weights_time": 0.1, "perf/rollout_time": 1.0}
        gap = {"train/train_rollout_logprob_abs_diff_max": [1e-6, 2e-6 * rollout]}
        metrics.log(rollout, values(rollout) | gap | generated)
    metrics.log_eval(2, {"eval/sums": 0.75})
    metrics.close()
    drawn = plots.draw(tmp_path)
    assert [path.name for path in drawn] == ["reward.png", "loss.png", "eval.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in drawn)
    write_summary(tmp_path, minutes=1.234, peak_rss=3 * 2**30)
    assert load(tmp_path) == {
        "rollouts": 3,
        "eval": "eval/sums",
        "eval_before": 0.25,
        "eval_after": 0.75,
        "reward_first": 0.0,
        "reward_last": 0.2,
        "max_logprob_diff": 4e-6,
        "weights_equal": True,
        "seconds_per_rollout": 2.0,
        "minutes": 1.23,
        "peak_rss_gib": 3.0,
    }


def test_sft_has_no_reward(tmp_path):
    metrics = Metrics(config(), tmp_path)
    metrics.log(0, values(0))
    metrics.close()
    assert [path.name for path in plots.draw(tmp_path)] == ["loss.png"]
    assert "reward_first" not in summarise(read(tmp_path / FILE))


def test_summary_claims_nothing_that_was_not_measured():
    summary = summarise([])
    assert summary["weights_equal"] is None and summary["max_logprob_diff"] is None
    assert "eval_after" not in summary


def test_one_push_that_was_not_compared_shows():
    lines = [{"rollout": k, "perf/step_time": 1.0} for k in range(2)]
    lines[0]["perf/check_weights_time"] = 0.1
    assert summarise(lines)["weights_equal"] is False
