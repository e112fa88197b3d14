"""Children have a clean environment and a log, stop when told, and never outlive their parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spmd_rl.control import children
from spmd_rl.control.children import clean_env, kill_marked, process_state, spawn

SLEEP = "import time; print('up', flush=True); time.sleep(600)"


def wait_until(condition, limit: float = 20.0) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    state = process_state(pid)
    return state is None or state[0] in "ZX"


def test_environment_of_a_rank_is_stripped(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "SLURM_PROCID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    env = clean_env({"RANK": "7", "EXTRA": "x"})
    assert env["RANK"] == "7" and env["EXTRA"] == "x" and env["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert not {"LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "SLURM_PROCID"} & set(env)


def test_log_and_status(tmp_path: Path) -> None:
    code = "import sys; [print(i) for i in range(50)]; sys.exit(3)"
    child = spawn([sys.executable, "-c", code], log=tmp_path / "logs" / "child.log")
    assert child.wait(20) == 3 and child.poll() == 3
    assert child.tail(2) == "48\n49\n"


def test_stop_takes_the_whole_family(tmp_path: Path) -> None:
    """A child that ignores SIGTERM and has a child in another session."""
    code = f"""
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
other = subprocess.Popen([sys.executable, "-c", {SLEEP!r}], start_new_session=True)
print("pid", other.pid, flush=True)
other.wait()
"""
    child = spawn([sys.executable, "-c", code], log=tmp_path / "log")
    wait_until(lambda: "up" in child.tail())
    other = int(child.tail().split("pid ")[1].split()[0])
    assert child.stop(grace=0.2) == -signal.SIGKILL
    wait_until(lambda: gone(other))
    assert child not in children._children


def test_child_dies_with_a_killed_parent(tmp_path: Path) -> None:
    """Also when the thread that asked for it has ended long before."""
    code = f"""
import os, sys, threading
from spmd_rl.control import spawn
argv, log = [sys.executable, "-c", {SLEEP!r}], {str(tmp_path / "log")!r}
def start(): print(spawn(argv, log=log).pid, flush=True)
thread = threading.Thread(target=start); thread.start(); thread.join()
sys.stdin.read()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    wait_until(lambda: (tmp_path / "log").read_text() == "up\n")
    assert not gone(pid)
    parent.kill()
    parent.communicate()
    wait_until(lambda: gone(pid))


def test_marked_processes_are_found_wherever_they_went(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(children.MARK, f"token{os.getpid()}.3")
    argv = [sys.executable, "-c", SLEEP]
    escaped = subprocess.Popen(argv, start_new_session=True, stdout=subprocess.PIPE, text=True)
    assert escaped.stdout is not None and escaped.stdout.readline() == "up\n"
    assert kill_marked(f"token{os.getpid()}.33") == []
    assert kill_marked(f"token{os.getpid()}.") == [escaped.pid]
    assert escaped.wait(20) == -signal.SIGKILL
    escaped.stdout.close()
