"""A run killed at any instant, told to stop, or out of disk goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spmd_rl.control import REQUEUE
from tests.ranks import Running
from tests.whole.jobs import metrics, run_job, succeed, weights, write_config
from tests.whole.test_faults import rank_process
from tools.compare_runs import lasting

ROLLOUTS = 5
# (rollout, phase) at which a rank is killed, which rank, and overrides of the run that is killed.
KILLS = [
    (0, "collect", 1, ()),
    (1, "train", 0, ()),
    (1, "save_model", 1, ()),
    (2, "update_weights", 0, ("async_save=true",)),
    (2, "eval", 1, ("async_save=true",)),
    (3, "save_model", 0, ("async_save=true",)),
]


def config(folder: Path) -> Path:
    """More prompts are begun than needed and some turned down: groups wait in the buffer."""
    checked = write_config(
        folder,
        rollout={
            "num_rollout": ROLLOUTS,
            "over_sampling_batch_size": 7,
            "dynamic_sampling_filter_path": "tests.whole.hooks.two_of_three",
            "partial_rollout": True,
        },
        train={"deterministic": True},
        eval={"eval_interval": 2, "eval_prompt_data": [str(folder / "prompts.jsonl")]},
        checkpoint={"save_interval": 1},
        debug={"save_debug_rollout_data": str(folder / "samples" / "{rollout_id}.pt")},
    )
    return checked


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    config(folder)
    succeed(folder)
    return folder


def status(folder: Path) -> dict:
    try:
        return json.loads((folder / "runs" / "job" / "status.json").read_text())
    except FileNotFoundError:
        return {"of": 0}


def kill_at(folder: Path, rollout: int, phase: str, rank: int):
    """SIGKILL for a rank as soon as the loop is in that phase, or has gone past it."""

    def act(running: Running) -> None:
        running.wait_for("ready after", limit=120)
        started = time.time()
        victim = rank_process(folder, rank)
        while running.processes[0].poll() is None:
            now = status(folder)
            mine = now.get("at", 0) > started - 5 and now["rollout"] >= rollout
            if mine and (now["rollout"] > rollout or now["phase"] == phase):
                os.kill(victim, signal.SIGKILL)
                return
            time.sleep(0.001)

    return act


def samples(folder: Path) -> list[dict]:
    files = [folder / "samples" / f"{rollout}.pt" for rollout in range(ROLLOUTS)]
    return [torch.load(file, weights_only=True) for file in files]


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    names = events.Tags()["scalars"]
    return lasting({name: [(e.step, e.value) for e in events.Scalars(name)] for name in names})


def told(run: Path) -> list[dict]:
    return [lasting(line) for line in metrics(run)]


@pytest.mark.timeout(1800)  # seven jobs, one after another
def test_killed_in_every_phase_it_ends_bitwise_equal(unbroken: Path, tmp_path: Path) -> None:
    config(tmp_path)
    for rollout, phase, rank, overrides in KILLS:
        killed = run_job(tmp_path, *overrides, act=kill_at(tmp_path, rollout, phase, rank))
        assert killed.statuses[0] not in (0, None), killed.output
        assert killed.left == []
    run = succeed(tmp_path)
    whole = unbroken / "runs" / "job"
    assert weights(run) == weights(whole)
    assert samples(tmp_path) == samples(unbroken)
    assert told(run) == told(whole)
    assert curves(run) == curves(whole)
    assert [line["rollout"] for line in metrics(run)] == [-1, 0, 1, 1, 2, 3, 3, 4, 4]


def test_every_group_that_was_begun_is_trained_on_dropped_or_kept(unbroken: Path) -> None:
    buffered, trained = 0, []
    for line in metrics(unbroken / "runs" / "job"):
        if "train/loss" not in line:
            continue
        of = {key.rpartition("/")[2]: value for key, value in line.items() if "/partial/" in key}
        dropped = line.get("rollout/dynamic_filter/drop_third", 0)
        assert of["launched_groups"] == 4 + dropped + of["kept_groups"]
        buffered += of["kept_groups"] - of["resumed_groups"]
        assert of["buffer_groups"] == buffered
    for rollout in samples(unbroken):
        trained += [sample["index"] for sample in rollout["samples"]]
    assert len(set(trained)) == len(trained) == 4 * 4 * ROLLOUTS
    saved = unbroken / "runs" / "job" / "checkpoints" / f"rollout_{ROLLOUTS:06}" / "state.json"
    assert len(json.loads(saved.read_text())["state"]["data"]["buffer"]) == buffered > 0


@pytest.mark.timeout(900)
def test_two_nodes_start_again_by_themselves(unbroken: Path, tmp_path: Path) -> None:
    """torchrun --max-restarts, one agent a node; only one of them has the rank that is killed."""
    config(tmp_path)
    kill = kill_at(tmp_path, 1, "collect", 1)
    outcome = run_job(tmp_path, act=kill, launcher="torchruns", limit=300)
    assert outcome.statuses == [0, 0], outcome.output
    assert outcome.output.count("ready after") == 2 and outcome.left == []
    run, whole = tmp_path / "runs" / "job", unbroken / "runs" / "job"
    assert weights(run) == weights(whole)
    assert told(run) == told(whole)


def test_a_stop_leaves_what_is_being_collected(tmp_path: Path) -> None:
    hang = "tests.whole.hooks.hang_in_the_second_rollout"
    write_config(tmp_path, rollout={"custom_generate_function_path": hang})

    def stop(running: Running) -> None:
        running.wait_for("rollout 1/2", limit=120)
        os.kill(rank_process(tmp_path, 1), signal.SIGUSR1)  # any rank will do

    left = tmp_path / "status"  # for slurm/run.sbatch
    outcome = run_job(tmp_path, act=stop, env={"SPMD_RL_STATUS_FILE": str(left)})
    assert outcome.statuses == [0] and left.read_text() == f"{REQUEUE}\n", outcome.output
    assert outcome.left == []
    saved = tmp_path / "runs" / "job" / "checkpoints"
    assert [path.name for path in saved.iterdir()] == ["rollout_000001"]
    changed = "allow_changed_keys=[rollout.custom_generate_function_path]"
    run = succeed(tmp_path, "custom_generate_function_path=null", changed)
    assert [line["rollout"] for line in metrics(run)] == [0, 1]


@pytest.fixture
def disk(tmp_path: Path):
    """A small file system of its own; `disk(bytes)` sets its size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(size: int, *more: str) -> Path:
        options = ",".join([f"size={size}", *more])
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
        return folder

    try:
        resize(1 << 20)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("file systems cannot be mounted here")
    yield resize
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_said_and_the_last_good_checkpoint_loads(
    unbroken: Path, tmp_path: Path, disk
) -> None:
    write_config(
        tmp_path,
        algo={"loss_type": "sft_loss"},
        reward={"custom_rm_path": None},
        rollout={"n_samples_per_prompt": 1, "num_rollout": 3},
        checkpoint={"save": str(tmp_path / "disk" / "kept"), "save_interval": 1},
        debug={"check_weight_update_equal": False},
    )
    *_, newest = sorted((unbroken / "runs" / "job" / "checkpoints").iterdir())
    one = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    disk(one * 3 // 2, "remount")
    for asynchronous in (False, True):
        outcome = run_job(tmp_path, f"async_save={str(asynchronous).lower()}")
        assert outcome.statuses[0] not in (0, None), outcome.output
        words = outcome.last()
        kept = tmp_path / "disk" / "kept"
        assert f"checkpoint.save: no space left in {kept}: a checkpoint needs" in words, words
        assert f"the last good checkpoint is {kept}/rollout_000001" in words
        assert "Traceback" not in words
        assert [path.name for path in kept.iterdir()] == ["rollout_000001"]
    disk(one * 4, "remount")
    run = succeed(tmp_path)
    assert [line["rollout"] for line in metrics(run)] == [0, 1, 2]
    assert weights(run)
