"""Whatever fails in a whole job, all is gone within 10 s and the cause ends the log."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.ranks import Running
from tests.whole.jobs import engine_part, run_job, write_config

SECONDS = 10.0
READY = "ready after"


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith(("torch_", "spmd_rl"))}


def rank_process(folder: Path, rank: int) -> int:
    """The process of a rank, by the variable that torchrun gives it."""
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            words = Path("/proc", entry, "cmdline").read_text().split("\0")
            if str(folder / "config.yaml") not in words or "--no-python" in words:
                continue
            if f"RANK={rank}" in Path("/proc", entry, "environ").read_text().split("\0"):
                return int(entry)
    raise AssertionError(f"no process of rank {rank}")


def fails(folder: Path, cause: str, *overrides: str, act=None, heartbeat: float = 4.0) -> None:
    """Run until it fails; `act(running)` returns when the fault was made."""
    before, made = shared_memory(), []

    def make(running: Running) -> None:
        if act is not None:
            running.wait_for(READY, limit=90)
            act(running)
            made.append(time.time())

    outcome = run_job(folder, f"heartbeat_timeout={heartbeat}", *overrides, act=make)
    assert outcome.statuses[0] not in (0, None), outcome.output
    assert re.search(cause, outcome.last()), outcome.output
    assert outcome.left == [], outcome.left
    assert shared_memory() <= before
    if made:
        assert outcome.ended - made[0] < SECONDS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_config(tmp_path)
    return tmp_path


def test_a_reward_function_raises(folder: Path) -> None:
    fails(folder, "no such answer", "custom_rm_path=tests.whole.hooks.raise_in_reward")


def test_a_generate_function_raises(folder: Path) -> None:
    hook = "custom_generate_function_path=tests.whole.hooks.raise_in_generate"
    fails(folder, "no such tool", hook)


def test_the_collector_is_killed(folder: Path) -> None:
    hook = "custom_generate_function_path=tests.whole.hooks.kill_collector"
    fails(folder, "collector process was killed by SIGKILL", hook)


def test_the_loop_raises(folder: Path) -> None:
    (folder / "not-a-folder").write_text("")
    fails(folder, "not-a-folder", f"save={folder}/not-a-folder", "save_interval=1")


@pytest.mark.parametrize(
    ("number", "cause"),
    [(signal.SIGKILL, r"rank 1 .*(killed|gone)"), (signal.SIGSTOP, r"rank 1 .* frozen")],
    ids=["killed", "frozen"],
)
def test_a_follower_is(folder: Path, number: int, cause: str) -> None:
    fails(
        folder,
        cause,
        "num_rollout=1000",
        act=lambda _: os.kill(rank_process(folder, 1), number),
    )


def test_ctrl_c(folder: Path) -> None:
    def interrupt(running: Running) -> None:
        os.killpg(running.processes[0].pid, signal.SIGINT)  # as a terminal does

    fails(folder, "interrupted|got signal: 2", "num_rollout=1000", act=interrupt)


def test_an_engine_is_killed(folder: Path) -> None:
    """By its scheduler: SGLang's server goes seconds later, and breaks connections meanwhile."""

    def kill(running: Running) -> None:
        os.kill(engine_part(running, 1), signal.SIGKILL)

    cause = "engine 1 was killed by SIGKILL .its process sglang::scheduler"
    fails(folder, cause, "num_rollout=1000", act=kill)
