"""What a run tells: the phase it is in, its metrics, its plots. Rank 0 only.

Comes in: what the loop has in hand after each rollout; goes out: runs/<name>/ and the terminal.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spmd_rl import control, plots, timeline
from spmd_rl.config import Config
from spmd_rl.metrics import Metrics
from spmd_rl.progress import Progress
from spmd_rl.rollout.collector import Rollout

EVAL = "eval"  # the phase that is no part of a rollout's time


class RunLog:
    def __init__(self, cfg: Config, run_dir: Path, num_rollout: int, start_rollout: int):
        self.run_dir = run_dir
        self.metrics = Metrics(cfg, run_dir, start_rollout)
        self.progress = Progress(
            cfg, num_rollout, start_rollout, control.terminal(), control.log_only
        )
        self.timeline = timeline.Timeline(run_dir, "loop")
        self.began: float | None = None  # when the first phase of this rollout did
        self.times: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time one phase of a rollout; it becomes `perf/<name>_time` in seconds."""
        self.progress.phase(name)
        self._tell(name)
        began = time.monotonic()
        if self.began is None and name != EVAL:
            self.began = began
        with self.timeline.span(name):
            yield
        if name != EVAL:
            self.times[name] = self.times.get(name, 0.0) + time.monotonic() - began

    def _tell(self, phase: str) -> None:
        """status.json: what the loop is at, for eyes and tools outside the job."""
        status = {"rollout": self.progress.done, "of": self.progress.num_rollout, "phase": phase}
        aside = self.run_dir / ".status.json.part"
        aside.write_text(json.dumps(status | {"at": time.time(), "pid": os.getpid()}) + "\n")
        aside.replace(self.run_dir / "status.json")

    def rollout(self, rollout: int, collected: Rollout, stats: Mapping[str, Any]) -> None:
        values: dict[str, Any] = {f"perf/{name}_time": s for name, s in self.times.items()}
        values["perf/step_time"] = time.monotonic() - (self.began or time.monotonic())
        self.began, self.times = None, {}
        values |= {**collected.metrics, **stats}
        alarm = values.pop("alarm", None)
        if alarm:
            self.say(f"rollout {rollout}: {alarm}")
        self.metrics.log(rollout, values)
        self.progress.rollout(rollout, values)

    def evaluation(self, rollout: int, values: dict[str, float]) -> None:
        """`rollout` is the last one trained on; -1 before the first."""
        self.metrics.log_eval(rollout, values)
        self.progress.evaluation(rollout, values)

    def has_evaluation(self, rollout: int) -> bool:
        """Whether the record holds the evaluation after this rollout."""
        return rollout in self.metrics.evaluated

    def sync(self) -> None:
        """What was told so far is on disk when this returns."""
        self.metrics.sync()

    def say(self, text: str) -> None:
        self.progress.say(text)

    def close(self) -> None:
        self.metrics.close()
        self.progress.close()
        self.timeline.close()
        plots.draw(self.run_dir)
        timeline.draw(self.run_dir)
