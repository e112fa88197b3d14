"""What a job script is told of the end, and that a run folder belongs to one job at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spmd_rl import cli
from spmd_rl.control import FAULTY, REQUEUE, tell_script
from spmd_rl.control.job import read_launch
from tests.config.inputs import good, write

ROOT = Path(__file__).resolve().parent.parent


def test_the_job_script_reads_what_torchrun_would_hide(tmp_path: Path, monkeypatch) -> None:
    assert tell_script(REQUEUE) == REQUEUE  # nobody reads a file: the status itself must do
    monkeypatch.setenv("SPMD_RL_STATUS_FILE", str(tmp_path / "status"))
    assert tell_script(REQUEUE) == 0  # else torchrun would start all again
    assert (tmp_path / "status").read_text() == f"{REQUEUE}\n"
    assert tell_script(FAULTY) == FAULTY


def test_in_a_slurm_job_the_run_is_named_after_it(tmp_path: Path, monkeypatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SPMD_RL_JOB_ID", "77")
    path = str(write(tmp_path, good(tmp_path)))
    named = cli.parse(["--config", path]).cfg.logging.name
    assert named is not None and named.endswith("-77")
    assert cli.parse(["--config", path, "logging.name=a"]).cfg.logging.name == "a"


HOLD = "import sys; from pathlib import Path; from spmd_rl.control import hold; "


def test_two_jobs_do_not_share_a_run_folder(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start(job: str) -> subprocess.Popen:
        code = HOLD + "print(hold(Path(sys.argv[1])), flush=True); sys.stdin.read()"
        return subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            env=env | {"SLURM_JOB_ID": job},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def said(process: subprocess.Popen) -> str:
        assert process.stdout
        return process.stdout.readline().strip()

    first = start("7")
    assert said(first) == ""
    other, same = start("8"), start("7")
    assert said(same) == ""  # requeued; the lock of its dead node was never given up
    assert said(other).startswith(f"Slurm job 7, process {first.pid} on ")
    for process in (first, other, same):
        process.communicate()
    last = start("9")
    assert said(last) == ""
    last.communicate()


SEVERAL_NODES = {
    **{"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
    **{"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3"},
}


def test_restarts_on_several_nodes_need_a_new_store_each_time() -> None:
    new = SEVERAL_NODES | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    first, second = (read_launch(new | {"TORCHELASTIC_RESTART_COUNT": n}) for n in "01")
    assert first.attempt == second.attempt  # an agent's own count is not what ranks agree on
    with pytest.raises(RuntimeError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's"):
        read_launch(SEVERAL_NODES)
    assert read_launch(SEVERAL_NODES | {"TORCHELASTIC_MAX_RESTARTS": "0"}).world == 4
