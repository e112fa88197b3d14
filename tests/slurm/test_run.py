"""slurm/run.sbatch on a real Slurm: runs end, stop, move to other nodes and are refused as said."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import ROLLOUTS, SIZE, Job, write
from tests.whole.jobs import metrics, weights

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    write(folder)
    return folder


@pytest.fixture(scope="module")
def pair(cluster: Cluster, folder: Path) -> tuple[Job, Job]:
    """Two jobs of one configuration at once on the same nodes, one by each launcher."""
    nodes = ("--nodelist=node1,node2", *SIZE)
    first = Job(cluster, folder, options=nodes)
    second = Job(cluster, folder, options=nodes, LAUNCH="srun")
    for job in (first, second):
        job.wait("RUNNING")
    assert {job["NodeList"] for job in (first.wait("RUNNING"), second.wait("RUNNING"))} == {
        "node[1-2]"
    }
    return first, second


def test_two_jobs_on_the_same_nodes_by_either_launcher(pair: tuple[Job, Job]) -> None:
    for job in pair:
        ended = job.wait("COMPLETED")
        assert ended["ExitCode"] == "0:0" and ended["Restarts"] == "0"
        assert "4 ranks on 2 nodes" in job.output()
        assert [line["rollout"] for line in metrics(job.run)] == list(range(ROLLOUTS))
    first, second = pair
    assert "by torchrun" in first.output() and "by srun" in second.output()
    assert weights(first.run) == weights(second.run)
    assert not list(first.folder.glob(".spmd_rl-*"))


@pytest.fixture(scope="module")
def survivor(cluster: Cluster, folder: Path) -> Job:
    """A job that is warned of its time limit, requeued, and then loses a node."""
    job = Job(cluster, folder, options=("--nodelist=node1,node2", *SIZE))
    at = job.wait_for(f"rollout 2/{ROLLOUTS}")
    cluster.run("scancel", "--signal=USR1", "--batch", job.number)  # as --signal=B:USR1@300 does
    job.wait_for("asking for another turn", at)
    cluster.wait_turn(job.number, 1, ReqNodeList="")
    return job


def test_warned_of_the_time_limit_it_is_requeued_and_goes_on(survivor: Job) -> None:
    at = survivor.wait_for("turn 1")
    assert "turn 0" in survivor.output()[:at]
    resumed = survivor.wait_for(r"resumed from \S+rollout_0000\d+", at)
    first = int(survivor.output()[:resumed][-6:])
    assert 2 <= first < ROLLOUTS
    survivor.wait_for(f"rollout {first + 1}/{ROLLOUTS}", resumed)


def test_a_node_that_fails_is_replaced(
    cluster: Cluster, survivor: Job, pair: tuple[Job, Job]
) -> None:
    cluster.power_off("node2")
    cluster.wait_turn(survivor.number, 2)
    ended = survivor.wait("COMPLETED")
    cluster.power_on("node2")
    assert ended["Restarts"] == "2" and "node2" not in ended["NodeList"]
    assert [line["rollout"] for line in metrics(survivor.run)] == list(range(ROLLOUTS))
    pair[0].wait("COMPLETED")
    assert weights(survivor.run) == weights(pair[0].run)


def test_a_fault_of_the_configuration_is_said_once_and_not_tried_again(
    cluster: Cluster, folder: Path
) -> None:
    job = Job(cluster, folder, "lr=-1", MAX_RESTARTS="3")
    ended = job.wait("FAILED")
    assert ended["ExitCode"] == "2:0" and ended["Restarts"] == "0"
    assert job.output().count("train.lr") == 1, job.output()


def test_the_script_as_it_is_starts_eight_ranks_on_eight_gpus(
    cluster: Cluster, folder: Path
) -> None:
    job = Job(cluster, folder, "--dry-run", "n_samples_per_prompt=8", options=())
    job.wait("COMPLETED")
    assert "1 nodes x 8 ranks by torchrun" in job.output()
    assert "8 ranks on 1 node" in job.output()


def test_four_gpus_a_node_and_none(cluster: Cluster, folder: Path) -> None:
    four = Job(cluster, folder, "--dry-run", options=("--nodelist=node4", "--gpus-per-node=4"))
    none = Job(
        cluster,
        folder,
        "--dry-run",
        options=("--gpus-per-node=0", "--nodes=2", "--cpus-per-task=2"),
        RANKS_PER_NODE="2",
    )
    for job, words in ((four, "4 ranks on 1 node"), (none, "4 ranks on 2 nodes")):
        job.wait("COMPLETED")
        assert words in job.output()
