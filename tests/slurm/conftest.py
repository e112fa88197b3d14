"""One Slurm of two 8-GPU nodes, a spare and a 4-GPU node for all tests of this folder.

Without Slurm's packages or root the tests are skipped; with REQUIRE_SLURM=1 (CI) they fail.
"""

from __future__ import annotations

import os

import pytest

from tests.slurm.cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    reason = missing()
    if reason and os.environ.get("REQUIRE_SLURM") == "1":
        pytest.fail(f"REQUIRE_SLURM=1, but {reason}")
    if reason:
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm"), gpus=[8, 8, 8, 4]) as cluster:
        cluster.wait_idle()
        yield cluster
