"""summary.json: a run in ten numbers. Comes in: metrics.jsonl and what the controller measured.

`python -m spmd_rl.summary RUN --earlier RUN0 --minutes M` adds an earlier stage (the quickstart's
SFT) to a finished run's summary and prints it. Must not import torch.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from spmd_rl.metrics import FILE, read

MAX_LOGPROB_DIFF = "train/train_rollout_logprob_abs_diff_max"
COMPARED = "perf/check_weights_time"  # a push whose every tensor compared equal; else it raises
GENERATED = "perf/rollout_time"  # stands where samples were generated: SFT has no rewards
NAME = "summary.json"


def write_summary(run_dir: Path, minutes: float, peak_rss: float) -> dict[str, Any]:
    """`peak_rss` in bytes, over all processes of the job. Returns what was written."""
    summary = summarise(read(run_dir / FILE))
    summary |= {"minutes": round(minutes, 2), "peak_rss_gib": round(peak_rss / 2**30, 2)}
    _write(run_dir, summary)
    return summary


def summarise(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What the metrics say about a run. A figure that was never measured is null."""
    trained = [line for line in lines if "perf/step_time" in line]
    summary: dict[str, Any] = {"rollouts": len(trained)}
    names = eval_names(lines)
    if names:
        name = names[0]
        evals = [line for line in lines if name in line]
        before = [line[name] for line in evals if line["rollout"] < 0]
        summary["eval"] = name
        summary["eval_before"] = before[0] if before else None
        summary["eval_after"] = evals[-1][name] if evals[-1]["rollout"] >= 0 else None
    rewards = [line["rollout/raw_reward"] for line in lines if GENERATED in line]
    if rewards:
        summary["reward_first"], summary["reward_last"] = rewards[0], rewards[-1]
    summary["max_logprob_diff"] = _largest(lines, MAX_LOGPROB_DIFF)
    compared = any(COMPARED in line for line in trained)
    summary["weights_equal"] = all(COMPARED in line for line in trained) if compared else None
    seconds = [line["perf/step_time"] for line in trained]
    summary["seconds_per_rollout"] = round(sum(seconds) / len(seconds), 3) if seconds else None
    return summary


def eval_names(lines: list[dict[str, Any]]) -> list[str]:
    """The evaluations' own scores: eval/<name> without the figures derived from them."""
    names = {name for line in lines for name in line if name.startswith("eval/")}
    return sorted(n for n in names if n.count("/") == 1 and "-" not in n and n != "eval/step")


def _largest(lines: list[dict[str, Any]], name: str) -> float | None:
    values = [line[name] for line in lines if line.get(name) is not None]
    flat = [v for value in values for v in (value if isinstance(value, list) else [value])]
    return max(flat, default=None)


def _write(run_dir: Path, summary: dict[str, Any]) -> None:
    aside = run_dir / f"{NAME}.part"
    aside.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    aside.replace(run_dir / NAME)


def load(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / NAME).read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run, such as runs/quickstart")
    parser.add_argument("--earlier", type=Path, help="folder of the stage before it")
    parser.add_argument("--minutes", type=float, help="time both took together")
    args = parser.parse_args()
    summary = load(args.run)
    if args.earlier:
        earlier = load(args.earlier)
        summary["peak_rss_gib"] = max(summary["peak_rss_gib"], earlier["peak_rss_gib"])
    if args.minutes is not None:
        summary["minutes"] = args.minutes
    _write(args.run, summary)
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
