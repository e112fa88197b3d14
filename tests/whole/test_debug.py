"""Customisation and debugging on whole jobs: every hook in one run, its dumps, and a run that
trains on them again, bit for bit, without engines; a run without a trainer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.models import ROOT, tiny_model
from tests.whole.jobs import metrics, run_job, succeed, weights, write_config

HOOKS = "tests.whole.hooks"
EVERY = {
    "rollout": {
        "rollout_function_path": f"{HOOKS}.whole_rollout",
        "rollout_sample_hook_path": f"{HOOKS}.shout",
        "rollout_sample_filter_path": f"{HOOKS}.drop_empty",
        "rollout_all_samples_process_path": f"{HOOKS}.look",
        "custom_convert_samples_to_train_data_path": f"{HOOKS}.columns",
        "rollout_data_postprocess_path": f"{HOOKS}.halve_advantages",
        "custom_rollout_log_function_path": f"{HOOKS}.log_rollout",
    },
    "data": {"data_source_path": f"{HOOKS}.Questions"},
    "algo": {"keep_old_actor": True},  # what was pushed counts in a replay too
    "eval": {"eval_interval": 2, "custom_eval_rollout_log_function_path": f"{HOOKS}.log_eval"},
}


def every(folder: Path) -> dict:
    data = {"eval_prompt_data": [str(folder / "prompts.jsonl")]}
    return EVERY | {"eval": EVERY["eval"] | data}


@pytest.fixture(scope="module")
def hooked(tmp_path_factory) -> Path:
    """Two rollouts with a function at every point, stopped after the first and resumed."""
    folder = tmp_path_factory.mktemp("hooked")
    details = {"dump_details": str(folder / "details")}
    write_config(folder, debug=details, checkpoint={"save_interval": 1}, **every(folder))
    succeed(folder, "num_rollout=1")
    succeed(folder)
    return folder


def test_every_function_has_its_say(hooked: Path) -> None:
    lines = metrics(hooked / "runs" / "job")
    rollouts = [line for line in lines if "train/loss" in line]
    assert [line["rollout/mine"] for line in rollouts] == [16, 16]
    assert "rollout/raw_reward" in rollouts[0]
    evaluations = [line for line in lines if "eval/mine" in line]
    assert [line["rollout"] for line in evaluations] == [-1, 0, 1]
    assert "eval/aime" not in evaluations[0]  # ours were left out
    told = (hooked / "runs" / "job" / "logs" / "collector.log").read_text()
    assert "looked at 4 groups of 1000" in told


def test_details_tell_what_was_generated_and_trained_on(hooked: Path) -> None:
    details = hooked / "details"
    dumps = [torch.load(details / f"rollout_data/{k}.pt", weights_only=True) for k in (0, 1)]
    assert [dump["rollout_id"] for dump in dumps] == [0, 1]
    groups = [{s["group_index"] for s in dump["samples"]} for dump in dumps]
    assert groups == [set(range(4)), set(range(4, 8))]  # the data source went on
    assert all("!" in s["metadata"]["shouted"] for dump in dumps for s in dump["samples"])
    evaluated = torch.load(details / "rollout_data/eval_2.pt", weights_only=True)
    assert len(evaluated["samples"]) == 6
    trained = [
        torch.load(details / f"train_data/1_{rank}.pt", weights_only=True) for rank in (0, 1)
    ]
    for rank, found in enumerate(trained):
        assert (found["rollout_id"], found["rank"]) == (1, rank)
        columns = found["rollout_data"]
        for size, advantage in zip(columns["response_lengths"], columns["advantages"], strict=True):
            assert advantage.shape == (size,) and advantage.abs().max() <= 0.5
    assert sum(len(found["rollout_data"]["rewards"]) for found in trained) == 16


def test_the_viewer_shows_the_trainers_own_numbers(hooked: Path, tmp_path: Path) -> None:
    page, dump = tmp_path / "page.html", hooked / "details" / "rollout_data" / "1.pt"
    words = [str(dump), "--html", str(page), "--model", str(tiny_model("qwen3"))]
    argv = [sys.executable, "tools/show_rollout.py", *words]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    data = page.read_text().split('<script id="data" type="application/json">')[1]
    samples, _ = json.JSONDecoder().raw_decode(data)
    gaps = [gap for sample in samples for gap in sample["gap"]]
    assert len(samples) == 16 and max(gaps) <= 1e-5
    assert {abs(a) for sample in samples for a in sample["advantage"]} <= {0, 0.25}


def test_saved_rollouts_train_bit_for_bit_as_in_the_run_that_saved_them(
    hooked: Path, tmp_path: Path
) -> None:
    write_config(tmp_path, **every(tmp_path))
    saved = str(hooked / "details" / "rollout_data" / "{rollout_id}.pt")
    outcome = run_job(tmp_path, f"load_debug_rollout_data={saved}")
    assert outcome.statuses == [0], outcome.output
    assert "engines:   none" in outcome.output
    run, original = tmp_path / "runs" / "job", hooked / "runs" / "job"
    assert weights(run) == weights(original)
    theirs = [line for line in metrics(original) if "train/loss" in line]
    for ours, line in zip(metrics(run), theirs, strict=True):
        names = [n for n in line if n.startswith("train/") or n == "rollout/raw_reward"]
        assert [ours[n] for n in names] == [line[n] for n in names] and len(names) > 10


def test_without_a_trainer_engines_generate_from_the_model_as_it_is(tmp_path: Path) -> None:
    write_config(tmp_path, debug={"debug_rollout_only": True})
    saved = tmp_path / "samples" / "{rollout_id}.json"
    run = succeed(tmp_path, f"save_debug_rollout_data={saved}", ranks=1)
    lines = metrics(run)
    assert [line["rollout"] for line in lines] == [0, 1]
    assert all("rollout/raw_reward" in line and "train/loss" not in line for line in lines)
    samples = json.loads(saved.with_name("1.json").read_text())["samples"]
    assert len(samples) == 16 and all(s["rollout_log_probs"] for s in samples)
    assert not (run / "hf").exists() and not (run / "checkpoints").exists()
