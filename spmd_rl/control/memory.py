"""How much memory the job takes on this machine: its processes and all their children, shared
pages counted once.

Comes in: process numbers. Goes out: bytes. Imports no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spmd_rl.control.job import Job

INTERVAL = 10.0  # seconds; a look costs milliseconds for every process


def process_memory(pid: int) -> int:
    """Bytes of one process: its proportional share (PSS), or resident pages where the kernel does
    not tell.
    """
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def give_back() -> None:
    """Give freed memory back to the system. glibc keeps the holes between what lives, and batches
    whose sizes differ leave more of them for hundreds of rollouts. Takes a millisecond.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def tree(pids: Iterable[int]) -> set[int]:
    """These processes and all that descend from them."""
    import psutil

    found = set()
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            found |= {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
    return found


def tree_memory(pids: Iterable[int]) -> int:
    return sum(process_memory(pid) for pid in tree(pids))


class PeakMemory:
    """A thread that keeps the largest sum seen over this rank's machine: all ranks on it and their
    children.
    """

    def __init__(self, job: Job | None = None, interval: float = INTERVAL):
        self._job, self._interval = job, interval
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)
        self._thread.start()

    def _roots(self) -> list[int]:
        watcher = self._job.watcher if self._job else None
        return [os.getpid(), *(other.pid for other in (watcher.neighbours if watcher else ()))]

    def look(self) -> int:
        now = tree_memory(self._roots())
        self._peak = max(self._peak, now)
        return now

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self.look()

    def peak(self) -> int:
        """Bytes, this moment included."""
        self.look()
        return self._peak

    def close(self) -> None:
        self._stop.set()
