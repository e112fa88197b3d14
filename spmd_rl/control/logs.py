"""Each rank's output in a file of its own, C++ output too; rank 0's also on the terminal.

Done at the level of file descriptors. The copy to the terminal is made by a `tee` process, not by
a thread: a thread would deadlock with C code that fills the pipe while it holds the interpreter,
and would lose the last lines.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from spmd_rl.control.job import Job

TEE_PATIENCE = (
    0.5  # seconds for the copy to end; a child that kept our output open would delay it for ever
)

_terminal_fd = 2  # where the job was started from
_terminal: TextIO | None = None
_log_fd = -1
_tee: subprocess.Popen | None = None


def log_to(run_dir: str | Path, job: Job) -> Path:
    """From now on stdout and stderr go to <run_dir>/logs/rank<N>.log, those of rank 0 to the
    terminal as well.
    """
    global _terminal_fd, _log_fd, _tee
    path = Path(run_dir) / "logs" / f"rank{job.rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    job.run_dir = Path(run_dir)
    flush()
    _terminal_fd = os.dup(1)
    os.set_inheritable(_terminal_fd, False)
    _log_fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    if job.rank:
        target = os.dup(_log_fd)
    else:
        read, target = os.pipe()
        _tee = subprocess.Popen(
            ["tee", "-ia", str(path)],
            stdin=read,
            stdout=_terminal_fd,
            start_new_session=True,
            env={"PATH": os.environ.get("PATH", os.defpath)},  # not marked as the job's child
        )
        os.close(read)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(line_buffering=True)
    atexit.register(close)
    return path


def terminal() -> TextIO:
    """The real terminal (or what stands for it), for a progress display; nothing written there is
    logged.
    """
    global _terminal
    if _terminal is None:
        _terminal = os.fdopen(os.dup(_terminal_fd), "w", buffering=1)
    return _terminal


def log_only(line: str) -> None:
    """A line for the log that the terminal shows in another form."""
    if _log_fd >= 0:
        os.write(_log_fd, f"{line}\n".encode())


def flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def close() -> None:
    """Everything printed so far has reached the terminal and the log; nothing more is."""
    if _log_fd >= 0:
        hush()
        _end_tee()


def last_words(text: str) -> None:
    """To the terminal, after all that was printed before, and to the log."""
    _end_tee()
    with contextlib.suppress(OSError):
        os.write(_terminal_fd, text.encode())
    if _log_fd >= 0:
        os.write(_log_fd, text.encode())


def hush() -> None:
    """From now on only `last_words` reach the terminal: C++ complains of lost connections at the
    end."""
    global _terminal_fd
    flush()
    if _log_fd < 0:
        _terminal_fd = os.dup(2)
    rest = _log_fd if _log_fd >= 0 else os.open(os.devnull, os.O_WRONLY)
    os.dup2(rest, 1)
    os.dup2(rest, 2)


def _end_tee() -> None:
    """Let the copy finish; it does once our output goes elsewhere."""
    if _tee is None:
        return
    with contextlib.suppress(subprocess.TimeoutExpired):
        _tee.wait(TEE_PATIENCE)
