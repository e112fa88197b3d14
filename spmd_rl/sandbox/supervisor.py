"""One run from outside: starts the confined process, counts what it uses, ends all of it.

Comes in: on a socket, the length and the JSON of `{"code", "stdin", "limits"}`; goes out: JSON of
`{"stdout", "stderr", "reason", "ok", "seconds"}`. When the socket closes, the run ends. With
namespaces this is the run's process 1: it cannot be signalled from inside, and its end is the end
of every process of the run, wherever they went.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import time
from typing import Any

from spmd_rl.sandbox import jail, kernel
from spmd_rl.sandbox.payload import run_code

LOOK_EVERY = 0.05  # seconds between looks at memory and disk
TAIL = 10_000  # bytes of standard error that are kept: its end says what went wrong
_PAGE = os.sysconf("SC_PAGE_SIZE")


def serve(waiting: socket.socket, way: str, ids: tuple[int, int], packages: list[str]) -> None:
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request = _read(waiting)
    if request is None:
        return
    limits = request["limits"]
    with jail.box(way, ids, limits["disk_bytes"]) as folder:
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)  # out of reach of its child, which is the same user
        run = _Run(way, folder, limits)
        run.start(request["code"], request["stdin"], packages)
        try:
            run.watch(waiting)
        finally:
            run.kill()
    answer = json.dumps(run.result()).encode()
    with contextlib.suppress(OSError):
        waiting.sendall(answer)


class _Run:
    def __init__(self, way: str, folder: str, limits: dict[str, Any]):
        self.way, self.folder, self.limits = way, folder, limits
        self.pid = 0
        self.status: int | None = None  # as waitpid gives it
        self.ended: str | None = None  # why it was ended from here
        self.began = time.monotonic()
        self.out, self.err = bytearray(), bytearray()
        self.printed = 0
        self.pipes: dict[int, bytearray] = {}

    def start(self, code: str, text: str, packages: list[str]) -> None:
        given = os.memfd_create("stdin")
        with open(given, "wb", closefd=False) as file:
            file.write(text.encode("utf-8", "surrogatepass"))
        os.lseek(given, 0, os.SEEK_SET)
        (out, their_out), (err, their_err) = os.pipe(), os.pipe()
        # An end of a child wakes the poll.
        self.child_ended, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self.pid = os.fork()
        if self.pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for source, target in ((given, 0), (their_out, 1), (their_err, 2)):
                os.dup2(source, target)
            os.closerange(3, 1024)
            run_code(code, self.folder, self.limits, lambda: self._confine(packages), packages)
        for descriptor in (given, their_out, their_err):
            os.close(descriptor)
        for descriptor, text_ in ((out, self.out), (err, self.err)):
            os.set_blocking(descriptor, False)
            self.pipes[descriptor] = text_

    def _confine(self, packages: list[str]) -> None:
        jail.confine(self.way, packages, self.folder)

    def watch(self, waiting: socket.socket) -> None:
        """Until the code has ended, or must."""
        poll = select.poll()
        for descriptor in (*self.pipes, waiting.fileno(), self.child_ended):
            poll.register(descriptor, select.POLLIN)
        limit = self.limits["wall_seconds"]
        look = self.began + LOOK_EVERY
        while not self.ended and self.status is None:
            now = time.monotonic()
            if now - self.began > limit:
                self.ended = f"ran for more than {limit:g} s"
                break
            if now >= look:
                self._weigh()
                look = now + LOOK_EVERY
            for descriptor, _ in poll.poll(1000 * min(LOOK_EVERY, limit)):
                if descriptor == waiting.fileno():
                    self.ended = "nobody waits for it any more"
                elif descriptor == self.child_ended:
                    os.read(descriptor, 4096)
                    self._reap()
                elif not self._drain(descriptor):
                    poll.unregister(descriptor)
        for descriptor in self.pipes:
            self._drain(descriptor)

    def kill(self) -> None:
        """Every process of the run."""
        if self.way == jail.NAMESPACES:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)  # all but this one: they are a namespace
        elif self.status is None:
            os.kill(self.pid, signal.SIGKILL)  # there is no other: it could not fork
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, 0)
                if pid == self.pid:
                    self.status = status

    def result(self) -> dict[str, Any]:
        reason = self.ended or _told(self.status, self.limits)
        return {
            "stdout": self.out.decode(errors="replace"),
            "stderr": self.err[-TAIL:].decode(errors="replace"),
            "reason": reason,
            "ok": reason == "finished",
            "seconds": time.monotonic() - self.began,
        }

    def _reap(self) -> None:
        """Take the ends of all that ended: orphans come here too."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self.pid:
                    self.status = status

    def _drain(self, descriptor: int) -> bool:
        """Read what is there; False when nothing more will come."""
        while self.printed <= self.limits["output_bytes"]:
            try:
                data = os.read(descriptor, 1 << 16)
            except BlockingIOError:
                return True
            if not data:
                return False
            room = self.limits["output_bytes"] - self.printed
            self.printed += len(data)
            kept = self.pipes[descriptor]
            kept += data[:room]
        self.ended = f"printed more than {self.limits['output_bytes']} bytes"
        return False

    def _weigh(self) -> None:
        """Memory of all its processes; without a box of limited size also the disk."""
        limit = self.limits["memory_bytes"]
        if self.way == jail.NAMESPACES and _memory() > limit:
            self.ended = f"used more than {limit >> 20} MiB of memory"
        limit = self.limits["disk_bytes"]
        if self.way == jail.FILTERS and _disk(self.folder, limit) > limit:
            self.ended = f"wrote more than {limit >> 20} MiB of files"


def _read(waiting: socket.socket) -> dict[str, Any] | None:
    head = _exactly(waiting, 8)
    body = _exactly(waiting, int.from_bytes(head, "little")) if head else None
    return json.loads(body) if body else None


def _exactly(waiting: socket.socket, size: int) -> bytes | None:
    parts, missing = [], size
    while missing:
        part = waiting.recv(min(missing, 1 << 20))
        if not part:
            return None
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _told(status: int | None, limits: dict[str, Any]) -> str:
    code = os.waitstatus_to_exitcode(status or 0)
    if code >= 0:
        return f"exit status {code}" if code else "finished"
    used = os.times()
    cpu = used.children_user + used.children_system
    if -code in (signal.SIGXCPU, signal.SIGKILL) and cpu >= limits["cpu_seconds"] * 0.9:
        return f"used more than {limits['cpu_seconds']} s of processor time"
    return f"killed by signal {-code} ({signal.strsignal(-code)})"


def _memory() -> int:
    """Bytes that the processes of this namespace hold, this one not counted."""
    total = 0
    for entry in os.listdir("/proc"):
        if entry.isdigit() and entry != "1":
            with contextlib.suppress(OSError), open(f"/proc/{entry}/statm") as file:
                total += int(file.read().split()[1]) * _PAGE
    return total


def _disk(folder: str, enough: int) -> int:
    """Bytes below a folder, an entry counting as a page at least; stops counting at `enough`."""
    total = 0
    for where, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with contextlib.suppress(OSError):
                total += _PAGE + os.lstat(os.path.join(where, name)).st_blocks * 512
            if total > enough:
                return total
    return total
