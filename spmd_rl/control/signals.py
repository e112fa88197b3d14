"""SIGTERM and SIGUSR1 ask for an orderly stop, SIGINT and SIGHUP for a prompt end.

Signals arrive in a pipe, because a Python handler never runs while the main thread sits in C++ (a
collective, a store wait). The watcher reads the pipe; nothing happens inside a handler. Imports no
torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

STOP = (signal.SIGTERM, signal.SIGUSR1)
END = (signal.SIGINT, signal.SIGHUP)
# scancel signals the agent and its ranks alike and the agent passes its own on: one request, not
# two
SAME_REQUEST = 2.0

_stop = threading.Event()


def stop_requested() -> bool:
    """Whether some rank was asked to stop; all ranks see it within a second. Read it at safe
    points.
    """
    return _stop.is_set()


def set_stop() -> None:
    _stop.set()


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """What this thread starts inside is deaf to requests to stop: a scheduler hands them to all
    processes, and a helper that a library starts must not leave before the rank does.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class SignalPipe:
    """Received signals as bytes in a pipe; `wake` puts a zero there to rouse whoever polls it."""

    def __init__(self) -> None:
        self.fd, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._first_term: float | None = None

    def install(self) -> None:
        """Take the signals over (main thread only). What the parent told us to ignore stays
        ignored (nohup), but for SIGUSR1: slurm/run.sbatch lets all ignore it until they are ready.
        """
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in (*STOP, *END):
            if number == signal.SIGUSR1 or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda *_: None)

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full, so the reader is awake anyway
            os.write(self._write, b"\0")

    def read(self) -> list[int]:
        """The signals since the last call, in order."""
        try:
            return [number for number in os.read(self.fd, 4096) if number]
        except BlockingIOError:
            return []

    def repeated(self, number: int) -> bool:
        """Whether this is a second, separate SIGTERM."""
        if number != signal.SIGTERM:
            return False
        now = time.monotonic()
        if self._first_term is None:
            self._first_term = now
        return now - self._first_term > SAME_REQUEST
