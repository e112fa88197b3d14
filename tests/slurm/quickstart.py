"""The quickstart's configuration, cut short, through a true time limit and a lost node:

    python -m tests.slurm.quickstart MODEL [FOLDER]

MODEL: a Hugging Face folder that knows some sums, as `runs/quickstart-sft/hf`. Five jobs of two
nodes with two ranks each, on the Slurm of the tests: one left alone, one whose time limit is a
minute, one that loses a node, two at once. All must complete, and be equal bit for bit. Needs
about fifteen minutes of two cores; the tests do the same with a smaller configuration.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.ranks import ROOT
from tests.slurm.cluster import FINAL, Cluster, missing, until
from tests.slurm.jobs import SIZE, Job
from tools.compare_runs import compare, outcome

ROLLOUTS = 30
NODES = ("--nodelist=node1,node2", *SIZE)
# Slurm looks at time limits now and then, so the warning may come half a minute early: any earlier,
# and no turn gets beyond its start.
ONE_MINUTE = ("--time=1", "--signal=B:USR1@5")
SHORT = [
    *(f"num_rollout={ROLLOUTS}", "rollout_batch_size=16", "n_samples_per_prompt=4"),
    *("rollout_max_response_len=32", "eval_interval=null", "save_interval=1", "lr=1e-3"),
    *("lr_decay_style=constant", "lr_warmup_fraction=0"),
]


class Quickstart(Job):
    def __init__(self, cluster: Cluster, folder: Path, model: str, *options: str, **env: str):
        (folder / "runs").mkdir(parents=True)
        words = [f"hf_checkpoint={model}", "name=quickstart"]
        words += [f"save_debug_rollout_data={folder}/runs/quickstart/rollouts/{{rollout_id}}.pt"]
        (folder / "runs" / "data").symlink_to(ROOT / "runs" / "data")
        config = str(ROOT / "configs" / "quickstart.yaml")
        super().__init__(
            cluster, folder, *words, *SHORT, options=(*NODES, *options), config=config, **env
        )

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "quickstart"


def main() -> None:
    if missing():
        sys.exit(missing())
    model = str(Path(sys.argv[1]).resolve())
    folder = Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp()).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "tools/make_arithmetic.py", "runs/data/arithmetic"]
    subprocess.run(command, cwd=ROOT, check=True)
    with Cluster(folder / "slurm", gpus=[8, 8, 8]) as cluster:
        cluster.wait_idle()
        alone = Quickstart(cluster, folder / "alone", model)
        expected = finish("left alone", alone)

        limited = Quickstart(cluster, folder / "limited", model, *ONE_MINUTE)
        for turn in range(1, 20):
            if not requeued(limited, turn):
                break
            cluster.wait_turn(limited.number, turn)
        finish("a limit of one minute", limited, expected)

        unlucky = Quickstart(cluster, folder / "unlucky", model)
        unlucky.wait_for(f"rollout 3/{ROLLOUTS}")
        cluster.power_off("node2")
        cluster.wait_turn(unlucky.number, 1, ReqNodeList="")
        finish("node2 powered off", unlucky, expected)
        cluster.power_on("node2")
        cluster.wait_idle()

        both = [
            Quickstart(cluster, folder / launch, model, LAUNCH=launch)
            for launch in ("torchrun", "srun")
        ]
        for launch, job in zip(("torchrun", "srun"), both, strict=True):
            finish(f"two at once, this by {launch}", job, expected)


def requeued(job: Job, turn: int) -> bool:
    """Wait until the job has ended, or waits for this turn."""
    now: dict[str, str] = {}

    def ended_or_waits() -> bool:
        now.update(job.cluster.job(job.number))
        waits = now["JobState"] == "PENDING" and now["Restarts"] == str(turn)
        return waits or now["JobState"] in FINAL

    until(ended_or_waits, f"job {job.number} to end or to be requeued", 1800, lambda: str(now))
    return now["JobState"] == "PENDING"


def finish(what: str, job: Job, expected: dict | None = None) -> dict:
    ended = job.wait("COMPLETED")
    found = outcome(job.run)
    differs = compare(found, expected) if expected else []
    equal = "; ".join(differs) if differs else "bitwise equal" if expected else "the measure"
    how = f"{ended['JobState']} after {ended['Restarts']} requeues on {ended['NodeList']}"
    print(f"{what:32} {how}: {equal}", flush=True)
    if differs:
        sys.exit(1)
    return found


if __name__ == "__main__":
    main()
