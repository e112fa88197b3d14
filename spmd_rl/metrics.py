"""Every number of a run: metrics.jsonl, TensorBoard events, wandb. Rank 0 only.

Comes in: a rollout's values under slime's names (rollout/*, train/*, perf/*, eval/*). metrics.jsonl
is the record; on resume its lines beyond the resume point are dropped and the TensorBoard events
are written anew from it, so nothing is counted twice. Must not know how the values were made.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spmd_rl import disk
from spmd_rl.config.schema import Config

Value = float | Sequence[float]  # one number a rollout, or one for each of its optimizer steps
FILE = "metrics.jsonl"


class Metrics:
    """The record of a run, continued at `start_rollout`."""

    def __init__(self, cfg: Config, run_dir: Path, start_rollout: int = 0):
        run_dir.mkdir(parents=True, exist_ok=True)
        self.run_dir = run_dir
        self.steps = steps_per_rollout(cfg)
        kept = truncate(run_dir / FILE, start_rollout)
        self.file = open(run_dir / FILE, "a", encoding="utf-8")  # noqa: SIM115
        # rollouts whose evaluation the record holds
        self.evaluated = {line["rollout"] for line in kept if any(map(_of_eval, line))}
        tensorboard = TensorBoard(run_dir / "tensorboard")
        for line in kept:
            tensorboard.add(points(line, self.steps), line["time"])
        self.sinks: list[TensorBoard | Wandb] = [tensorboard]
        if cfg.logging.use_wandb:
            self.sinks.append(Wandb(cfg, run_dir))

    def log(self, rollout: int, values: Mapping[str, Value]) -> None:
        """One rollout's values. A list holds one value for each optimizer step."""
        self._write({"rollout": rollout, "time": time.time()}, values)

    def log_eval(self, rollout: int, values: Mapping[str, Value]) -> None:
        """An evaluation after `rollout`; -1: before the first."""
        self._write({"rollout": rollout, "time": time.time()}, values)
        self.evaluated.add(rollout)

    def sync(self) -> None:
        """Every line so far is on disk when this returns."""
        disk.sync(self.file)

    def _write(self, head: dict[str, Any], values: Mapping[str, Value]) -> None:
        line = head | {name: _plain(value) for name, value in values.items()}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        for sink in self.sinks:
            sink.add(points(line, self.steps), line["time"])

    def close(self) -> None:
        self.file.close()
        for sink in self.sinks:
            sink.close()


def steps_per_rollout(cfg: Config) -> int:
    """Optimizer steps of one rollout; 1 while the batch sizes are not resolved."""
    if cfg.rollout.num_steps_per_rollout:
        return cfg.rollout.num_steps_per_rollout
    samples = cfg.rollout.rollout_batch_size * cfg.rollout.n_samples_per_prompt
    return max(1, samples // (cfg.train.global_batch_size or samples))


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that was cut off by a crash is left out."""
    lines = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines


def truncate(path: Path, start_rollout: int) -> list[dict[str, Any]]:
    """Drop what a resumed run will do again; returns the lines kept."""
    kept = [line for line in read(path) if line["rollout"] < start_rollout] if start_rollout else []
    with disk.replacing(path) as file:
        file.writelines(f"{json.dumps(line)}\n".encode() for line in kept)
    return kept


def points(line: Mapping[str, Any], steps: int) -> Iterator[tuple[str, int, float]]:
    """(name, x, value) of a line, on slime's axes: train/* counts steps, all others rollouts."""
    rollout = line["rollout"]
    for name, value in line.items():
        if name in ("rollout", "time") or value is None:
            continue
        if not name.startswith("train/"):
            yield name, max(rollout, 0), value
        elif isinstance(value, list):
            for step, one in enumerate(value):
                if one is not None:
                    yield name, rollout * steps + step, one
        else:  # a mean over the rollout's steps stands at the last of them
            yield name, rollout * steps + steps - 1, value


def _of_eval(name: str) -> bool:
    return name.startswith("eval/")


def _plain(value: Any) -> Any:
    """A JSON value; a number that is not finite becomes null, which is valid JSON."""
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    number = float(value)
    return number if math.isfinite(number) else None


class TensorBoard:
    """Scalar events, through TensorBoard's own writer: it needs neither torch nor TensorFlow."""

    def __init__(self, directory: Path):
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        shutil.rmtree(directory, ignore_errors=True)
        self.writer = EventFileWriter(str(directory), flush_secs=5)

    def add(self, points: Iterator[tuple[str, int, float]], wall_time: float) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        at: dict[int, list] = {}
        for name, x, value in points:
            at.setdefault(x, []).append(Summary.Value(tag=name, simple_value=value))
        for x, values in at.items():
            self.writer.add_event(Event(wall_time=wall_time, step=x, summary=Summary(value=values)))

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """Weights & Biases; writes to the run's folder without a network when no key is known."""

    AXES = {"train/*": "train/step", "eval/*": "eval/step"}
    ROLLOUT_AXIS = "rollout/step"

    def __init__(self, cfg: Config, run_dir: Path):
        try:
            import wandb
        except ImportError:
            raise ValueError(
                "use_wandb is true but wandb is not installed: `pip install wandb`, "
                "or set logging.use_wandb=false (metrics.jsonl and TensorBoard are always written)"
            ) from None
        known = "WANDB_API_KEY" in os.environ or "api.wandb.ai" in _netrc()
        self.run = wandb.init(
            project=cfg.logging.wandb_project or "spmd_rl",
            group=cfg.logging.wandb_group,
            name=cfg.logging.name or run_dir.name,
            dir=str(run_dir),
            mode=cfg.logging.wandb_mode or (None if known else "offline"),
            config=cfg.model_dump(),
        )
        for axis in (self.ROLLOUT_AXIS, *self.AXES.values()):
            self.run.define_metric(axis)
        for pattern in ("rollout/*", "perf/*"):
            self.run.define_metric(pattern, step_metric=self.ROLLOUT_AXIS)
        for pattern, axis in self.AXES.items():
            self.run.define_metric(pattern, step_metric=axis)

    def add(self, points: Iterator[tuple[str, int, float]], wall_time: float) -> None:
        at: dict[tuple[str, int], dict[str, float]] = {}
        for name, x, value in points:
            axis = self.AXES.get(name.split("/")[0] + "/*", self.ROLLOUT_AXIS)
            at.setdefault((axis, x), {axis: x})[name] = value
        for values in at.values():
            self.run.log(values)

    def close(self) -> None:
        self.run.finish()


def _netrc() -> str:
    path = Path.home() / ".netrc"
    return path.read_text() if path.is_file() else ""
