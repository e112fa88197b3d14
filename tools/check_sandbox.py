"""Whether this machine can confine code, and what becomes of attempts to get out.

    python tools/check_sandbox.py [--way namespaces|filters] [--runs 200]

Runs each attack in spmd_rl.sandbox beside a listening port, a private file and processes of this
user, and prints a table; then what a run costs. Exit status 1 when anything got out.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from spmd_rl.sandbox import Limits, Result, Sandbox, SandboxUnavailable  # noqa: E402

LIMITS = Limits(wall_seconds=2, cpu_seconds=1)
KEY = "key-of-the-run-0123456789"
OUT = "ESCAPED"  # what an attack prints when it has done what it must not

# Each may use the names of Surroundings, written as NAME.
ATTACKS = {
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "threads without end": """
import threading, time
while True: threading.Thread(target=time.sleep, args=(60,)).start()""",
    "10 GB allocation": f"x = bytearray(10 << 30)\nprint('{OUT}')",
    "4 GB in small processes": f"""
import os, time
for n in range(12):
    if os.fork() == 0:
        x = bytearray(b'x') * (350 << 20)
        open(f'has{{n}}', 'w').close()
        time.sleep(60)
while len(os.listdir()) < 12: time.sleep(0.01)
print('{OUT}', flush=True)""",
    "read the run folder's key": f"print('{OUT}', open('KEY_FILE').read())",
    "find the key in other processes": f"""
import glob
for path in glob.glob('/proc/[0-9]*/environ') + ['/proc/VICTIM/environ']:
    try:
        if b'{KEY}' in open(path, 'rb').read(): print('{OUT}')
    except OSError: pass""",
    "read a parent's memory": """
import ctypes, os
libc = ctypes.CDLL(None)
for pid in (os.getppid(), VICTIM, 1):
    if libc.ptrace(16, pid, 0, 0) == 0: print('ESCAPED')
    try: open(f'/proc/{pid}/mem', 'rb'); print('ESCAPED')
    except OSError: pass""",
    "connect to a port of the job": f"""
import socket
socket.create_connection(('127.0.0.1', PORT), 1); print('{OUT}')""",
    "connect to a socket file": f"""
import socket
socket.socket(socket.AF_UNIX).connect('UNIX_SOCKET'); print('{OUT}')""",
    "send a datagram out": f"""
import socket
socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('8.8.8.8', 53)); print('{OUT}')""",
    "endless loop": "while True: pass",
    "endless loop, deaf to signals": """
import signal
for n in range(1, 64):
    try: signal.signal(n, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass""",
    "sleep without end": "import time\nwhile True: time.sleep(1000)",
    "kill the parent": """
import os, signal
for pid in (os.getppid(), VICTIM, PARENT, 1, -1):
    try: os.kill(pid, signal.SIGKILL)
    except OSError: pass""",
    "stop the parent by other calls": """
import fcntl, os, resource, signal, socket
a, b = socket.socketpair()
for pid in (os.getppid(), VICTIM, PARENT):
    for attempt in (
        lambda: (fcntl.fcntl(a, fcntl.F_SETOWN, pid), fcntl.fcntl(a, 10, signal.SIGKILL),
                 fcntl.fcntl(a, fcntl.F_SETFL, os.O_ASYNC), b.send(b'x')),
        lambda: resource.prlimit(pid, resource.RLIMIT_CPU, (1, 1)),
        lambda: os.setpriority(os.PRIO_PROCESS, pid, 19),
        lambda: os.sched_setaffinity(pid, {0}),
    ):
        try: attempt()
        except OSError: pass""",
    "fill the disk with one file": """
with open('big', 'wb') as file:
    while True: file.write(b'x' * (1 << 20))""",
    "fill the disk with many files": """
import itertools
for n in itertools.count():
    try: open(f'{n}', 'wb').write(b'x' * (8 << 20))
    except OSError:
        if n > 1000: break""",
    "flood the output": "while True: print('x' * 10000)",
    "flood standard error": "import os\nwhile True: os.write(2, b'x' * 60000)",
    "daemon: two forks and setsid": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(64):
            try: os.close(fd)
            except OSError: pass
        time.sleep(1000)
    os._exit(0)""",
    "write to Python's folder": f"""
import os
open(os.path.join(os.path.dirname(os.__file__), 'left_behind.py'), 'w'); print('{OUT}')""",
    "write to another folder": f"open('SCRATCH/left', 'w'); print('{OUT}')",
    "list the home folder": f"import os\nif os.listdir('SCRATCH'): print('{OUT}')",
    "a namespace of its own": f"""
import ctypes
if ctypes.CDLL(None).unshare(0x10000000) == 0: print('{OUT}')""",
    "raise its own limits": f"""
import resource
for name in ('RLIMIT_AS', 'RLIMIT_CPU', 'RLIMIT_NPROC', 'RLIMIT_FSIZE'):
    try: resource.setrlimit(getattr(resource, name), (-1, -1)); print('{OUT}')
    except (ValueError, OSError): pass""",
    "become root": f"""
import os
os.setuid(0) if os.getuid() else os.chown('.', 1, 1)  # root without its rights is not root
print('{OUT}')""",
    "crash the interpreter": "import ctypes\nctypes.string_at(0)",
    "deep recursion in C": "exec('[' * 90 + '(' * 90 + ')' * 90 + ']' * 90)\nx = []\n"
    "for _ in range(10**6): x = [x]\nrepr(x)",
}


