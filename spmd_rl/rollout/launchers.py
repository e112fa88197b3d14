"""Two ways to start an SGLang server: forked from a process that has imported it (CPU), or its
own launcher (CUDA).

Comes in: ServerArgs fields, an environment and a log file per engine. Goes out: exit statuses.
Both take the key out of the command line.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from spmd_rl.config import Config
from spmd_rl.control import Child, spawn
from spmd_rl.rollout import engine_args

STOP_SECONDS = 10.0
OURS = "/dev/shm/sgl"  # SGLang's names; not torch's, which belong to the trainer


class CpuLauncher:
    """The client of fork_server.py: one such process a node, engines forked from it on request."""

    def __init__(self, cfg: Config, logs: Path):
        self.cfg, self.log = cfg, logs / "engines.log"
        self.server: Child | None = None
        self._buffer = b""
        self._running: set[int] = set()
        self._ended: dict[int, int] = {}
        self._pids: dict[int, int] = {}
        self._lock = threading.Lock()  # the monitor's thread asks for statuses too

    def prepare(self) -> None:
        """Start the fork server, if it is not there; it begins to import at once."""
        if self.server is not None and self.server.poll() is None:
            return
        self._buffer, self._running, self._ended = b"", set(), {}
        self.channel, theirs = socket.socketpair()
        argv = [sys.executable, "-m", "spmd_rl.rollout.fork_server"]
        env = engine_args.environment(self.cfg)
        with theirs:
            self.server = spawn(argv, env=env, log=self.log, stdin=theirs)

    def start(self, index: int, args: dict[str, Any], env: dict[str, str], log: Path) -> None:
        self._ended.pop(index, None)
        self._running.add(index)
        self._send({"start": index, "args": args, "env": env, "log": str(log)})

    def ready(self, index: int) -> int:
        self._read(0.0)
        return self._pids[index]

    def status(self, index: int) -> int | None:
        self._read(0.0)
        return self._ended.get(index)

    def stop(self, index: int) -> None:
        """Kill the engine and wait until it is gone."""
        if index not in self._running:
            return
        self._send({"stop": index})
        deadline = time.monotonic() + STOP_SECONDS
        while index in self._running and time.monotonic() < deadline:
            self._read(0.1)

    def close(self) -> None:
        """End of input ends the engines and then the server, which removes their scratch files."""
        if self.server is None:
            return
        self.channel.close()
        self.server.stop(grace=STOP_SECONDS)
        self.server = None

    def _send(self, request: dict[str, Any]) -> None:
        try:
            self.channel.sendall(json.dumps(request).encode() + b"\n")
        except OSError:
            self._server_gone()

    def _read(self, timeout: float) -> None:
        with self._lock:
            self._take_in(timeout)

    def _take_in(self, timeout: float) -> None:
        while select.select([self.channel], [], [], timeout)[0]:
            timeout = 0.0
            try:
                data = self.channel.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                return self._server_gone()
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            for event in map(json.loads, lines):
                if "started" in event:
                    self._pids[event["started"]] = event["pid"]
                if "exit" in event:
                    self._running.discard(event["exit"])
                    self._ended[event["exit"]] = event["status"]

    def _server_gone(self) -> None:
        from spmd_rl.rollout.engines import EngineDied, tail

        raise EngineDied(
            "the process that all CPU engines of this node are forked from has ended; "
            f"the end of {self.log}:\n{tail(self.log)}"
        )


class CudaLauncher:
    """`python -m sglang.launch_server` per engine; its arguments are in a file only this user
    may read.
    """

    def __init__(self, cfg: Config, logs: Path):
        self.cfg, self.logs = cfg, logs
        self._children: dict[int, Child] = {}
        self._configs: dict[int, Path] = {}
        self._files: dict[int, set[Path]] = {}
        self._private: tempfile.TemporaryDirectory | None = None

    def prepare(self) -> None:
        if self._private is not None:
            return
        self._private = tempfile.TemporaryDirectory(prefix="spmd_rl-engines-")  # mode 0700

    def start(self, index: int, args: dict[str, Any], env: dict[str, str], log: Path) -> None:
        assert self._private is not None
        config = Path(self._private.name) / f"engine{index}.yaml"
        config.write_text(engine_args.cuda_secrets(args))
        self._configs[index] = config
        scratch = Path(self._private.name) / f"scratch{index}"
        scratch.mkdir(exist_ok=True)
        command = engine_args.cuda_command(args, config)
        self._children[index] = spawn(
            command, env=env | {"TMPDIR": str(scratch)}, log=log, cwd=self.logs
        )

    def ready(self, index: int) -> int:
        self._configs.pop(index).unlink()  # read by now, and it holds the key
        pid = self._children[index].pid
        self._files[index] = shared_memory_of(pid)
        return pid

    def status(self, index: int) -> int | None:
        return self._children[index].poll()

    def stop(self, index: int) -> None:
        """At once: SGLang's own shutdown takes seconds, and all it saves is done here."""
        if index in self._children:
            child = self._children.pop(index)
            files = self._files.pop(index, set()) | shared_memory_of(child.pid)
            child.stop(grace=0.0)
            for file in files:
                file.unlink(missing_ok=True)

    def close(self) -> None:
        for index in list(self._children):
            self.stop(index)
        if self._private is not None:
            self._private.cleanup()


def shared_memory_of(pid: int) -> set[Path]:
    """Files in /dev/shm that a server and its children made: SIGKILL would leave them there."""
    import psutil

    found: set[Path] = set()
    with suppress(psutil.Error, OSError):
        server = psutil.Process(pid)
        for process in (server, *server.children(recursive=True)):
            lines = Path("/proc", str(process.pid), "maps").read_text().splitlines()
            found |= {Path("/dev", line.partition("/dev/")[2]) for line in lines if OURS in line}
    return found
