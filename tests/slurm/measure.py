"""What a start, a requeue and a lost node cost, on the Slurm of the tests:

    python -m tests.slurm.measure [FOLDER]

Times are those of the job's output. The two minutes that Slurm lets a requeued job wait are cut
short; the node counts as lost after SILENCE seconds here, often 300 on a cluster.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tests.slurm.cluster import SILENCE, Cluster, missing
from tests.slurm.jobs import ROLLOUTS, SIZE, Job, write


def main() -> None:
    if missing():
        sys.exit(missing())
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    jobs = folder / "jobs"
    jobs.mkdir(parents=True)
    write(jobs)
    with Cluster(folder / "slurm", gpus=[8, 8, 8]) as cluster:
        cluster.wait_idle()
        began = last = time.monotonic()

        def passed(what: str) -> None:
            nonlocal last
            now = time.monotonic()
            print(f"{what:<56}{now - last:7.1f} s", flush=True)
            last = now

        job = Job(cluster, jobs, options=("--nodelist=node1,node2", *SIZE))
        at = job.wait_for("turn 0")
        passed("submitted -> first line")
        at = job.wait_for("ready after", at)
        passed("first line -> ranks and engines ready")
        at = job.wait_for(f"rollout 3/{ROLLOUTS}", at)
        last = time.monotonic()
        cluster.run("scancel", "--signal=USR1", "--batch", job.number)
        at = job.wait_for("asking for another turn", at)
        passed("warned -> stopped, saved, requeued")
        cluster.wait_turn(job.number, 1, ReqNodeList="")
        at = job.wait_for("turn 1", at)
        passed("requeued -> first line of the next turn (wait cut short)")
        at = job.wait_for(rf"rollout \d+/{ROLLOUTS}", at)
        passed("first line -> first new rollout")
        cluster.power_off("node2")
        at = job.wait_for("the job failed|did not answer|Node failure", at)
        passed("node off -> said in the output")
        cluster.wait_turn(job.number, 2)
        at = job.wait_for("turn 2", at)
        passed(f"-> first line on the spare (SlurmdTimeout {SILENCE}, wait cut)")
        at = job.wait_for(rf"rollout \d+/{ROLLOUTS}", at)
        passed("first line -> first new rollout")
        job.wait("COMPLETED")
        print(f"in all {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
