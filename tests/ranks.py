"""Real processes for tests: `run_ranks(4, fn, "arg")` runs a module-level function in 4 ranks,
with a hard limit.

Comes in: a function that takes strings; goes out: an Outcome with statuses, output and what was
left running. The launcher is `agent` (ranks as torchrun would start them, this process serving the
store: quick), `plain` (rank 0 serves the store), `srun` (the same, told by Slurm's variables),
`torchrun` (the real one) or `torchruns` (two of them, each a "node", which start ranks again).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from spmd_rl.control.children import _EXEC

ROOT = Path(__file__).resolve().parent.parent
MARK = "SPMD_RL_TEST"
MORTAL = [sys.executable, "-I", "-S", "-c", _EXEC]  # the rest dies when these tests are killed
PATIENCE = 3  # times the limits given: they are for a quiet machine, and guard against hanging only
STRAGGLERS = 3.0  # seconds a process may take to vanish after the ranks have ended


@dataclass
class Outcome:
    """How the ranks ended."""

    statuses: list[int | None]  # by rank, or the launcher's own; None: killed at the limit
    output: str  # of all ranks, stdout and stderr
    ended: float  # time.time() when the last process ended
    left: list[str] = field(default_factory=list)  # command lines still running afterwards

    def lines(self, start: str) -> list[str]:
        """The rest of every line that begins with `start`."""
        return [line[len(start) :] for line in self.output.splitlines() if line.startswith(start)]

    def last(self, count: int = 20) -> str:
        return "\n".join(self.output.rstrip().splitlines()[-count:])

    def since(self, start: str) -> float:
        """Seconds from the time printed on the line `start` to the end of everything."""
        return self.ended - float(self.lines(start)[0])


class Running:
    """Ranks in flight; what `act` gets."""

    def __init__(self, processes: list[subprocess.Popen], log: Path):
        self.processes, self.log = processes, log

    def wait_for(self, text: str, count: int = 1, limit: float = 60.0) -> None:
        end = time.monotonic() + PATIENCE * limit
        while self.log.read_text(errors="replace").count(text) < count:
            if time.monotonic() > end or all(p.poll() is not None for p in self.processes):
                raise AssertionError(f"{text!r} never came:\n{self.log.read_text()}")
            time.sleep(0.02)


def run_ranks(
    n: int,
    fn: Callable[..., None],
    *args: str,
    env: Mapping[str, str] | None = None,
    launcher: str = "agent",
    limit: float = 60.0,
    act: Callable[[Running], None] | None = None,
) -> Outcome:
    """Run `fn(*args)` in n ranks. `act` is called while they run."""
    mark = secrets.token_hex(8)
    command = [sys.executable, "-m", "tests.ranks", f"{fn.__module__}:{fn.__qualname__}", *args]
    with TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        log = Path(folder, "output")
        out = stack.enter_context(open(log, "ab"))
        base = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TORCHELASTIC"))}
        path = os.pathsep.join(filter(None, [str(ROOT), base.get("PYTHONPATH", "")]))
        base |= {MARK: mark, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(env or {})}
        starts = _starts(n, command, launcher, stack)
        processes = [
            subprocess.Popen(
                [*MORTAL, str(os.getpid()), *argv],
                env=base | extra,
                stdout=out,
                stderr=out,
                cwd=folder,
                start_new_session=True,
            )
            for argv, extra in starts
        ]
        try:
            if act is not None:
                act(Running(processes, log))
            statuses = _wait(processes, limit)
            ended = time.time()
            left = _left(mark)  # what a killed launcher left behind may still speak
            return Outcome(statuses, log.read_text(errors="replace"), ended, left)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            for pid in marked(mark):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)


def _starts(n: int, command: list[str], launcher: str, stack: contextlib.ExitStack) -> list:
    """(arguments, extra environment) of every process to start."""
    if launcher == "torchrun":
        run = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={n}",
        ]
        return [([*run, "--no-python", *command], {})]
    if launcher == "torchruns":
        meet = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{_port()}"]
        meet += ["--local-addr=127.0.0.1", f"--nproc-per-node={n // 2}", "--max-restarts=3"]
        run = [sys.executable, "-m", "torch.distributed.run", *meet, "--no-python", *command]
        env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": "lo"}
        return [(run, env), (run, env)]
    if launcher == "agent":
        from torch.distributed import TCPStore

        server = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        stack.callback(lambda: server)  # alive until the ranks are gone
        port, agent = server.port, "True"
    else:
        port, agent = _port(), "False"
    if launcher == "srun":
        common = {"SLURM_NTASKS": str(n), "SLURM_JOB_ID": str(random.randrange(10**6))}
        common |= {"SLURM_STEP_ID": "0", "MASTER_ADDR": "127.0.0.1"}
        tasks = [{"SLURM_PROCID": str(r), "SLURM_LOCALID": str(r)} for r in range(n)]
        return [(command, common | task) for task in tasks]
    common = {
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": agent,
    }
    return [(command, common | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(n)]


def _port() -> int:
    """A port nobody has, and that no connection of another process gets while ours start."""
    while True:
        port = random.randrange(15000, 30000)  # below the kernel's range for connections
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _wait(processes: list[subprocess.Popen], limit: float) -> list[int | None]:
    end = time.monotonic() + PATIENCE * limit
    statuses: list[int | None] = []
    for process in processes:
        try:
            statuses.append(process.wait(max(0.0, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            statuses.append(None)
    return statuses


def marked(mark: str) -> dict[int, str]:
    """Running processes that carry the test's mark, whoever their parent is."""
    found = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in Path("/proc", entry, "environ").read_bytes():
                words = Path("/proc", entry, "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(entry)] = words.decode(errors="replace")
    return found


def _left(mark: str) -> list[str]:
    end = time.monotonic() + STRAGGLERS
    while (found := marked(mark)) and time.monotonic() < end:
        time.sleep(0.02)
    return list(found.values())


def _main() -> None:
    module, name = sys.argv[1].split(":")
    getattr(importlib.import_module(module), name)(*sys.argv[2:])


if __name__ == "__main__":
    _main()
