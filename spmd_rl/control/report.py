"""What the watchers say about a failure: which report is the first cause, and how it is printed.
Pure functions.

Comes in: reports from any ranks, in the order they were posted. Goes out: text whose last lines
are the cause.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from spmd_rl.control.status import INTERRUPTED

# What a rank sees when another one is gone. Its own words, since gloo and NCCL raise plain
# RuntimeErrors.
_SYMPTOMS = (
    *("connection closed by peer", "connection reset", "connection refused", "broken pipe"),
    *("gloo", "nccl", "socket", "tcpstore", "failed to recv", "failed to send"),
    *("remote process exited", "timed out waiting", "server disconnected", "econnreset"),
)


class Explained(Exception):
    """A failure whose text says what happened and what to do: it is reported without traceback."""


@dataclass(frozen=True, slots=True)
class Report:
    """One rank's account of a failure."""

    rank: int  # who says so
    doing: str  # the command it was in
    text: str  # traceback or sentence
    symptom: bool = False  # probably the consequence of a failure elsewhere
    dead: int = -1  # the rank it is about, when that one cannot speak for itself
    host: str = ""
    time: float = 0.0
    status: int = 1  # exit status it leads to

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str | bytes) -> Report:
        return cls(**json.loads(text))

    @property
    def about(self) -> int:
        return self.rank if self.dead < 0 else self.dead

    def summary(self) -> str:
        """One line: who, where, what."""
        last = self.text.strip().splitlines()[-1].strip() if self.text.strip() else "no details"
        if self.status == INTERRUPTED or self.dead >= 0:
            return f"{last} ({self.doing})"
        return f"rank {self.rank} in {self.doing}: {last}"


def is_symptom(error: BaseException) -> bool:
    """Whether an exception looks like a peer's failure seen from here: a lost connection, a broken
    collective. An exception may say so itself, by an attribute `is_symptom`.
    """
    if getattr(error, "is_symptom", False):
        return True
    if isinstance(error, ConnectionError | EOFError | TimeoutError):
        return True
    words = f"{type(error).__name__} {error}".lower()
    ours = type(error) is RuntimeError or type(error).__name__.startswith("Dist")
    return ours and any(symptom in words for symptom in _SYMPTOMS)


def describe(error: BaseException, skip: int = 1) -> str:
    """Its traceback, without the first `skip` frames (the control plane's own)."""
    if isinstance(error, Explained):
        return str(error)
    frames = error.__traceback__
    for _ in range(skip):
        frames = frames.tb_next if frames and frames.tb_next else frames
    return "".join(traceback.format_exception(type(error), error, frames)).rstrip()


def first_cause(reports: Sequence[Report]) -> Report:
    """Causes go before symptoms, then the order of posting decides."""
    return next((report for report in reports if not report.symptom), reports[0])


def block(reports: Sequence[Report], note: str = "") -> str:
    """The last words of a job: other reports in a line each, then the first cause in full."""
    cause = first_cause(reports)
    if cause.status == INTERRUPTED:
        return f"\n{cause.summary()}\n"
    lines = ["", " the job failed ".center(78, "=")]
    others = [report for report in reports if report is not cause]
    lines += [f"also reported: {report.summary()}" for report in others[:16]]
    if note:
        lines.append(note)
    host = f" on {cause.host}" if cause.host else ""
    lines += [f"first cause, rank {cause.about}{host}, in {cause.doing}:", cause.text.rstrip(), ""]
    lines.append(f"cause: {cause.summary()}")
    return "\n".join(lines) + "\n"


def launcher_error(cause: Report, rank: int, lines: int = 10) -> str:
    """The content of torchrun's error file, so that its own summary, printed after us, ends with
    the cause too.
    """
    text = cause.text.strip().splitlines()[-lines:]
    words = "\n".join(["", *text, cause.summary()] if len(text) > 1 else [cause.summary()])
    # the oldest entry is what torchrun calls the root cause: let it be the rank this is about
    when = int(cause.time) + (rank != cause.about)
    extra = {"py_callstack": words, "timestamp": str(when)}
    return json.dumps({"message": {"message": cause.summary(), "extraInfo": extra}})
