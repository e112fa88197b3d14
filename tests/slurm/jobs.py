"""Jobs of slurm/run.sbatch for tests: a few short rollouts, submitted and read."""

from __future__ import annotations

import re
from pathlib import Path

from tests.ranks import ROOT
from tests.slurm.cluster import Cluster, until
from tests.whole.jobs import write_config

SCRIPT = str(ROOT / "slurm" / "run.sbatch")
ROLLOUTS = 8
SIZE = ("--nodes=2", "--gpus-per-node=2", "--cpus-per-task=2")  # two ranks a node


def write(folder: Path) -> None:
    """Two ranks train, on one node or two; the others generate."""
    write_config(
        folder,
        checkpoint={"save_interval": 1},
        rollout={"num_rollout": ROLLOUTS, "rollout_max_response_len": 8},
        placement={"device": "cpu", "colocate": False, "rollout_num_gpus": 2},
    )


class Job:
    """A submitted job of `folder`'s configuration."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        *words: str,
        options=SIZE,
        config="config.yaml",
        **env: str,
    ):
        self.cluster, self.folder = cluster, folder
        self.number = cluster.sbatch(*options, SCRIPT, config, *words, cwd=folder, **env)

    @property
    def run(self) -> Path:
        return self.folder / "runs" / f"job-{self.number}"

    def output(self) -> str:
        path = self.folder / f"spmd_rl-{self.number}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, *states: str) -> dict[str, str]:
        try:
            return self.cluster.wait(self.number, *states)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output()}") from None

    def wait_for(self, text: str, after: int = 0, limit: float = 180.0) -> int:
        """Until the output matches `text` beyond position `after`; where the match ends."""
        found: list[int] = []

        def there() -> bool:
            match = re.compile(text).search(self.output(), after)
            found[:] = [match.end()] if match else []
            return bool(match)

        until(there, f"{text!r} of job {self.number}", limit, self.output)
        return found[0]
