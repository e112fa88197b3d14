"""How a failed job ends: one rank prints the cause, nothing is left running, the exit status is
not 0.

Comes in: the reports. Nothing goes out: the process ends. Runs in the watcher thread while the
main thread is stuck.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from spmd_rl.control import children, logs
from spmd_rl.control.peers import Neighbour
from spmd_rl.control.report import Report, block, first_cause, launcher_error

if TYPE_CHECKING:
    from spmd_rl.control.job import Job

INTERVAL = 0.5  # seconds between heartbeats
SPEAKER_PATIENCE = 1.5  # seconds the others give rank 0 to print
CHILD_GRACE = 1.0  # seconds between SIGTERM and SIGKILL for children
HARD_LIMIT = 6.0  # seconds for all of it
NEIGHBOUR_PATIENCE = 2.5  # seconds for other ranks on the machine to go by themselves


class Ending:
    """Ends the process, once."""

    def __init__(self, job: Job):
        self.job = job
        self.neighbours: list[Neighbour] = []
        self.started = False
        self._lock = threading.Lock()

    def end(self, reports: Sequence[Report], note: str, store: Any | None) -> NoReturn:
        """`store`: to agree on who speaks; None if it is gone."""
        with self._lock:
            again, self.started = self.started, True
        while again:
            time.sleep(1)
        cause = first_cause(reports)
        timer = threading.Timer(HARD_LIMIT, os._exit, (cause.status,))
        timer.daemon = True
        timer.start()
        logs.hush()
        dead = {report.dead for report in reports if report.dead >= 0}
        with contextlib.suppress(Exception):
            self._tell_launcher(cause, dead)
        stopper = threading.Thread(target=children.stop_all, args=(None, CHILD_GRACE), daemon=True)
        stopper.start()
        with contextlib.suppress(
            Exception
        ):  # the store can go away now, and rank 0 has spoken then
            if self._speaks(dead, store):
                logs.last_words(block(reports, note))
                if store is not None:
                    store.set("said", "")
        stopper.join(CHILD_GRACE + 1)
        with contextlib.suppress(Exception):
            self._await_others(dead, store)
        self._sweep(dead)
        logs.flush()
        os._exit(cause.status or 1)

    def _await_others(self, dead: set[int], store: Any | None) -> None:
        """The rank that serves the store goes after all that still want to read it."""
        if store is None:
            return
        store.set(f"ended/{self.job.rank}", "")
        others = [f"ended/{r}" for r in range(self.job.world) if r not in dead]
        end = time.monotonic() + SPEAKER_PATIENCE
        while self.job.hosts_store and time.monotonic() < end and not store.check(others):
            time.sleep(0.03)

    def _tell_launcher(self, cause: Report, dead: set[int]) -> None:
        """torchrun prints a summary after us, from these files: ours, and those of ranks that
        cannot write theirs.
        """
        files = {self.job.rank: os.environ.get("TORCHELASTIC_ERROR_FILE", "")}
        files |= {other.rank: other.error_file for other in self.neighbours if other.rank in dead}
        for rank, name in files.items():
            if name:
                aside = Path(f"{name}.{os.getpid()}")
                aside.write_text(launcher_error(cause, rank))
                aside.rename(name)

    def _speaks(self, dead: set[int], store: Any | None) -> bool:
        """Whether this rank is the one that prints: rank 0, else the first of the others to claim
        it.
        """
        rank = self.job.rank
        if store is None:  # no way to agree: the lowest that lives on this machine
            lower = [other for other in self.neighbours if other.rank < rank]
            return all(other.gone or other.rank in dead for other in lower)
        if rank:
            alive = sum(1 for r in range(rank) if r not in dead)
            patience = SPEAKER_PATIENCE if 0 not in dead else 0.0
            end = time.monotonic() + patience + min(0.05 * alive, 1.0)
            while time.monotonic() < end:
                if store.check(["said"]):
                    return False
                time.sleep(0.03)
        return store.add("speaks", 1) == 1

    def _sweep(self, dead: set[int]) -> None:
        """The lowest rank on the machine that can goes last: it kills what did not go by itself."""
        for other in self.neighbours:
            other.look(0.0)
        lower = [other for other in self.neighbours if other.rank < self.job.rank]
        if any(not (other.gone or other.rank in dead) for other in lower):
            return
        end = time.monotonic() + NEIGHBOUR_PATIENCE
        while time.monotonic() < end and not all(
            other.gone or other.stopped_for or other.rank in dead for other in self.neighbours
        ):
            time.sleep(0.03)
            for other in self.neighbours:
                other.look(0.0)
        for other in self.neighbours:
            if not other.gone:
                other.kill()
        children.kill_marked(f"{self.job.token}.")
        # torch names memory it shares by the process that made it; its own cleaner was killed here.
        pids = [os.getpid(), *(other.pid for other in self.neighbours)]
        for pattern in (f"spmd_rl-{self.job.token}*", *(f"torch_{pid}_*" for pid in pids)):
            for file in Path("/dev/shm").glob(pattern):
                file.unlink(missing_ok=True)


def dump_stacks(job: Job) -> None:
    """What every thread of this rank is doing, to <run_dir>/logs/stacks.rankN, or to stderr
    without a run_dir.
    """
    if job.run_dir is None:
        faulthandler.dump_traceback(file=2, all_threads=True)
        return
    folder = job.run_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"stacks.rank{job.rank}", "w") as file:
        file.write(f"rank {job.rank}, in {job.doing}\n")
        file.flush()
        faulthandler.dump_traceback(file=file, all_threads=True)
