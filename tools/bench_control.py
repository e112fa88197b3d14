"""Commands and batch hand-out, measured against Ray on this machine in the same run.

`python tools/bench_control.py` installs Ray into an environment of its own (once, under
$XDG_CACHE_HOME/spmd_rl), starts 4 ranks and 4 Ray actors, and takes turns: (a) a command answered
by 4 ranks against a call to each of 4 actors; (b) 2,048 samples of log-normal lengths, 7 M tokens,
cut into shards by one process and given to 4: by spmd_rl/batch/ship.py, or by the same numpy code
and Ray's put and get. Ray's put and get alone, of shards cut before, is shown beside it. Prints a
table, then one JSON object; exits 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import venv
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from spmd_rl.batch.plan import plan_steps  # noqa: E402
from spmd_rl.types import Batch, StepPlan  # noqa: E402

RANKS = 4
SAMPLES = 2048
TOKENS = 7_000_000
GOALS = {"call": 1 / 3, "hand_out": 1 / 2, "bytes": 1.1}  # ours to Ray's; bytes: ours to needed
COLUMNS = ("tokens", "loss_mask", "rollout_log_probs")


def make_batch(seed: int = 0) -> tuple[Batch, list[StepPlan]]:
    """A rollout as flat arrays, and which rank trains on which samples."""
    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(0.0, 0.8, SAMPLES)
    total = np.maximum((lengths * TOKENS / lengths.sum()).astype(np.int32), 16)
    response = (total * 7 // 8).astype(np.int32)
    zeros, ids = np.zeros(SAMPLES, dtype=np.float32), np.arange(SAMPLES)
    batch = Batch(
        tokens=rng.integers(0, 150_000, total.sum(), dtype=np.int32),
        loss_mask=np.ones(response.sum(), dtype=np.uint8),
        rollout_log_probs=-rng.random(response.sum(), dtype=np.float32),
        total_lengths=total,
        response_lengths=response,
        rewards=zeros,
        raw_rewards=zeros,
        rollout_ids=ids,
    )
    return batch, plan_steps(total, response, ids, dp=RANKS, max_tokens=40_000, balance=True)


LABELS = {
    "call": "4 answers, ms",
    "hand_out": "7 M tokens, ms",
    "put_get": "  cut before, ms",
}


def timed(work: Any, repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return seconds


def serve(**turns: Any) -> None:
    """Take turns as the driver says; a turn's answer is its list of seconds."""
    with Client(os.environ["BENCH_SOCKET"]) as driver:
        while True:
            name, repeats = driver.recv()
            if name == "end":
                return
            driver.send(timed(turns[name], repeats))


# ---------------------------------------------------------------------- ours: 4 ranks


def main_ours() -> None:
    from spmd_rl import control
    from spmd_rl.batch.ship import Shipping
    from spmd_rl.types import Placement

    class Worker:
        def __init__(self, job: control.Job):
            self.job = job

        @control.command
        def ping(self, value: int) -> int:
            return value

        @control.command
        def build(self) -> None:
            ranks = tuple(range(RANKS))
            self.job.train_group(ranks)
            placement = Placement(RANKS, RANKS, ranks, (), (), True, dp=RANKS)
            self.shipping = Shipping(placement, self.job.rank, None)

        @control.command
        def take(self, batch: Any = None, plans: Any = None) -> int:
            """Bytes that came to this rank; 0 on the sender."""
            self.shard = self.shipping.hand_out(batch, plans)
            base = self.shard.batch.tokens.base
            return 0 if batch is not None or base is None else base.nbytes

        @control.command
        def needed(self) -> int:
            return sum(getattr(self.shard.batch, name).nbytes for name in COLUMNS)

    job = control.join()
    job.start_watching()
    worker = Worker(job)
    if job.rank:
        control.follow(job, worker)
        job.leave()
    with job.failing():
        workers = control.Workers(job, worker)
        workers.build()
        batch, plans = make_batch()
        mine = {"batch": batch, "plans": plans}
        received, needed = workers.take(mine=mine)[1:], workers.needed()[1:]
        print(json.dumps({"bytes": max(r / n for r, n in zip(received, needed, strict=True))}))
        sys.stdout.flush()
        serve(call=lambda: workers.ping(1), hand_out=lambda: workers.take(mine=mine))
        workers.exit()
    job.leave()


# ---------------------------------------------------------------------- Ray: 4 actors


def main_ray() -> None:
    import ray

    ray.init(num_cpus=RANKS, include_dashboard=False, log_to_driver=False, logging_level="error")

    @ray.remote(num_cpus=1)
    class Actor:
        def ping(self, value: int) -> int:
            return value

        def take(self, boxed: list) -> int:
            self.shard = ray.get(boxed[0])
            return sum(array.nbytes for array in self.shard.values())

    actors = [Actor.remote() for _ in range(RANKS)]
    batch, plans = make_batch()
    orders = [[i for plan in plans for m in plan.micro_batches[k] for i in m] for k in range(RANKS)]

    def cut() -> list[dict[str, np.ndarray]]:
        shards = [batch.take(order) for order in orders]
        return [{name: getattr(shard, name) for name in COLUMNS} for shard in shards]

    def put_get(shards: list) -> None:
        boxed = [[ray.put(shard)] for shard in shards]  # each leaves as soon as it is stored
        ray.get([actor.take.remote(box) for actor, box in zip(actors, boxed, strict=True)])

    def call() -> None:
        ray.get([actor.ping.remote(1) for actor in actors])

    before = cut()
    serve(call=call, hand_out=lambda: put_get(cut()), put_get=lambda: put_get(before))
    ray.shutdown()


