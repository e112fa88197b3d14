"""Which algorithms learn: each on the quickstart's task with several seeds, and one table.

    python tools/learn.py                            # all, three seeds each
    python tools/learn.py --only ppo,rloo --seeds 1
    python tools/learn.py num_rollout=30             # overrides for every run

Held-out accuracy before and after, mean and spread over the seeds. Every run must end at least 0.3
above its start; the exit status says whether all did. All begin with the same model, which a
supervised stage makes once. Runs lie below `--folder`; those that are there and finished are not
made again (`--fresh` makes them again).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GAIN = 0.3  # of held-out accuracy
RECIPES: dict[str, list[str]] = {
    "grpo": [],
    "gspo": ["advantage_estimator=gspo"],
    "cispo": ["advantage_estimator=cispo"],
    "rloo": ["advantage_estimator=rloo"],
    "reinforce_plus_plus": [
        "advantage_estimator=reinforce_plus_plus",
        "normalize_advantages=true",
    ],
    "ppo": [],
}
CONFIGS = {"ppo": "configs/quickstart-ppo.yaml"}  # the others: configs/quickstart.yaml


def tool(name: str, target: str) -> None:
    subprocess.run([sys.executable, ROOT / "tools" / name, target], cwd=ROOT, check=True)


def train(options: argparse.Namespace, name: str, config: str, words: list[str]) -> Path:
    """The finished run's folder. Raises SystemExit with the end of its log."""
    run = options.folder / name
    if options.fresh:
        shutil.rmtree(run, ignore_errors=True)
    if (run / "summary.json").exists():
        return run
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    argv += [f"--nproc-per-node={options.ranks}", "launch/main.py", "--config", config]
    argv += [f"run_dir={options.folder}", f"name={name}", *words]
    log = options.folder / f"{name}.log"
    with open(log, "wb") as file:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(argv, cwd=ROOT, env=env, stdout=file, stderr=file)
    if done.returncode:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
        raise SystemExit(f"learn: {name} failed ({log}):\n{last}")
    return run


def start_model(options: argparse.Namespace) -> str:
    """The quickstart's data, and its model after the supervised stage."""
    tool("make_arithmetic.py", "runs/data/arithmetic")
    if options.model:
        return options.model
    tool("make_tiny_model.py", "runs/models/tiny-qwen3")
    return str(train(options, "sft", "configs/quickstart-sft.yaml", []) / "hf")


def spread(values: list[float]) -> str:
    """Mean and, for several values, their least and largest."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f}-{max(values):.3f})"


def row(name: str, summaries: list[dict[str, Any]]) -> tuple[list[str], bool]:
    """A line of the table, and whether every seed learned enough."""
    before = [found["eval_before"] for found in summaries]
    after = [found["eval_after"] for found in summaries]
    gains = [b - a for a, b in zip(before, after, strict=True)]
    minutes = statistics.mean(found["minutes"] for found in summaries)
    enough = min(gains) >= GAIN
    words = [name, str(len(summaries)), spread(before), spread(after), f"{min(gains):+.3f}"]
    return [*words, f"{minutes:.1f}", "yes" if enough else "NO"], enough


def main() -> int:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(RECIPES), help="names, separated by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--model", help="Hugging Face folder; default: the supervised stage's")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "learn")
    parser.add_argument("--fresh", action="store_true", help="make finished runs again")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := set(names) - set(RECIPES):
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(RECIPES)}")
    options.folder = options.folder.resolve()
    options.folder.mkdir(parents=True, exist_ok=True)
    model, began = start_model(options), time.monotonic()

    table = Table("algorithm", "seeds", "before", "after", "least gain", "minutes", "learns")
    all_learn = True
    for name in names:
        summaries = []
        for seed in range(1, options.seeds + 1):
            words = [f"hf_checkpoint={model}", f"seed={seed}", f"rollout_seed={seed}"]
            words += [*RECIPES[name], *options.overrides]
            config = CONFIGS.get(name, "configs/quickstart.yaml")
            run = train(options, f"{name}-{seed}", config, words)
            summaries.append(json.loads((run / "summary.json").read_text()))
            now = summaries[-1]
            print(
                f"learn: {name}, seed {seed}: {now['eval_before']} -> {now['eval_after']} "
                f"in {now['minutes']} min",
                flush=True,
            )
        words, enough = row(name, summaries)
        table.add_row(*words)
        all_learn &= enough
    Console(width=100).print(table)
    print(f"learn: {len(names)} algorithms in {(time.monotonic() - began) / 60:.0f} min")
    return 0 if all_learn else 1


if __name__ == "__main__":
    sys.exit(main())
