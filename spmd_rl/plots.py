"""PNG curves of a run, drawn from metrics.jsonl: reward, loss and evaluation scores.

matplotlib takes most of a second to import, so it is imported when a run ends, not when it starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spmd_rl.metrics import FILE, read
from spmd_rl.summary import GENERATED, eval_names

Curve = tuple[list[int], list[float]]


def draw(run_dir: Path) -> list[Path]:
    """Draw what the run has values for; returns the files written."""
    lines = read(run_dir / FILE)
    rewarded = [line for line in lines if GENERATED in line]
    wanted: dict[str, dict[str, Curve]] = {
        "reward": {"mean reward": curve(rewarded, "rollout/raw_reward")},
        "loss": {"loss": curve(lines, "train/loss")},
        "eval": {n.removeprefix("eval/"): curve(lines, n, shift=1) for n in eval_names(lines)},
    }
    drawn = []
    for name, curves in wanted.items():
        curves = {label: c for label, c in curves.items() if c[0]}
        if curves:
            drawn.append(_plot(run_dir, name, curves))
    return drawn


def curve(lines: list[dict[str, Any]], name: str, shift: int = 0) -> Curve:
    """x (rollout, plus `shift`) and y of one metric; several steps of a rollout are averaged."""
    found = [(line["rollout"] + shift, line[name]) for line in lines if line.get(name) is not None]
    ys = [sum(y) / len(y) if isinstance(y, list) else y for _, y in found]
    return [x for x, _ in found], ys


def _plot(run_dir: Path, name: str, curves: dict[str, Curve]) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for label, (xs, ys) in curves.items():
        axes.plot(xs, ys, label=label, marker="o" if len(xs) < 30 else None, markersize=3)
    axes.set(
        title=f"{run_dir.name}: {name}", ylabel=name if len(curves) > 1 else next(iter(curves))
    )
    axes.set_xlabel("rollouts trained on" if name == "eval" else "rollout")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axes.legend(frameon=False)
    path = run_dir / f"{name}.png"
    figure.savefig(path, dpi=120)
    return path
