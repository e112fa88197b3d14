"""Where a process is in its job: from torchrun, from srun, or alone."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from spmd_rl.control.job import first_host, read_launch
from tests.control import jobs
from tests.ranks import run_ranks

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "2950",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "6",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
}


def test_torchrun() -> None:
    launch = read_launch(TORCHRUN)
    assert (launch.rank, launch.world, launch.local_rank, launch.local_world) == (5, 8, 1, 4)
    assert (launch.master, launch.port, launch.hosted, launch.attempt) == ("node0", 2950, True, "2")


def test_srun() -> None:
    launch = read_launch(SRUN)
    assert (launch.rank, launch.world, launch.local_rank, launch.local_world) == (3, 6, 1, 2)
    assert (launch.master, launch.hosted) == ("gpu07", False)
    assert launch.port == read_launch(SRUN | {"SLURM_PROCID": "0"}).port > 1024
    assert launch.port != read_launch(SRUN | {"SLURM_JOB_ID": "78"}).port
    assert read_launch(SRUN | {"MASTER_ADDR": "a", "MASTER_PORT": "9"}).port == 9


def test_a_batch_script_without_srun_is_alone() -> None:
    batch = {k: v for k, v in SRUN.items() if "STEP" not in k} | {"SLURM_PROCID": "0"}
    assert read_launch(batch).world == 1
    assert read_launch({}).world == 1


@pytest.mark.parametrize(
    ("nodes", "first"), [("n[01-03,7],m", "n01"), ("a-1", "a-1"), ("a,b", "a"), ("n[5]", "n5")]
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_two_jobs_side_by_side() -> None:
    with ThreadPoolExecutor() as pool:
        first = pool.submit(run_ranks, 2, jobs.commands)
        second = pool.submit(run_ranks, 2, jobs.fail, "1", "raise")
    assert first.result().statuses == [0, 0], first.result().output
    assert second.result().statuses == [1, 1]


def test_torch_is_not_imported_before_a_job_is_joined() -> None:
    code = "import sys, spmd_rl.control; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
