"""A run of the program, seen from outside: started, looked at, its processes told apart.

For the tools that watch or disturb runs (chaos.py, soak.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("trainer rank", "controller", "engine", "router", "collector", "torchrun agent")
MARK = "SPMD_RL_WATCHED"  # in the environment of everything a run starts


class Run:
    """One run in a folder of its own."""

    process: subprocess.Popen

    def __init__(self, folder: Path, words: list[str], ranks: int = 2, max_restarts: int = 0):
        """`words`: the arguments of launch/main.py; the run's folder is `folder`/run."""
        self.folder, self.words = folder, words
        self.launch = ["--nproc-per-node", str(ranks), "--max-restarts", str(max_restarts)]
        self.run_dir = folder / "run"
        self.mark = f"{os.getpid()}.{folder.name}"
        self.turns = 0

    def start(self) -> None:
        self.turns += 1
        argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", *self.launch]
        argv += ["launch/main.py", *self.words, f"run_dir={self.folder}", "name=run"]
        env = os.environ | {MARK: self.mark, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                argv, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True
            )

    def status(self) -> dict[str, Any]:
        """Where the loop is: rollout, phase, process, since when."""
        try:
            return json.loads((self.run_dir / "status.json").read_text())
        except (OSError, ValueError):
            return {"phase": "start", "pid": 0, "at": 0.0, "rollout": None}

    def processes(self) -> dict[str, list[int]]:
        """What can be killed, by kind."""
        found: dict[str, list[int]] = {kind: [] for kind in KINDS}
        for process in self._marked():
            with contextlib.suppress(psutil.Error, OSError):
                words, env = process.cmdline(), process.environ()
                kind = self._kind(process, words, env)
                if kind:
                    found[kind].append(process.pid)
        return found

    def _kind(self, process: psutil.Process, words: list[str], env: dict[str, str]) -> str | None:
        line = " ".join(words)
        if process.pid == self.process.pid:
            return "torchrun agent"
        if "spmd_rl.rollout.process" in line:
            return "collector"
        if "spmd_rl.rollout.router" in line:
            return "router"
        if "sglang" in line or "fork_server" in line:
            return "engine"
        if "launch/main.py" in line and process.ppid() == self.process.pid:
            return "trainer rank" if env.get("RANK") != "0" else "controller"
        return None

    def _marked(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self.mark:
                    yield process

    def left(self, wait: float = 3.0) -> list[str]:
        """Command lines of what still runs `wait` seconds after the end."""
        end = time.monotonic() + wait
        while True:
            alive = []
            for process in self._marked():
                with contextlib.suppress(psutil.Error):
                    if process.status() != psutil.STATUS_ZOMBIE:
                        alive.append(" ".join(process.cmdline())[:80])
            if not alive or time.monotonic() > end:
                return alive
            time.sleep(0.1)

    def kill(self, victim: str, rng: random.Random) -> bool:
        """SIGKILL to one process of that kind; whether there was one."""
        pids = sorted(self.processes()[victim])
        if pids:
            os.kill(rng.choice(pids), signal.SIGKILL)
        return bool(pids)

    def kill_all(self) -> None:
        for process in self._marked():
            with contextlib.suppress(psutil.Error):
                process.kill()
