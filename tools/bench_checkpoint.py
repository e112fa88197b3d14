"""Times of saving and loading a checkpoint, against torch.save of the same numbers.

  python tools/bench_checkpoint.py                     # 100 M parameters, 4 ranks
  python tools/bench_checkpoint.py --ranks 2 --rounds 3

Starts its ranks itself, under gloo on CPU. Prints medians. `blocked` is how long training waits,
at the save and before the next step: when a rollout is collected between the two (here a second
passes), and when the next step comes at once.
All four write to the same directory and sync to disk. torch.save and torch.load are each rank's own
share of weights and Adam moments in one file a rank, which only the same layout could read back.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = {"hidden": 768, "layers": 12, "heads": 12, "kv_heads": 12, "ffn": 2048, "vocab": 16384}
BLOCKED, AT_ONCE = "async save, blocked", "  with no rollout between"
ROWS = ("torch.save", "save", BLOCKED, AT_ONCE, "async save, all", "torch.load", "load")
COLLECTING = 1.0  # seconds that stand for a rollout


def rank_main(model: str, folder: str, rounds: int) -> None:
    """One rank: the medians go to <folder>/times.json."""
    import torch
    import torch.distributed as dist

    from spmd_rl.config.schema import Config
    from spmd_rl.trainer.actor import Trainer
    from spmd_rl.trainer.checkpoint import _metadata
    from spmd_rl.trainer.pieces import to_save
    from spmd_rl.types import Placement

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    cfg = Config.model_validate(
        {
            "model": {"hf_checkpoint": model},
            "placement": {"device": "cpu"},
            "rollout": {"rollout_batch_size": 8, "num_rollout": 1},
        }
    )
    place = Placement(world, world, tuple(range(world)), (), (), True, dp=world)
    trainer = Trainer(cfg, place, rank, 10)
    times: dict[str, list[float]] = {name: [] for name in ROWS}
    size = 0

    def clocked(name: str, action) -> None:
        dist.barrier()
        began = time.perf_counter()
        action()
        dist.barrier()
        times[name].append(time.perf_counter() - began)

    def fresh(name: str) -> Path:
        path = Path(folder, name)
        dist.barrier()
        if rank == 0:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        dist.barrier()
        return path

    def plainly(path: Path) -> None:
        pieces = to_save(trainer.actor.chunks, trainer.actor.optimizer, _metadata(trainer.groups))
        with open(path / f"{rank}.pt", "wb") as file:
            torch.save([piece.values.clone() for piece in pieces], file)
            file.flush()
            os.fsync(file.fileno())

    def whole(path: Path) -> None:
        trainer.begin_save(path)
        trainer.finish_save()

    for _ in range(rounds + 1):  # the first warms up
        path = fresh("torch")
        clocked("torch.save", lambda path=path: plainly(path))
        clocked("torch.load", lambda path=path: torch.load(path / f"{rank}.pt", weights_only=True))
        path = fresh("ours")
        trainer.saver.keep = False
        clocked("save", lambda path=path: whole(path))
        clocked("load", lambda path=path: trainer.load_checkpoint(path))
        trainer.saver.keep = True
        if trainer.saver.image is None:
            whole(fresh("first"))
        path = fresh("async")
        clocked(BLOCKED, lambda path=path: trainer.begin_save(path))
        time.sleep(COLLECTING)
        clocked(BLOCKED, trainer.saver.copied)
        times[BLOCKED].append(times[BLOCKED].pop() + times[BLOCKED].pop())
        trainer.finish_save()
        path = fresh("async")
        began = time.perf_counter()
        clocked(AT_ONCE, lambda path=path: (trainer.begin_save(path), trainer.saver.copied()))
        trainer.finish_save()
        times["async save, all"].append(time.perf_counter() - began)
        size = sum(file.stat().st_size for file in path.iterdir())
    if rank == 0:
        medians = {name: statistics.median(values[1:]) for name, values in times.items()}
        found = {"bytes": size, "ranks": world, "seconds": medians}
        Path(folder, "times.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)


def table(found: dict) -> str:
    seconds, size = found["seconds"], found["bytes"]
    lines = [f"{'':26}{'seconds':>9}{'GB/s':>8}{'ratio':>8}"]
    for name in ROWS:
        of = seconds["torch.load" if "load" in name else "torch.save"]
        rate = size / seconds[name] / 1e9
        lines.append(f"{name:26}{seconds[name]:9.3f}{rate:8.2f}{seconds[name] / of:8.2f}")
    share = seconds[BLOCKED] / seconds["save"]
    lines.append(f"{size / 1e6:,.0f} MB, {found['ranks']} ranks; ratio: to torch's own")
    lines.append(f"an asynchronous save blocks for {share:.0%} of a synchronous one (goal 20%)")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to write; default: a temporary directory")
    parser.add_argument("--hidden", type=int, help="a smaller model, for trying this out")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from tools.make_tiny_model import make_tiny_model

    shape: dict[str, Any] = MODEL | (
        {"hidden": options.hidden, "layers": 2} if options.hidden else {}
    )
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-checkpoint-") as folder:
        model = make_tiny_model(Path(folder) / "model", "qwen2", **shape)
        code = f"from tools.bench_checkpoint import rank_main as m; m({str(model)!r}, {folder!r}, "
        (Path(folder) / "rank.py").write_text(f"{code}{options.rounds})\n")
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        run += [f"--nproc-per-node={options.ranks}", str(Path(folder) / "rank.py")]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(run, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"bench: a rank failed:\n{done.stderr[-3000:]}")
        found = json.loads((Path(folder) / "times.json").read_text())
    print(table(found))
    print(json.dumps(found))
    return int(found["seconds"][BLOCKED] > 0.2 * found["seconds"]["save"])


if __name__ == "__main__":
    sys.exit(main())
