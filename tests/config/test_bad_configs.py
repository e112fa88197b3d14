"""Bad configurations, each through the real program: one sentence with key and fix, exit 2."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.config.inputs import good, make_model, make_rows, write
from tests.models import ROOT

MAIN = str(ROOT / "launch" / "main.py")
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_PROCID")


def dry_run(*words: str, cwd: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    env = {key: value for key, value in os.environ.items() if key not in LAUNCHERS}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, MAIN, "--dry-run", *words],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
    )
    return done, time.monotonic() - start


# name -> (changes to sections, words after --config X, what the one sentence must hold)
BAD = {
    "unknown key": (
        {"rollout": {"n_sample_per_prompt": 4, "n_samples_per_prompt": None}},
        [],
        ["config.yaml:", "rollout.n_sample_per_prompt", "did you mean", "n_samples_per_prompt?"],
    ),
    "misspelt section": (
        {"rolout": {"rollout_temperature": 0.5}},
        [],
        ["config.yaml:", "'rolout' is not a section", "did you mean 'rollout'"],
    ),
    "wrong type": (
        {"train": {"lr": "fast"}},
        [],
        ["config.yaml:", "train.lr must be a number, not fast", "change it"],
    ),
    "impossible batch equation": (
        {"train": {"global_batch_size": 24}, "rollout": {"num_steps_per_rollout": 2}},
        [],
        ["config.yaml:", "8 x n_samples_per_prompt 4 = 32", "24 x", "= 48", "make them equal"],
    ),
    "world size that does not fit": (
        {"megatron": {"tensor_model_parallel_size": 2}},
        ["--world", "5", "placement.colocate=false", "placement.rollout_num_gpus=2"],
        ["megatron.tensor_model_parallel_size 2 does not divide the 3 train ranks", "start"],
    ),
    "name that leads elsewhere": (
        {"logging": {"name": "../elsewhere"}},
        [],
        ["config.yaml:", "logging.name '../elsewhere' is no plain name", "use letters"],
    ),
    "missing file": (
        {"data": {"prompt_data": "nowhere/train.jsonl"}},
        [],
        ["config.yaml:", "data.prompt_data", "nowhere/train.jsonl does not exist", "give"],
    ),
    "model without tokenizer": (
        {"model": {"hf_checkpoint": "bare"}},
        [],
        ["config.yaml:", "model.hf_checkpoint bare has no tokenizer", "copy"],
    ),
    "unknown sglang key": (
        {"sglang": {"mem_fraction_statics": 0.5}},
        [],
        ["config.yaml:", "sglang.mem_fraction_statics", "did you mean sglang.mem_fraction_static?"],
    ),
    "unknown megatron key": (
        {"megatron": {"recompute_granularty": "full"}},
        [],
        ["megatron.recompute_granularty", "did you mean megatron.recompute_granularity?"],
    ),
    "bad override syntax": (
        {},
        ["num_rollout:3"],
        ["override 1 'num_rollout:3'", "section.key=value", "such as"],
    ),
    "label column missing": (
        {"data": {"label_key": "solution"}},
        [],
        ["data.label_key 'solution' is no column of", "rows.jsonl:1", "question, answer", "change"],
    ),
    "colocate with too few GPUs": (
        {"placement": {"rollout_num_gpus_per_engine": 4}},
        ["--world", "2"],
        ["config.yaml:", "placement.rollout_num_gpus_per_engine 4", "2 GPUs", "choose"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_one_sentence_with_key_and_fix(name: str, tmp_path: Path):
    changes, words, expected = BAD[name]
    make_model(tmp_path / "bare", leave_out="tokenizer.json")
    values = good(tmp_path)
    for section, keys in changes.items():
        for key in [key for key, value in keys.items() if value is None]:
            values[section].pop(key, None)
    kept = {s: {k: v for k, v in keys.items() if v is not None} for s, keys in changes.items()}
    path = write(tmp_path, values, **kept)
    done, seconds = dry_run("--config", path.name, *words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for part in expected:
        assert part in done.stderr
    assert seconds < 30, f"{seconds:.1f} s: something heavy was imported"
    print(f"{seconds:.2f} s: {done.stderr}", end="")


def test_all_faults_come_at_once_in_the_file_and_the_overrides(tmp_path: Path):
    path = write(tmp_path, good(tmp_path), train={"lr": "fast"}, sglang={"port": 1})
    done, _ = dry_run("--config", path.name, "num_rolout=1", "eps_clip=-1", cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 4, done.stderr
    for part in ("train.lr", "sglang.port", "rollout.num_rollout?", "algo.eps_clip"):
        assert part in done.stderr


def test_a_good_one_is_printed_with_who_is_where(tmp_path: Path):
    path = write(tmp_path, good(tmp_path))
    done, _ = dry_run("--config", path.name, "--world", "4", "lr=1e-4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "lr: 0.0001" in done.stdout
    assert "4 ranks on 1 node, colocated, device cpu" in done.stdout


def test_help_and_a_missing_config(tmp_path: Path):
    done, _ = dry_run("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "section.key=value" in done.stdout
    done, _ = dry_run(cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "--config" in done.stderr


def test_under_torchrun_the_sentence_is_printed_once(tmp_path: Path):
    path = write(tmp_path, good(tmp_path), train={"lr": "fast"})
    env = {key: value for key, value in os.environ.items() if key not in LAUNCHERS}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + [MAIN, "--config", str(path)],
        cwd=tmp_path,
        env=env | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert done.stderr.count("train.lr must be a number") == 1, done.stderr


def test_rows_are_named_by_file_and_line(tmp_path: Path):
    rows = make_rows(tmp_path / "rows.jsonl")
    values = good(tmp_path)
    rows.write_text("\n\n{broken\n")
    path = write(tmp_path, values)
    done, _ = dry_run("--config", path.name, cwd=tmp_path)
    assert "rows.jsonl:3: not JSON" in done.stderr
