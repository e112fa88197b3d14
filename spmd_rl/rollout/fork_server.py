"""CPU engines of one node: a process that imports SGLang once and forks an HTTP server per
request.

Imports are most of an engine's start, and most of its memory; forked engines share both. Comes
in: JSON lines on standard input (a socket), `{"start": i, "args": {...}, "env": {...}, "log":
path}` or `{"stop": i}`. Goes out on it: `{"ready": true}` once, then per engine `{"started": i,
"pid": n}` and, when it ended, `{"exit": i, "status": n}`. End of input ends every engine.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

REAP_EVERY = 0.2  # seconds between looks at the children when nothing is asked
PR_SET_PDEATHSIG = 1


class ForkServer:
    def __init__(self, channel: socket.socket):
        self.channel = channel
        self.buffer = b""
        self.pids: dict[int, int] = {}  # engine -> process
        self.scratch: dict[int, str] = {}  # engine -> its temporary directory
        self.stopping = False

    def serve(self) -> None:
        """Until SIGTERM or the other end of the channel closes, which its process's death does."""
        while not self.stopping:
            if select.select([self.channel], [], [], REAP_EVERY)[0]:
                data = self.channel.recv(1 << 16)
                if not data:
                    break
                *lines, self.buffer = (self.buffer + data).split(b"\n")
                for line in lines:
                    self.handle(json.loads(line))
            self.reap()

    def handle(self, request: dict[str, Any]) -> None:
        if "start" in request:
            self.start(request["start"], request["args"], request["env"], request["log"])
        elif "stop" in request:
            self.kill(request["stop"])

    def start(self, index: int, args: dict[str, Any], env: dict[str, str], log: str) -> None:
        scratch = tempfile.mkdtemp(prefix=f"spmd_rl-engine{index}-")
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                self._become_engine(args, env | {"TMPDIR": scratch}, log)
                status = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(status)
        self.pids[index], self.scratch[index] = pid, scratch
        self.send({"started": index, "pid": pid})

    def _become_engine(self, args: dict[str, Any], env: dict[str, str], log: str) -> None:
        os.setsid()
        die_with_parent(signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.channel.close()
        null = os.open(os.devnull, os.O_RDONLY)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for source, target in ((null, 0), (out, 1), (out, 2)):
            os.dup2(source, target)
        os.environ.update(env)
        tempfile.tempdir = None  # read TMPDIR again
        from sglang.srt.entrypoints.http_server import launch_server
        from sglang.srt.server_args import ServerArgs

        configure_logging(args.get("log_level", "warning"))
        server_args = ServerArgs(**args)
        if hasattr(server_args, "resolve_once"):
            server_args.resolve_once()
        launch_server(server_args)

    def kill(self, index: int) -> None:
        """The engine with all its processes; its end is reported by `reap` like any other."""
        if index in self.pids:
            try:
                os.killpg(self.pids[index], signal.SIGKILL)
            except ProcessLookupError:  # not yet leader of its group
                os.kill(self.pids[index], signal.SIGKILL)

    def reap(self) -> None:
        for index, pid in list(self.pids.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self._forget(index, pid)
                self.send({"exit": index, "status": os.waitstatus_to_exitcode(status)})

    def _forget(self, index: int, pid: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # schedulers of a server that died first
        shutil.rmtree(self.scratch.pop(index), ignore_errors=True)
        for file in Path("/dev/shm").glob(f"sgl_shm_*_{pid}_*"):
            file.unlink(missing_ok=True)
        del self.pids[index]

    def terminate(self, *_: object) -> None:
        """Signal handler: the engines' scratch directories are still to be removed."""
        self.stopping = True

    def send(self, event: dict[str, Any]) -> None:
        with suppress(OSError):  # the parent is gone; end of input follows
            self.channel.sendall(json.dumps(event).encode() + b"\n")

    def close(self) -> None:
        for index in list(self.pids):
            self.kill(index)
        for index, pid in list(self.pids.items()):
            os.waitpid(pid, 0)
            self._forget(index, pid)


def die_with_parent(signum: int) -> None:
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signum))
    if os.getppid() != parent:  # it died in between
        os._exit(1)


def configure_logging(level: str) -> None:
    import logging

    logging.basicConfig(
        level=level.upper(), format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S", force=True
    )


def main() -> int:
    die_with_parent(signal.SIGTERM)  # not SIGKILL: see ForkServer.terminate
    from spmd_rl.rollout.cpu_sglang import prepare

    prepare()
    gc.collect()
    gc.freeze()  # a collection in an engine would otherwise copy the shared pages
    server = ForkServer(socket.socket(fileno=os.dup(0)))
    signal.signal(signal.SIGTERM, server.terminate)
    server.send({"ready": True})
    try:
        server.serve()
    finally:
        server.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
