"""The watcher thread of a rank: tells the others that it lives, and ends this process when
anything has failed.

Rules. The first cause is reported, not the first symptom. Rank 0 prints it, or the lowest rank
that still can. Nobody is left behind: a frozen rank is killed by its neighbours, children and what
they started are killed before we go. It runs beside a main thread that may sit in C++ for good,
hence `os._exit`. It uses a store connection of its own.
"""

from __future__ import annotations

import json
import os
import select
import signal
import threading
import time
from typing import TYPE_CHECKING

from spmd_rl.control import signals
from spmd_rl.control.children import process_state
from spmd_rl.control.ending import INTERVAL, Ending, dump_stacks
from spmd_rl.control.expect import Expectations
from spmd_rl.control.peers import Heartbeats, Neighbour, describe_self, open_neighbours
from spmd_rl.control.report import INTERRUPTED, Report, describe, first_cause, is_symptom

if TYPE_CHECKING:
    from spmd_rl.control.job import Job

SYMPTOM_PATIENCE = 2.0  # seconds to wait for the cause of a lost connection
JOIN_PATIENCE = 600.0  # seconds for all ranks to appear
DONE = "done"


def _launcher_stopped() -> bool:
    """Ctrl-Z on torchrun freezes the store it serves; `fg` goes on, so it is no failure."""
    state = process_state(os.getppid())
    return state is not None and state[0] == "T"


