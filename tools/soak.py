"""Whether a long run leaks: memory, open files, shared memory and disk of every process of a run.

    python tools/soak.py --rollouts 200

Starts a short-rollout run of the quickstart's model and looks at its processes between rollouts.
What is compared is the median of the looks around rollout 20 and of those at the end; a growth of
more than 2 % is a failure (memory below 4 MiB, and less than 2 files, are noise). Disk is what the
run's folder holds besides the record that must grow: metrics, TensorBoard, timeline and logs. Every
look is left in `--folder`/looks.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

import psutil
from stages import ROOT, make_inputs
from watched import Run

OVERRIDES = [
    *("rollout_batch_size=8", "n_samples_per_prompt=4", "rollout_max_response_len=16"),
    *("save_interval=1", "eval_interval=50", "n_samples_per_eval_prompt=1"),
]
FROM = 20  # rollouts until everything is warm
WINDOW = 10  # looks a median is taken of
MIB = 2**20
MOST = 0.02
NOISE = {"memory": 4 * MIB, "files": 2, "shared memory": MIB, "disk": MIB}
RECORD = ("metrics.jsonl", "tensorboard", "timeline", "timeline.html", "logs")

Look = dict[tuple[str, str], float]  # (whose, what) -> amount


def look(run: Run) -> Look:
    """Amounts of one moment, in bytes and numbers of files."""
    found: Look = {}
    for kind, pids in run.processes().items():
        for order, pid in enumerate(sorted(pids)):
            with contextlib.suppress(psutil.Error, OSError):
                process = psutil.Process(pid)
                who = f"{kind} {order}" if len(pids) > 1 else kind
                found[who, "memory"] = process.memory_info().rss
                found[who, "files"] = process.num_fds()
    found["all", "shared memory"] = sum(
        f.stat().st_size for f in Path("/dev/shm").iterdir() if f.is_file()
    )
    found["all", "disk"] = sum(
        file.stat().st_size
        for file in run.run_dir.rglob("*")
        if file.is_file() and file.relative_to(run.run_dir).parts[0] not in RECORD
    )
    return found


def watch(run: Run, rollouts: int) -> dict[int, Look]:
    """A look after each rollout, as far as they can be told apart."""
    looks: dict[int, Look] = {}
    run.start()
    while run.process.poll() is None:
        status = run.status()
        done = status["rollout"]
        if done and done not in looks and done < rollouts and status["phase"] == "collect":
            with contextlib.suppress(OSError):
                looks[done] = look(run)
        time.sleep(0.02)
    if run.process.returncode:
        raise SystemExit(f"soak: the run failed; see {run.folder}/log")
    return looks


def median(looks: list[Look], key: tuple[str, str]) -> float:
    return statistics.median(one[key] for one in looks if key in one)


def main() -> int:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "soak")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    model = make_inputs()
    words = ["--config", options.config, f"hf_checkpoint={model}", *OVERRIDES]
    words += [f"num_rollout={options.rollouts}", *options.overrides]
    run = Run(options.folder.resolve(), words, options.ranks)
    looks = watch(run, options.rollouts)

    curves = {
        f"{who}: {what}": [[n, looks[n].get((who, what))] for n in sorted(looks)]
        for who, what in sorted({key for one in looks.values() for key in one})
    }
    (options.folder / "looks.json").write_text(json.dumps(curves))
    warm = [looks[n] for n in sorted(looks) if n >= FROM]
    early, late = warm[:WINDOW], warm[-WINDOW:]
    table = Table("process", "what", f"after {FROM}", f"after {options.rollouts}", "growth")
    failed = 0
    for key in sorted(set.intersection(*(set(one) for one in early + late))):
        before, after = median(early, key), median(late, key)
        grown = after - before
        bad = grown > MOST * before and grown > NOISE[key[1]]
        failed += bad
        shown = [f"{x:.0f}" if key[1] == "files" else f"{x / MIB:.1f} MiB" for x in (before, after)]
        share = f"{grown / before:+.1%}" if before else "0"
        table.add_row(*key, *shown, share + (" LEAK" if bad else ""))
    Console(width=100).print(table)
    print(f"soak: {len(looks)} looks at {options.rollouts} rollouts; {failed} amounts grow")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
