"""slurm/preflight.sbatch finds nothing on healthy nodes, and all that was broken on others."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

from tests.ranks import ROOT
from tests.slurm.cluster import Cluster

SCRIPT = str(ROOT / "slurm" / "preflight.sbatch")
# No GPUs: those of the tests' nodes are but counted, and nvidia-smi would be missed.
SIZE = ("--nodelist=node1,node2", "--nodes=2", "--gpus-per-node=0", "--cpus-per-task=2")
LISTEN = "import socket; s = socket.create_server(('', {port})); print('on', flush=True); input()"


def submit(cluster: Cluster, folder: Path, *options: str) -> str:
    return cluster.sbatch(*SIZE, *options, SCRIPT, cwd=folder, RANKS_PER_NODE="2")


def output(folder: Path, number: str) -> str:
    return (folder / f"preflight-{number}.out").read_text()


def row(text: str, name: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith(name))[len(name) :].split()


def test_healthy_nodes(cluster: Cluster, tmp_path: Path) -> None:
    number = submit(cluster, tmp_path)
    cluster.wait(number)
    text = output(tmp_path, number)
    assert "no fault on node1, node2" in text and "FAULT" not in text, text
    for name in (
        "torch",
        "sglang",
        "megatron-core",
        "transformers",
        "spmd_rl source",
        "disk shared",
    ):
        assert len(row(text, name)) == 2 and len(set(row(text, name))) == 1, text
    assert "all-reduce of 32 MiB over 4 ranks on 2 nodes, gloo" in text
    assert cluster.job(number)["JobState"] == "COMPLETED"
    assert not list((tmp_path / "runs").iterdir())


@pytest.fixture
def broken(cluster: Cluster, tmp_path: Path):
    """A preflight job about to start on nodes of which each has something wrong; its number."""
    number = submit(cluster, tmp_path, "--hold")
    # another version of a package on node2
    installed = Path(str(distribution("transformers")._path))  # pyright: ignore
    other = tmp_path / "other"
    shutil.copytree(installed, other)
    metadata = (other / "METADATA").read_text()
    version = distribution("transformers").version
    (other / "METADATA").write_text(metadata.replace(f"Version: {version}", "Version: 0.0.1", 1))
    node2 = cluster.nodes["node2"]
    node2.mount("--bind", str(other), str(installed))
    # a run folder that node2 cannot write to
    runs = tmp_path / "runs"
    runs.mkdir()
    node2.mount("--bind", str(runs), str(runs))
    node2.mount("-o", "remount,ro,bind", str(runs))
    # a leftover on node1 that holds the job's port
    code = LISTEN.format(port=20000 + int(number) % 10000)
    listener = subprocess.Popen(
        cluster.nodes["node1"].enter(sys.executable, "-c", code),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert listener.stdout and listener.stdout.readline()
    try:
        yield number
    finally:
        listener.communicate()
        for path in (installed, runs):
            node2.unmount(path)


def test_each_fault_is_found_and_said_in_one_sentence(
    cluster: Cluster, broken: str, tmp_path: Path
) -> None:
    cluster.run("scontrol", "release", broken)
    ended = cluster.wait(broken)
    text = output(tmp_path, broken)
    faults = [line for line in text.splitlines() if line.startswith("FAULT: ")]
    assert ended["JobState"] == "FAILED" and ended["ExitCode"] == "1:0", text
    assert len(faults) == 3, text
    version = distribution("transformers").version
    assert any(f"transformers differs: {version} on node1, but 0.0.1 on node2" in f for f in faults)
    assert any(f"node2 cannot write to {tmp_path}/runs (Read-only" in fault for fault in faults)
    assert any("of node1 is taken by" in fault for fault in faults)
    assert not [f for f in faults if ": " not in f.removeprefix("FAULT: ")]  # each with its fix