@dataclass
class Surroundings:
    """What an attack is to reach."""

    folder: Path
    victim: subprocess.Popen
    port: int
    reached: list[str]

    def fill(self, code: str) -> str:
        names = {
            "KEY_FILE": self.folder / "key", "UNIX_SOCKET": self.folder / "socket",
            "SCRATCH": self.folder, "VICTIM": self.victim.pid, "PARENT": os.getpid(),
            "PORT": self.port,
        }  # fmt: skip
        for name, value in names.items():
            code = code.replace(name, str(value))
        return code


@contextmanager
def surroundings() -> Iterator[Surroundings]:
    with tempfile.TemporaryDirectory() as name, socket.socket() as tcp:
        folder = Path(name)
        (folder / "key").write_text(KEY)
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        tcp.setblocking(False)
        unix = socket.socket(socket.AF_UNIX)
        unix.bind(str(folder / "socket"))
        unix.listen()
        unix.setblocking(False)
        victim = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", "import time; time.sleep(10000)"],
            env={"SECRET": KEY},
        )
        around = Surroundings(folder, victim, tcp.getsockname()[1], [])
        try:
            yield around
        finally:
            for server in (tcp, unix):
                try:
                    server.accept()
                    around.reached.append("a socket was connected to")
                except BlockingIOError:
                    pass
            unix.close()
            victim.kill()
            victim.wait()


async def attack(sandbox: Sandbox, name: str, limits: Limits = LIMITS) -> tuple[Result, list[str]]:
    """What became of the code, and in what it succeeded: nothing, if all is well."""
    with surroundings() as around:
        before = {path.name for path in around.folder.iterdir()}
        result = await sandbox.run(around.fill(ATTACKS[name]), limits=limits)
        faults = around.reached
        if OUT in result.stdout:
            faults.append("did what it must not")
        if around.victim.poll() is not None:
            faults.append("another process was killed")
        if psutil.Process(around.victim.pid).nice() or psutil.Process().nice():
            faults.append("another process was slowed down")
        if {path.name for path in around.folder.iterdir()} != before:
            faults.append("a file was left")
        if left := processes(sandbox):
            faults.append(f"processes are left: {left}")
        after = await sandbox.run("print(6 * 7)")
        if after.stdout != "42\n":
            faults.append(f"the next run failed: {after.reason}")
    return result, faults


def processes(sandbox: Sandbox) -> list[int]:
    """Numbers of the processes of runs, which should all have ended."""
    return [
        p.pid for p in psutil.Process(sandbox.launcher_pid).children(recursive=True) if _lives(p)
    ]


def _lives(process: psutil.Process) -> bool:
    try:
        process.wait(2)
        return False
    except psutil.TimeoutExpired:
        return True
    except psutil.NoSuchProcess:
        return False


async def check(way: str | None, runs: int) -> int:
    sandbox = Sandbox(way=way)
    try:
        await sandbox.run("pass")
    except SandboxUnavailable as error:
        print(error)
        return 1
    print(f"code is confined by {sandbox.way}\n")
    print(
        f"| {'attack':32} | {'contained':9} | what became of it\n|{'-' * 34}|{'-' * 11}|{'-' * 40}"
    )
    escaped = 0
    for name in ATTACKS:
        result, faults = await attack(sandbox, name)
        escaped += bool(faults)
        last = result.stderr.strip().rsplit("\n", 1)[-1][-70:]
        told = f"{result.reason}: {last}" if last and not result.ok else result.reason
        print(f"| {name:32} | {'NO' if faults else 'yes':9} | {'; '.join(faults) or told}")
    if runs:
        began = time.monotonic()
        for _ in range(runs):
            await sandbox.run("print(6 * 7)")
        one = (time.monotonic() - began) / runs
        began = time.monotonic()
        await asyncio.gather(*(sandbox.run("print(6 * 7)") for _ in range(runs)))
        print(f"\na run of one line: {1000 * one:.1f} ms alone, ", end="")
        print(f"{runs / (time.monotonic() - began):.0f} runs/s on {os.cpu_count()} cores")
    await sandbox.close()
    return int(escaped > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Attacks on the sandbox, and what a run costs")
    parser.add_argument("--way", choices=("namespaces", "filters"))
    parser.add_argument("--runs", type=int, default=200, help="runs to time; 0: none")
    arguments = parser.parse_args()
    sys.exit(asyncio.run(check(arguments.way, arguments.runs)))
