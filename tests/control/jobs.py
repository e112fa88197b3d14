"""What the ranks of the tests in this folder run: small workers that answer, fail, die or freeze
on command.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from spmd_rl import control


class Worker:
    def __init__(self, job: control.Job):
        self.job = job

    @control.command
    def join_group(self) -> int:
        """gloo over all ranks with a timeout that no test waits for."""
        self.job.train_group(range(self.job.world), timeout=1800.0)
        return self.job.rank

    @control.command
    def echo(self, value: object, factor: int = 1) -> tuple:
        return self.job.rank, value, factor

    @control.command
    def big(self, size: int) -> bytes:
        return bytes([self.job.rank]) * size

    @control.command
    def barrier_but(self, culprit: int, what: str) -> None:
        """Everybody sits in a collective; one rank does something bad."""
        if self.job.rank == culprit:
            print("NOW", time.time(), flush=True)
            getattr(self, f"_{what}")()
        import torch.distributed as dist

        dist.barrier()

    def _raise(self) -> None:
        raise ValueError("bad batch")

    def _kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def _stop(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def _exit(self) -> None:
        os._exit(7)

    def _hang(self) -> None:
        import threading

        threading.Event().wait()

    @control.command
    def spawn_sleeper(self, grandchild: bool = False) -> int:
        code = "import time; print('up', flush=True); time.sleep(600)"
        if grandchild:  # in a session of its own, without a death signal: only the mark finds it
            code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {code!r}],"
            code += " start_new_session=True).wait()"
        return control.spawn([sys.executable, "-c", code]).pid

    @control.command
    def hang_on(self, culprit: int) -> None:
        if self.job.rank == culprit:
            self._hang()

    @control.command
    def out_of_order(self, culprit: int) -> None:
        if self.job.rank == culprit:
            self.job.sequence += 1

    @control.command
    def tensor(self) -> object:
        import torch

        return torch.ones(2)


def start(timeout: float = 2.0) -> tuple[control.Job, Worker]:
    job = control.join()
    run_dir = os.environ.get("RUN_DIR")
    if run_dir and "LOG" in os.environ:
        control.log_to(run_dir, job)
    job.start_watching(timeout, run_dir)
    return job, Worker(job)


def commands() -> None:
    """Answers come by rank, values survive, big answers pass, nothing is left in the store."""
    job, worker = start()
    if job.rank:
        control.follow(job, worker)
    else:
        with job.failing():
            workers = control.Workers(job, worker)
            value = {"a": [1, 2.5, None], "b": (True, "x")}
            for number in range(20):
                assert workers.echo(number, 3) == [(r, number, 3) for r in range(job.world)]
            assert workers.echo(value)[-1] == (job.world - 1, value, 1)
            assert [len(answer) for answer in workers.big(5_000_000)] == [5_000_000] * job.world
            assert workers.call("echo", 1, mine={"factor": 5})[0] == (0, 1, 5)
            keys = [key for key in job.store.list_keys() if "answer" in key or "command" in key]
            print("KEYS", len(keys), flush=True)
            workers.exit()
    job.leave()


def misuse() -> None:
    job, worker = start()
    if job.rank:
        control.follow(job, worker)
    else:
        workers = control.Workers(job, worker)
        try:
            workers.start_over()
        except AttributeError as error:
            print("SAID", error, flush=True)
        with job.failing():
            workers.tensor()


def fail(culprit: str, what: str) -> None:
    """`culprit` does `what` while all others sit in a gloo barrier."""
    job, worker = start()
    if job.rank:
        control.follow(job, worker)
    with job.failing():
        workers = control.Workers(job, worker)
        workers.spawn_sleeper()
        workers.spawn_sleeper(True)
        workers.join_group()
        print("READY", flush=True)
        workers.barrier_but(int(culprit), what)


def loop_error() -> None:
    job, worker = start()
    if job.rank:
        control.follow(job, worker)
    with job.failing():
        workers = control.Workers(job, worker)
        workers.spawn_sleeper()
        print("NOW", time.time(), flush=True)
        raise KeyError("no such prompt")


def deadline() -> None:
    job, worker = start()
    if job.rank:
        control.follow(job, worker)
    with job.failing():
        workers = control.Workers(job, worker)
        workers.echo(1)
        print("NOW", time.time(), flush=True)
        workers.call("hang_on", 1, timeout=1.0)


def disagree() -> None:
    job, worker = start()
    if job.rank:
        control.follow(job, worker)
    with job.failing():
        workers = control.Workers(job, worker)
        print("NOW", time.time(), flush=True)
        workers.out_of_order(2)
        workers.echo(1)


def idle() -> None:
    """A job that does nothing until it is asked to stop, or interrupted."""
    job, worker = start()
    if job.rank:
        control.follow(job, worker)
    else:
        with job.failing():
            workers = control.Workers(job, worker)
            workers.spawn_sleeper()
            workers.join_group()
            print("READY", flush=True)
            while not workers.stop_requested():
                time.sleep(0.05)
            print("STOPPED", workers.echo(1), flush=True)
            workers.exit()
    job.leave()


def noisy() -> None:
    """Output of Python, of C and of a command, then a failure; with logs."""
    job, worker = start()
    print(f"python says {job.rank}")
    os.system(f"echo a child says {job.rank}")
    if job.rank:
        control.follow(job, worker)
    with job.failing():
        workers = control.Workers(job, worker)
        workers.echo(1)
        print("x" * 200_000)
        raise RuntimeError("the end")