# ---------------------------------------------------------------------- the driver


def ray_python() -> str:
    """Python of an environment that has Ray, made at the first use."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = cache / "spmd_rl" / "ray"
    python = str(home / "bin" / "python")
    test = [python, "-c", "import ray, numpy"]
    if not home.exists() or subprocess.run(test, capture_output=True).returncode:
        print(f"installing Ray into {home}", file=sys.stderr, flush=True)
        venv.create(home, with_pip=True, clear=True)
        subprocess.run(
            [python, "-m", "pip", "install", "-q", "ray>=2.9,<3", f"numpy=={np.__version__}"],
            check=True,
        )
    return python


def start(argv: list[str], folder: Path, name: str) -> tuple[subprocess.Popen, Connection, Path]:
    """A side of the comparison, connected; its output goes to a file."""
    address, log = str(folder / f"{name}.socket"), folder / f"{name}.log"
    with Listener(address) as listener, open(log, "wb") as out:
        env = os.environ | {
            "BENCH_SOCKET": address,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        process = subprocess.Popen(argv, env=env, stdout=out, stderr=out, start_new_session=True)
        listener._listener._socket.settimeout(120)  # type: ignore[attr-defined]
        try:
            return process, listener.accept(), log
        except OSError:
            process.terminate()
            sys.exit(f"{name} did not start:\n{log.read_text()[-4000:]}")


def measure(sides: dict[str, Connection], rounds: int, calls: int) -> dict[str, dict[str, list]]:
    """[what][side] -> seconds, the sides taking turns so that the machine's noise hits both."""
    found: dict[str, dict[str, list]] = {
        "call": {"ours": [], "ray": []},
        "hand_out": {"ours": [], "ray": []},
        "put_get": {"ray": []},
    }

    def turn(what: str, side: str, repeats: int) -> list[float]:
        sides[side].send((what, repeats))
        return sides[side].recv()

    for warm in (True, *[False] * rounds):
        for what, by_side in found.items():
            for side, seconds in by_side.items():
                taken = turn(what, side, calls if what == "call" else 3)
                seconds += [] if warm else taken
    return found


def summarise(found: dict[str, dict[str, list]], bytes_ratio: float) -> dict[str, Any]:
    """Milliseconds and ratios of medians."""
    figures: dict[str, Any] = {}
    print(f"{'':24}{'spmd_rl':>20}{'Ray':>20}{'ratio':>8}{'goal':>8}")
    for what, sides in found.items():
        cells = ["", ""]
        for side, seconds in sides.items():
            p50, p99 = np.percentile(seconds, [50, 99]) * 1e3
            figures |= {f"{what}_{side}_ms": round(p50, 3), f"{what}_{side}_p99_ms": round(p99, 3)}
            cells[side == "ray"] = f"{p50:.2f} (p99 {p99:.2f})"
        line = f"{LABELS[what]:24}{cells[0]:>20}{cells[1]:>20}"
        if what in GOALS:
            ratio = figures[f"{what}_ours_ms"] / figures[f"{what}_ray_ms"]
            figures[f"{what}_ratio"] = round(ratio, 3)
            line += f"{ratio:8.2f}{GOALS[what]:8.2f}"
        print(line)
    figures["bytes_ratio"] = round(bytes_ratio, 4)
    print(f"{'bytes to those needed':64}{bytes_ratio:8.3f}{GOALS['bytes']:8.2f}")
    figures["ratio"] = figures["call_ratio"]
    figures["goals_met"] = all(figures[f"{what}_ratio"] <= goal for what, goal in GOALS.items())
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--calls", type=int, default=100, help="calls per round")
    parser.add_argument("--side", choices=["ours", "ray"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        {"ours": main_ours, "ray": main_ray}[args.side]()
        return 0
    me = [str(Path(__file__).resolve()), "--side"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    commands = {
        "ours": [*torchrun, f"--nproc-per-node={RANKS}", *me, "ours"],
        "ray": [ray_python(), *me, "ray"],
    }
    with tempfile.TemporaryDirectory() as folder:
        running = {name: start(argv, Path(folder), name) for name, argv in commands.items()}
        sides = {name: connection for name, (_, connection, _) in running.items()}
        try:
            found = measure(sides, args.rounds, args.calls)
            for process, connection, _ in running.values():
                connection.send(("end", 0))
                process.wait(60)
        finally:
            for process, _, _ in running.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
        said = running["ours"][2].read_text().splitlines()
    bytes_ratio = json.loads(next(line for line in said if line.startswith("{")))["bytes"]
    figures = summarise(found, bytes_ratio)
    print(json.dumps(figures))
    return 0 if figures["goals_met"] else 1


if __name__ == "__main__":
    sys.exit(main())
