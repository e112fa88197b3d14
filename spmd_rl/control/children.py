"""Child processes that never outlive their rank, and a clean environment for them.

A child dies with its rank (PR_SET_PDEATHSIG, even when the rank is SIGKILLed), leads a process
group of its own, and carries the job's mark in its environment, so that grandchildren that escaped
both are found as well. Imports no torch and knows nothing of what the children are.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

MARK = "SPMD_RL_JOB"  # environment variable every child of a job carries: <job.token>.<rank>

STRIPPED = {
    *("LD_PRELOAD", "RANK", "WORLD_SIZE", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
    *("NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "OMPI_COMM_WORLD_SIZE"),
}
STRIPPED_PREFIXES = (
    *("TMS_INIT_", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_"),
    *("SLURM_", "PMI_", "PMIX_", "OMPI_"),
)

# Runs in the child before its program: the death signal, a look whether the parent is already gone,
# and a deaf ear to the request to stop, which Slurm sends to all processes.
# A preexec_fn would run Python between fork and exec of a process full of threads.
_EXEC = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
if os.getppid() != int(sys.argv[1]): os._exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""

_children: set[Child] = set()
_lock = threading.Lock()


def clean_env(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without what belongs to a rank alone, plus `extra`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in STRIPPED and not name.startswith(STRIPPED_PREFIXES)
    }
    return kept | dict(extra or {})


class Child:
    """A running child process."""

    def __init__(self, process: subprocess.Popen, log: Path | None):
        self.process, self.log, self.pid = process, log, process.pid

    def poll(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self.process.poll()

    def wait(self, timeout: float | None = None) -> int:
        return self.process.wait(timeout)

    def tail(self, lines: int = 20) -> str:
        """The end of its log."""
        if self.log is None or not self.log.exists():
            return ""
        with open(self.log, errors="replace") as file:
            return "".join(deque(file, lines))

    def signal(self, number: int) -> None:
        """To its whole process group; the group's name is safe to use until the child is reaped."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def stop(self, grace: float = 5.0) -> int:
        """SIGTERM to its process group, SIGKILL to what is left after `grace` seconds; its exit
        status.
        """
        return stop_all([self], grace)[0]


def spawn(
    argv: Sequence[str],
    env: Mapping[str, str] | None = None,
    log: str | Path | None = None,
    cwd: str | Path | None = None,
    stdin: Any = subprocess.DEVNULL,
    **popen: Any,
) -> Child:
    """Start a child: `clean_env(env)`, output appended to `log`, dead when this process dies."""
    wrapped = [sys.executable, "-I", "-S", "-c", _EXEC, str(os.getpid()), *map(str, argv)]
    if log is not None:
        log = Path(log)
        log.parent.mkdir(parents=True, exist_ok=True)
        out = open(log, "ab")  # noqa: SIM115
    else:
        out = None

    def start() -> Child:
        with contextlib.ExitStack() as stack:
            if out is not None:
                stack.enter_context(out)
                popen.update(stdout=out, stderr=subprocess.STDOUT)
            process = subprocess.Popen(
                wrapped,
                env=clean_env(env),
                cwd=cwd,
                stdin=stdin,
                start_new_session=True,
                **popen,
            )
        child = Child(process, log)
        with _lock:
            _children.add(child)
        return child

    return _in_spawner(start)


def stop_all(children: Sequence[Child] | None = None, grace: float = 5.0) -> list[int]:
    """Stop these children, or all there are, together; also what they started in other groups."""
    with _lock:
        chosen = list(_children) if children is None else list(children)
    families = [(child, _descendants(child.pid)) for child in chosen]
    for child in chosen:
        child.signal(signal.SIGTERM)
    deadline = time.monotonic() + grace
    while any(_alive(child.pid) for child in chosen) and time.monotonic() < deadline:
        time.sleep(0.02)
    for child, family in families:
        child.signal(signal.SIGKILL)
        for process in family:
            with contextlib.suppress(Exception):  # gone, or its number is another's: psutil checks
                process.kill()
    statuses = [child.wait() for child in chosen]
    with _lock:
        _children.difference_update(chosen)
    return statuses


def kill_marked(owner: str) -> list[int]:
    """SIGKILL every process on this machine marked by a rank (`token.rank`) or job (`token.`);
    their numbers.
    """
    mark = f"{MARK}={owner}".encode()
    killed = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            words = Path("/proc", entry, "environ").read_bytes().split(b"\0")
            ours = any(
                word.startswith(mark) if owner.endswith(".") else word == mark for word in words
            )
            # Python's resource tracker ends with its process, and removes shared memory before it
            # does
            if ours and b"resource_tracker" not in Path("/proc", entry, "cmdline").read_bytes():
                os.kill(int(entry), signal.SIGKILL)
                killed.append(int(entry))
    return killed


def process_state(pid: int) -> tuple[str, int, int] | None:
    """State letter, start time and exit code of a process (the code only once it is a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19]), int(fields[-1])


def _alive(pid: int) -> bool:
    state = process_state(pid)
    return state is not None and state[0] not in "ZX"


def _descendants(pid: int) -> list[Any]:
    import psutil

    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


_jobs: queue.SimpleQueue[tuple[Callable[[], Child], queue.SimpleQueue]] = queue.SimpleQueue()
_spawner: threading.Thread | None = None


def _in_spawner(start: Callable[[], Child]) -> Child:
    """Fork in one thread that never ends: the death signal comes when the forking *thread* ends."""
    global _spawner
    with _lock:
        if _spawner is None or not _spawner.is_alive():
            _spawner = threading.Thread(target=_spawn_forever, name="spawner", daemon=True)
            _spawner.start()
    answer: queue.SimpleQueue = queue.SimpleQueue()
    _jobs.put((start, answer))
    result = answer.get()
    if isinstance(result, BaseException):
        raise result
    return result


def _spawn_forever() -> None:
    while True:
        start, answer = _jobs.get()
        try:
            answer.put(start())
        except BaseException as error:  # handed to the caller
            answer.put(error)