class Watcher:
    """One per process; `start` it once, `close` it when the job is over."""

    def __init__(self, job: Job, heartbeat_timeout: float):
        self.job, self.timeout = job, heartbeat_timeout
        self.pipe = signals.SignalPipe()
        self.store = job.connect()
        self.ending = Ending(job)
        self.neighbours: list[Neighbour] = []
        self.beats: Heartbeats | None = None
        self._reports: list[Report] = []
        self._outbox: list[Report] = []
        self._first_seen = 0.0  # when a symptom was first seen
        self.expect = Expectations(job)
        self._dumped = False
        self._count = 0  # heartbeats written: progress, for the guard
        self.met = threading.Event()  # all ranks have joined and neighbours watch each other
        self._closing = threading.Event()
        self._closed = threading.Event()
        self._last_tick = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)
        self._guard = threading.Thread(target=self._guard_store, name="guard", daemon=True)

    def start(self) -> None:
        self.pipe.install()
        info = json.dumps(describe_self())
        if self.job.rank == 0:
            for key in ("stop", "dump"):
                self.store.set(key, "")
            self.store.add("failures", 0)
        self.store.set(f"beat/{self.job.rank}", '[0, 0, false, "start"]')
        self.store.set(f"info/{self.job.rank}", info)
        self._started = time.monotonic()
        self._thread.start()
        self._guard.start()

    # ------------------------------------------------------------------ called by the main thread

    def report(self, text: str, symptom: bool = False, status: int = 1, dead: int = -1) -> None:
        """Post a failure; the thread does it, at once."""
        self._outbox.append(self._make(text, symptom, status, dead))
        self.pipe.wake()

    @property
    def over(self) -> bool:
        return self._closed.is_set()

    def close(self) -> None:
        """Say goodbye, so that our end is no failure. Who hosts the store waits until all have
        said so.
        """
        self._closing.set()
        self.pipe.wake()
        self._closed.wait(30)
        if self.job.hosts_store:
            end = time.monotonic() + 30
            while time.monotonic() < end and not self._all_done():
                time.sleep(0.02)

    def _all_done(self) -> bool:
        keys = [f"{DONE}/{rank}" for rank in range(self.job.world)]
        return self.store.check(keys)

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                self._tick()
                self._sleep()
            self.store.set(f"{DONE}/{self.job.rank}", "")
            self._closed.set()
        except Exception as error:  # the store is gone, and with it whoever served it
            short = f"{type(error).__name__}: {error}".splitlines()[0]
            self._store_lost(short if is_symptom(error) else describe(error, 0))

    def _tick(self) -> None:
        job, store, now = self.job, self.store, time.monotonic()
        seconds = min(now - self._last_tick, 2 * INTERVAL)  # a pause of ours is nobody's silence
        self._last_tick = now
        self._signals()
        while self._outbox:
            self._post(self._outbox.pop(0))
        self._count += 1
        beat = [self._count, job.sequence, job.waiting, job.doing]
        store.set(f"beat/{job.rank}", json.dumps(beat))
        if not self.met.is_set() and not self._meet():
            return self._read_failures(store.add("failures", 0))
        assert self.beats is not None
        watched = self._watched()
        keys = ["failures", "stop", "dump", *(f"beat/{rank}" for rank in watched)]
        failures, stop, dump, *beats = store.multi_get(keys)
        if stop:
            signals.set_stop()
        self.beats.update(dict(zip(watched, beats, strict=True)), seconds)
        self._look_around(seconds)
        if dump and not self._dumped:
            self._dumped = True
            dump_stacks(job)
            store.set(f"dumped/{job.rank}", "")
        if job.rank == 0:
            for text in (
                self.expect.overdue(store, now),
                self.expect.out_of_order(self.beats.last),
            ):
                if text:
                    self._post(self._make(text))
        self._read_failures(int(failures))

    def _meet(self) -> bool:
        """Learn who the others are, once all have come."""
        keys = [f"info/{rank}" for rank in range(self.job.world)]
        if not self.store.check(keys):
            if time.monotonic() - self._started > JOIN_PATIENCE:
                late = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
                self._post(self._make(f"ranks {late} never joined the job"))
            return False
        infos = [json.loads(info) for info in self.store.multi_get(keys)]
        self.neighbours = open_neighbours(self.job.rank, infos)
        self.ending.neighbours = self.neighbours
        self.hosts = [info["host"] for info in infos]
        self.beats = Heartbeats(
            [info["machine"] for info in infos], self.timeout, infos[self.job.rank]["machine"]
        )
        self.met.set()
        return True

    def _watched(self) -> list[int]:
        """Rank 0 watches everybody; everybody watches rank 0, and its machine to know whether that
        is alive.
        """
        assert self.beats is not None
        machines = self.beats.machines
        if self.job.rank == 0:
            return [rank for rank in range(self.job.world) if rank]
        return [
            r for r in range(self.job.world) if machines[r] == machines[0] and r != self.job.rank
        ]

    def _look_around(self, seconds: float) -> None:
        assert self.beats is not None
        for other in self.neighbours:
            was_gone = other.gone
            other.look(seconds)
            if other.gone and not was_gone and not self.store.check([f"{DONE}/{other.rank}"]):
                self._lost(other.rank, other.how_it_ended())
            elif other.stopped_for >= self.timeout:
                self._lost(other.rank, other.how_it_stopped())
        for rank, reason in self.beats.lost([0] if self.job.rank else self._watched()):
            if not self.store.check([f"{DONE}/{rank}"]):
                self._lost(rank, f"{reason}, on {self.hosts[rank]}")

    def _lost(self, rank: int, text: str) -> None:
        """Report a rank that cannot speak for itself; only the first to notice does."""
        if self.store.add(f"lost/{rank}", 1) == 1:
            self._post(self._make(text, dead=rank))

    def _signals(self) -> None:
        for number in self.pipe.read():
            name = signal.Signals(number).name
            if number in signals.END or self.pipe.repeated(number):
                self._post(self._make(f"interrupted ({name})", status=INTERRUPTED))
            elif number in signals.STOP:
                if not self.met.is_set() and number == signal.SIGTERM:
                    # nobody reads the flag yet; torchrun sends this when another rank failed to
                    # start
                    self._post(
                        self._make("ended by SIGTERM before all ranks had joined", symptom=True)
                    )
                self.store.set("stop", f"{name} on rank {self.job.rank}")
                signals.set_stop()

    def _make(self, text: str, symptom: bool = False, status: int = 1, dead: int = -1) -> Report:
        host = self.hosts[self.job.rank if dead < 0 else dead] if self.beats else ""
        doing = self.job.doing
        if dead >= 0 and self.beats is not None and dead in self.beats.last and "(" not in doing:
            doing = json.loads(self.beats.last[dead])[3]  # we are in no command ourselves
        return Report(self.job.rank, doing, text, symptom, dead, host, time.time(), status)

    def _post(self, report: Report) -> None:
        number = self.store.add("failures", 1)
        self.store.set(f"failure/{number}", report.encode())
        self._read_failures(number)

    def _read_failures(self, count: int) -> None:
        """End, once a cause is known or symptoms have waited long enough for one."""
        if not count:
            return
        if count > len(self._reports):
            keys = [f"failure/{n}" for n in range(len(self._reports) + 1, count + 1)]
            self._reports += [Report.decode(data) for data in self.store.multi_get(keys)]
        self._first_seen = self._first_seen or time.monotonic()
        waited = time.monotonic() - self._first_seen
        if not first_cause(self._reports).symptom or waited > SYMPTOM_PATIENCE:
            quiet = self.beats.quiet(2.5) if self.beats else []
            note = f"silent ranks: {', '.join(map(str, quiet))}" if quiet else ""
            self.ending.end(self._reports, note, self.store)

    def _sleep(self) -> None:
        """Until the next heartbeat, a signal, a report of ours, or the death of a neighbour."""
        poll = select.poll()
        poll.register(self.pipe.fd, select.POLLIN)
        for other in self.neighbours:
            if not other.gone and other.pidfd >= 0:
                poll.register(other.pidfd, select.POLLIN)
        poll.poll(1000 * (INTERVAL if self.beats else INTERVAL / 10))

    # ------------------------------------------------------------------ when the store is no help

    def _guard_store(self) -> None:
        """Frozen hosts answer nothing: if the watcher makes no progress while this thread runs,
        the store is lost.
        """
        stuck, count = 0.0, -1
        while not self._closed.wait(INTERVAL):
            moved = self._count != count or _launcher_stopped()
            stuck, count = (0.0 if moved else stuck + INTERVAL), self._count
            for other in self.neighbours if stuck else ():
                other.look(INTERVAL)
            if stuck >= self.timeout and not self.ending.started:
                self._store_lost(f"the job's store has not answered for {stuck:.0f} s")

    def _store_lost(self, what: str) -> None:
        if self._closing.is_set() and not self.ending.started and not self._reports:
            return self._closed.set()  # we were leaving anyway
        end = time.monotonic() + 0.5
        while time.monotonic() < end and not any(o.gone or o.longest for o in self.neighbours):
            time.sleep(0.05)
            for other in self.neighbours:
                other.look(0.05)
        reports = [*self._reports, *self._outbox]
        for other in self.neighbours:
            if other.longest:
                reports.append(self._make(other.how_it_stopped(), dead=other.rank))
            elif other.gone and not other.status >> 8:  # an exit status: it ended as we do now
                reports.append(self._make(other.how_it_ended(), dead=other.rank))
        if not any(not report.symptom for report in reports):
            gone = "rank 0, its machine or the launcher is gone"
            reports.append(self._make(f"{what} ({gone})", symptom=True))
        self.ending.end(reports, "", None)
