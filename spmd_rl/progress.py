"""What a run shows while it goes: a live bar on a terminal, else one plain line for each rollout.

Comes in: phases and metrics of rank 0. It must not compute a metric that metrics.jsonl lacks. The
bar is drawn on the terminal itself, past the log; the log gets the plain lines in any case.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from spmd_rl.config.schema import Config

PHASES = ("collect", "train", "save_model", "update_weights")  # shown with their seconds
SHOWN = (  # label, metric, format; a metric that a run lacks is left out
    ("reward", "rollout/raw_reward", "{:.3f}"),
    ("loss", "train/loss", "{:.4f}"),
    ("kl", "train/kl_loss", "{:.2e}"),
    ("entropy", "train/entropy_loss", "{:.3f}"),
    ("length", "rollout/response_len/mean", "{:.1f}"),
)
SHORT = {"save_model": "save", "update_weights": "push"}


class Progress:
    """`phase`, `rollout`, `evaluation` are called as things happen; `say` is for all else."""

    def __init__(
        self,
        cfg: Config,
        num_rollout: int,
        start_rollout: int = 0,
        terminal: TextIO | None = None,
        log_only: Callable[[str], None] | None = None,
    ):
        """`terminal`: where the bar goes, default stdout; `log_only` writes past the terminal."""
        screen = terminal or sys.stdout
        self.log_only = log_only or (lambda line: None)
        self.num_rollout, self.done = num_rollout, start_rollout
        self.samples = cfg.rollout.rollout_batch_size * cfg.rollout.n_samples_per_prompt
        self.sft = cfg.algo.loss_type == "sft_loss"
        self.recent: deque[float] = deque(maxlen=8)  # seconds of the last rollouts
        mode = cfg.logging.progress
        live = mode == "rich" or (mode == "auto" and screen.isatty())
        self.live = Live(screen, num_rollout, start_rollout) if live else None

    def phase(self, name: str) -> None:
        if self.live:
            self.live.update(phase=SHORT.get(name, name))

    def rollout(self, rollout: int, values: Mapping[str, Any]) -> None:
        self.done = rollout + 1
        self.recent.append(values.get("perf/step_time", 0.0))
        parts = [f"rollout {self.done}/{self.num_rollout}", *self.figures(values)]
        parts.append(f"{values.get('perf/step_time', 0.0):.1f} s ({self.times(values)})")
        if self.done < self.num_rollout:
            parts.append(f"eta {clock(self.eta())}")
        line = " | ".join(parts)
        if self.live:
            self.live.update(done=self.done, text=", ".join(self.figures(values)), eta=self.eta())
            self.log_only(line)
        else:
            print(line, flush=True)

    def evaluation(self, rollout: int, values: Mapping[str, Any]) -> None:
        scores = [f"{n} {v:.3f}" for n, v in values.items() if n.count("/") == 1 and "-" not in n]
        self.say(f"after {rollout + 1} rollouts: {', '.join(scores)}")

    def say(self, text: str) -> None:
        if self.live:
            self.live.say(text)
            self.log_only(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self.live:
            self.live.close()

    def figures(self, values: Mapping[str, Any]) -> list[str]:
        """The metrics worth a look, and whole-step tokens per second."""
        hidden = {"reward", "entropy"} if self.sft else {"loss"}
        found = [
            f"{label} {form.format(_mean(values[name]))}"
            for label, name, form in SHOWN
            if values.get(name) is not None and label not in hidden
        ]
        length, seconds = values.get("rollout/response_len/mean"), values.get("perf/step_time")
        if length and seconds:
            found.append(f"{length * self.samples / seconds:,.0f} tok/s")
        return found

    def times(self, values: Mapping[str, Any]) -> str:
        named = [(SHORT.get(p, p), values.get(f"perf/{p}_time")) for p in PHASES]
        return ", ".join(f"{name} {seconds:.1f}" for name, seconds in named if seconds is not None)

    def eta(self) -> float:
        """Seconds to the end, evaluations not counted."""
        mean = sum(self.recent) / len(self.recent) if self.recent else 0.0
        return mean * (self.num_rollout - self.done)


class Live:
    """The bar on a terminal. rich is imported here only."""

    def __init__(self, terminal: TextIO, total: int, done: int):
        from rich import progress
        from rich.console import Console

        self.bar = progress.Progress(
            progress.TextColumn("rollout {task.completed:.0f}/{task.total:.0f}"),
            progress.BarColumn(bar_width=10),
            progress.TextColumn("[bold]{task.fields[phase]:<7}[/]"),
            progress.TextColumn("eta {task.fields[eta]}"),
            progress.TextColumn("{task.fields[text]}"),  # last: a narrow terminal cuts it
            console=Console(file=terminal),
            redirect_stdout=False,
            redirect_stderr=False,
            refresh_per_second=4,
        )
        self.task = self.bar.add_task(
            "run", total=total, completed=done, phase="start", text="", eta="-:--"
        )
        self.bar.start()

    def update(
        self,
        phase: str | None = None,
        done: int | None = None,
        text: str | None = None,
        eta: float | None = None,
    ) -> None:
        fields = {"phase": phase, "text": text, "eta": None if eta is None else clock(eta)}
        changed: dict[str, Any] = {k: v for k, v in fields.items() if v is not None}
        self.bar.update(self.task, completed=done, **changed)

    def say(self, text: str) -> None:
        self.bar.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        self.bar.update(self.task, phase="done")
        self.bar.stop()


def clock(seconds: float) -> str:
    """3:07, or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _mean(value: Any) -> float:
    return sum(value) / len(value) if isinstance(value, (list, tuple)) else value
