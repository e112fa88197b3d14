"""The asyncio side of the sandbox: limits in, a result in words out."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import site
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

START_TIMEOUT = 60.0  # seconds, on a busy machine
GRACE = 30.0  # seconds beyond a run's own limit in which its supervisor must answer
_BOOT = (
    "import sys, json; given = json.loads(sys.argv[1]); sys.path.append(given.pop('package'))\n"
    "from spmd_rl.sandbox.launcher import main; sys.path.pop(); main(**given)"
)
_KEPT = ("PATH", "LD_LIBRARY_PATH", "TMPDIR")  # of the environment; it may hold keys


class SandboxUnavailable(RuntimeError):
    """This machine has no way to confine code; the message says what was tried."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run may use."""

    wall_seconds: float = 10.0
    cpu_seconds: int = 10  # of each of its processes
    memory_bytes: int = 1 << 30  # address space of each process, and what all hold together
    file_bytes: int = 16 << 20  # one file
    disk_bytes: int = 64 << 20  # all files; in memory where namespaces work
    processes: int = 16  # and threads; without namespaces always one process
    output_bytes: int = 1 << 20  # standard output and error together


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a run."""

    stdout: str
    stderr: str  # its last 10,000 bytes: a traceback ends with the fault
    reason: str  # "finished", "exit status 1", "ran for more than 10 s", ...
    ok: bool  # it ended by itself, with exit status 0
    seconds: float


class Sandbox:
    """Runs Python code as text, each run in a fresh confined process; at most `at_once` together.

    The code sees the system's programs, Python and its installed packages (read-only), an empty
    folder to write to, and nothing else: no network, no other files, no other processes. All its
    processes end with the run; a run ends when its caller is cancelled or dies. `way`:
    "namespaces" or "filters" demands one (docs/security.md); None takes what the machine has.
    """

    def __init__(self, at_once: int | None = None, way: str | None = None):
        self.way: str | None = None  # the one taken, once started
        self._wanted = way
        self._turn = asyncio.Semaphore(at_once or len(os.sched_getaffinity(0)))
        self._starting = asyncio.Lock()
        self._control: socket.socket | None = None
        self._launcher: subprocess.Popen | None = None

    async def run(self, code: str, stdin: str = "", limits: Limits | None = None) -> Result:
        """What the code printed and how it ended. SandboxUnavailable where nothing can be confined;
        whatever the code does is a Result, never an exception.
        """
        limits = limits or Limits()
        body = json.dumps({"code": code, "stdin": stdin, "limits": dataclasses.asdict(limits)})
        async with self._turn:
            answer = b""
            for _ in range(3):  # a launcher may have been killed, such as by an administrator
                control = await self._started()
                try:
                    answer = await _ask(control, body.encode(), limits.wall_seconds + GRACE)
                    if answer:
                        return Result(**json.loads(answer))
                    dead = self._launcher is not None and self._launcher.poll() is not None
                except BrokenPipeError:  # it is dying, if not yet dead
                    dead = True
                if dead and control is self._control:  # no other run has replaced it already
                    await self.close()
        return Result("", "", "its supervisor was killed", False, 0.0)

    @property
    def launcher_pid(self) -> int | None:
        """The process that all runs descend from."""
        return self._launcher.pid if self._launcher else None

    async def close(self) -> None:
        """Ends all runs."""
        if self._control:
            self._control.close()
            self._control = None
        if self._launcher:
            self._launcher.kill()
            self._launcher.wait()
            self._launcher = None

    async def _started(self) -> socket.socket:
        async with self._starting:
            if self._control is None:
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                ours.setblocking(False)
                with theirs:
                    self._launcher = _launch(theirs, self._wanted)
                loop = asyncio.get_running_loop()
                try:
                    line = await asyncio.wait_for(loop.sock_recv(ours, 1 << 16), START_TIMEOUT)
                except BaseException:
                    ours.close()
                    await self.close()
                    raise
                told = json.loads(line) if line else {"error": "its launcher could not start"}
                if "error" in told:
                    ours.close()
                    await self.close()
                    raise SandboxUnavailable(
                        "code cannot be confined on this machine, so none is run "
                        f"(docs/security.md): {told['error']}"
                    )
                self._control, self.way = ours, told["way"]
            return self._control


def _launch(theirs: socket.socket, wanted: str | None) -> subprocess.Popen:
    packages = [path for path in site.getsitepackages() if os.path.isdir(path)]
    given = {
        "package": str(Path(__file__).parents[2]),
        "control": theirs.fileno(),
        "parent": os.getpid(),
        "wanted": wanted,
        "packages": packages,
    }
    argv = [sys.executable, "-I", "-S", "-X", "utf8", "-c", _BOOT, json.dumps(given)]
    return subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        env={name: os.environ[name] for name in _KEPT if name in os.environ},
        start_new_session=True,
    )


async def _ask(control: socket.socket, body: bytes, timeout: float) -> bytes:
    """The answer to one request; empty when the run or the launcher was killed. BrokenPipeError
    when there is no launcher to ask."""
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    with ours:
        ours.setblocking(False)
        with theirs:
            while True:
                try:
                    socket.send_fds(control, [b"r"], [theirs.fileno()])
                    break
                except BlockingIOError:
                    await asyncio.sleep(0.001)
                except OSError as error:
                    raise BrokenPipeError("the launcher is gone") from error
        try:
            return await asyncio.wait_for(_exchange(loop, ours, body), timeout)
        except (OSError, asyncio.TimeoutError):
            return b""


async def _exchange(loop: asyncio.AbstractEventLoop, ours: socket.socket, body: bytes) -> bytes:
    await loop.sock_sendall(ours, len(body).to_bytes(8, "little") + body)
    parts = []
    while part := await loop.sock_recv(ours, 1 << 16):
        parts.append(part)
    return b"".join(parts)
