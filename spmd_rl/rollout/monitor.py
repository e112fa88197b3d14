"""Notices at once that a server, or a process that a server cannot live without, has ended.

Comes in: process numbers of servers that answer; goes out: which ended first and how, told from a
thread of its own. SGLang takes seconds to end once a process of its own has died, and breaks
connections meanwhile: whoever sees those must not be the first to speak. Knows nothing of HTTP.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from spmd_rl.control.children import process_state

LOOK_EVERY = 0.2  # seconds between looks at processes; their end wakes the thread at once
PARTS = "sglang::"  # SGLang names its schedulers and detokenizers so


class Ended(NamedTuple):
    """The end of a watched process."""

    server: int  # as given to `watch`
    part: str  # the process below the server that ended, "" for the server itself
    status: int | None  # negative: killed by that signal; None: another process learned it first


@dataclass(slots=True)
class _Process:
    pid: int
    started: int  # distinguishes it from a later process of the same number
    part: str
    pidfd: int  # -1 where the system has none

    def look(self) -> tuple[bool, int | None]:
        """Whether it has ended, and its status: known until its parent has asked for it."""
        state = process_state(self.pid)
        if state is None or state[1] != self.started:
            return True, None
        gone = state[0] in "ZX"
        return gone, os.waitstatus_to_exitcode(state[2]) if gone else None


class Monitor:
    """Watches servers, each until it ends or is forgotten."""

    def __init__(self, tell: Callable[[Ended], None]):
        self._tell = tell
        self._servers: dict[int, list[_Process]] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)

    def watch(self, server: int, pid: int) -> None:
        """Watch this process and SGLang's own below it, which are there once it answers."""
        family = [found for found in (_open(pid, ""), *_parts(pid)) if found]
        with self._lock:
            self._servers[server] = family
        if not self._thread.is_alive() and not self._closing.is_set():
            self._thread.start()

    def forget(self, server: int) -> None:
        """It is about to be ended on purpose."""
        with self._lock:
            family = self._servers.pop(server, [])
        _close(family)

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        for server in list(self._servers):
            self.forget(server)

    def _run(self) -> None:
        while not self._closing.is_set():
            poll = select.poll()
            with self._lock:
                for process in (one for family in self._servers.values() for one in family):
                    if process.pidfd >= 0:
                        poll.register(process.pidfd, select.POLLIN)
            poll.poll(1000 * LOOK_EVERY)
            for ended in self._ended():
                self._tell(ended)

    def _ended(self) -> list[Ended]:
        found = []
        with self._lock:
            for server, family in list(self._servers.items()):
                for process in family:  # the server first: its end takes its parts along
                    gone, status = process.look()
                    if gone:
                        found.append(Ended(server, process.part, status))
                        _close(self._servers.pop(server))
                        break
        return found


def _open(pid: int, part: str) -> _Process | None:
    state = process_state(pid)
    if state is None:
        return _Process(pid, -1, part, -1) if not part else None
    pidfd = -1
    with suppress(OSError, AttributeError):
        pidfd = os.pidfd_open(pid)
    return _Process(pid, state[1], part, pidfd)


def _parts(pid: int) -> list[_Process | None]:
    import psutil

    found = []
    with suppress(psutil.Error):
        for child in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.Error):
                name = (child.cmdline() or [""])[0]
                if name.startswith(PARTS):
                    found.append(_open(child.pid, name))
    return found


def _close(family: list[_Process]) -> None:
    for process in family:
        if process.pidfd >= 0:
            with suppress(OSError):
                os.close(process.pidfd)
            process.pidfd = -1
