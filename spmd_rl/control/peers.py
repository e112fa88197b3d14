"""The job's processes on this machine, watched by each other, and the heartbeats of all ranks.

Comes in: what each rank published of itself, and heartbeats. Goes out: who died, who is frozen,
who is silent. A heartbeat is written by a thread, so it stops while the main thread holds the
interpreter in a long C call. Such a rank is not dead: as long as its machine is heard of it gets
ten times the patience. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from spmd_rl.control.children import process_state

STALL_FACTOR = 10  # patience with a silent rank on a machine that is alive, in heartbeat timeouts


def describe_self() -> dict:
    """What a rank publishes so that its neighbours can watch, and if need be kill, exactly this
    process.
    """
    pid = os.getpid()
    state = process_state(pid)
    return {
        "host": socket.gethostname(),
        "machine": Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        + os.readlink("/proc/self/ns/pid"),
        "pid": pid,
        "started": state[1] if state else 0,
        "error_file": os.environ.get("TORCHELASTIC_ERROR_FILE", ""),
    }


@dataclass
class Neighbour:
    """Another rank on this machine."""

    rank: int
    pid: int
    started: int
    error_file: str
    pidfd: int
    stopped_for: float = 0.0  # seconds seen in state T without a break
    longest: float = (
        0.0  # the same before a neighbour killed it; a process that runs again has none
    )
    gone: bool = False
    status: int = 0  # wait status, if it was seen

    def look(self, seconds: float) -> None:
        """Take in its state; `seconds` have passed since the last look."""
        state = process_state(self.pid)
        if state is None or state[1] != self.started:
            self.gone = True
        elif state[0] in "ZX":
            self.gone, self.status = True, state[2]
        elif state[0] == "T":
            self.stopped_for += seconds
            self.longest = self.stopped_for
        else:  # SIGKILL makes a stopped process run for a moment
            self.longest, self.stopped_for = self.stopped_for, 0.0

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def how_it_stopped(self) -> str:
        return f"{self} is frozen (SIGSTOP): no heartbeat for {self.longest:.0f} s"

    def how_it_ended(self) -> str:
        number = self.status & 0x7F
        if number == signal.SIGKILL:
            return f"{self} was killed by SIGKILL (often the kernel, out of memory)"
        if number:
            return f"{self} was killed by {signal.Signals(number).name}"
        if self.status >> 8:
            return f"{self} exited with status {self.status >> 8} without a word"
        return f"{self} is gone without a word (killed from outside, or it exited early)"

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid})"


def open_neighbours(rank: int, infos: list[dict]) -> list[Neighbour]:
    """The other ranks on this rank's machine that still run."""
    found = []
    for other, info in enumerate(infos):
        if other == rank or info["machine"] != infos[rank]["machine"]:
            continue
        try:
            pidfd = os.pidfd_open(info["pid"])
        except OSError:
            pidfd = -1  # gone already, or no such call here: `look` will tell
        found.append(Neighbour(other, info["pid"], info["started"], info["error_file"], pidfd))
    return found


@dataclass
class Heartbeats:
    """How long each rank has been silent, counted in this process's own waking time."""

    machines: list[str]  # by rank
    timeout: float
    here: str  # this process's machine
    last: dict[int, bytes] = field(default_factory=dict)
    silence: dict[int, float] = field(default_factory=dict)

    def update(self, beats: dict[int, bytes], seconds: float) -> None:
        for rank, beat in beats.items():
            same = self.last.get(rank) == beat
            self.silence[rank] = self.silence.get(rank, 0.0) + seconds if same else 0.0
            self.last[rank] = beat

    def lost(self, ranks: Iterable[int]) -> list[tuple[int, str]]:
        """Ranks given up, with the reason."""
        found = []
        for rank in ranks:
            silent = self.silence.get(rank, 0.0)
            if silent <= self.timeout:
                continue
            if self._machine_silence(self.machines[rank]) > self.timeout:
                found.append((rank, f"rank {rank}: no heartbeat for {silent:.0f} s"))
            elif silent > STALL_FACTOR * self.timeout:
                why = "its main thread holds the interpreter in C, or is deadlocked there"
                found.append((rank, f"rank {rank} lives but has been silent {silent:.0f} s: {why}"))
        return found

    def _machine_silence(self, machine: str) -> float:
        if machine == self.here:
            return 0.0
        return min(s for r, s in self.silence.items() if self.machines[r] == machine)

    def quiet(self, seconds: float) -> list[int]:
        return [rank for rank, silent in sorted(self.silence.items()) if silent > seconds]
