"""Commands from rank 0 to all ranks, and their answers, through the store: no collective is ever
involved.

A command is a registered name with plain arguments and a sequence number, an answer a plain value;
both are signed with the job's secret, since anybody who reaches the store's port can write there.
The log of commands reads as a script. Must not know what the commands do.
"""

from __future__ import annotations

import io
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from spmd_rl.control.secret import SIGNATURE, Secret
from spmd_rl.control.signals import stop_requested

if TYPE_CHECKING:
    from spmd_rl.control.job import Job

F = TypeVar("F", bound=Callable[..., Any])

LARGE = 1 << 20  # answers above this are dropped from the store at once, smaller ones with the next
EXIT = "exit"

# What may come out of the store besides numbers, strings and containers of them: a second wall
# behind the signature, since unpickling any class can run any code.
_PLAIN = {
    ("builtins", "set"),
    ("builtins", "frozenset"),
    ("builtins", "complex"),
    ("builtins", "bytearray"),
    ("builtins", "range"),
    ("builtins", "slice"),
    ("collections", "OrderedDict"),
    ("collections", "deque"),
    ("datetime", "datetime"),
    ("datetime", "timedelta"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"numpy.{core}.multiarray", "scalar") for core in ("core", "_core")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
}
_PLAIN_MODULES = {"spmd_rl.types"}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN or (module in _PLAIN_MODULES and "." not in name):
            return super().find_class(module, name)
        raise TypeError(
            f"commands and answers carry plain values only, not {module}.{name}: "
            "send tensors through a process group"
        )


def pack(secret: Secret, *values: Any) -> bytes:
    return secret.seal(pickle.dumps(values, protocol=5))


def unpack(secret: Secret, data: bytes) -> tuple:
    """The values; RuntimeError if this job's ranks did not write them."""
    return _Unpickler(io.BytesIO(secret.unseal(data))).load()


def command(method: F) -> F:
    """Marks a method that rank 0 may tell every rank to run."""
    method.is_command = True
    return method


def _await_all(job: Job) -> None:
    """No command before every rank has come and is watched; the watcher limits the wait."""
    if job.watcher is not None:
        job.watcher.met.wait()


def _find(worker: Any, name: str) -> Callable[..., Any]:
    if not getattr(getattr(type(worker), name, None), "is_command", False):
        raise AttributeError(f"{type(worker).__name__} has no method {name!r} marked @command")
    return getattr(worker, name)


def _run(job: Job, worker: Any, name: str, args: Sequence[Any], mine: Mapping[str, Any]) -> Any:
    shown = ", ".join(_short(value) for value in args)
    job.doing = f"{name}({shown})"
    began = time.time()
    try:
        return _find(worker, name)(*args, **mine)
    except BaseException as error:  # whatever it is, the job is over
        job.fail_with(error)
    finally:
        job.doing = "the loop" if job.rank == 0 else "waiting for a command"
        if job.on_command is not None:
            job.on_command(name, began, time.time())


def _short(value: Any, limit: int = 40) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


class Workers:
    """Rank 0's handle on all ranks, itself included: `workers.train(3)` runs `worker.train(3)`
    everywhere.
    """

    def __init__(self, job: Job, worker: Any, timeout: float = 3600.0):
        if job.rank:
            raise ValueError(f"only rank 0 gives commands; rank {job.rank} follows")
        self._job, self._worker, self._timeout = job, worker, timeout
        self._digest = b""
        job.doing = "the loop"

    def __getattr__(self, name: str) -> Callable[..., list[Any]]:
        _find(self._worker, name)  # a wrong name fails here, not on every rank
        return partial(self.call, name)

    def call(
        self,
        name: str,
        *args: Any,
        mine: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> list[Any]:
        """Run a command on all ranks; the answers by rank. `mine`: keyword arguments of rank 0's
        own share only.
        """
        job = self._job
        _find(self._worker, name)
        self._post(name, args)
        seconds = self._timeout if timeout is None else timeout
        if job.watcher is not None:
            end = time.monotonic() + seconds
            job.watcher.expect.command(job.sequence, name, end, seconds)
        answers = [_run(job, self._worker, name, args, mine or {})]
        if job.world > 1:
            answers += self._collect(name)
        if job.watcher is not None:
            job.watcher.expect.command(0, "", 0.0, 0.0)
        return answers

    def _post(self, name: str, args: Sequence[Any]) -> None:
        job = self._job
        if job.world == 1:
            return
        _await_all(job)
        job.sequence += 1
        data = pack(job.secret, job.sequence, name, tuple(args))
        self._digest = data[:SIGNATURE]
        job.commands.set(f"command/{job.sequence}", data)

    def _collect(self, name: str) -> list[Any]:
        job = self._job
        keys = [answer_key(job.sequence, rank) for rank in range(1, job.world)]
        job.waiting = True
        found = job.commands.multi_get(keys)
        job.waiting = False
        answers = []
        for rank, data in enumerate(found, 1):
            sequence, digest, value = unpack(job.secret, data)
            if (sequence, digest) != (job.sequence, self._digest):
                text = (
                    f"rank {rank} answered command {sequence}, not {name}, which is {job.sequence}"
                )
                job.fail_with(RuntimeError(f"the ranks disagree: {text}"), skip=0)
            answers.append(value)
        job.commands.delete_key(f"command/{job.sequence}")
        if sum(map(len, found)) > LARGE:
            for key in keys:
                job.commands.delete_key(key)
        return answers

    def stop_requested(self) -> bool:
        return stop_requested()

    def exit(self) -> None:
        """Let every follower return from `follow`, and leave the job."""
        self._post(EXIT, ())
        self._job.close()


def answer_key(sequence: int, rank: int) -> str:
    return f"answer/{sequence}/{rank}"


def follow(job: Job, worker: Any) -> None:
    """Do what rank 0 says until it says exit. Waiting costs nothing: it is a sleep in a socket."""
    job.doing = "waiting for a command"
    with job.failing():
        _await_all(job)
        while _obey(job, worker):
            pass
    job.close()


def _obey(job: Job, worker: Any) -> bool:
    """Receive one command, run it, answer. False after the last."""
    job.waiting = True
    data = job.commands.get(f"command/{job.sequence + 1}")
    job.waiting = False
    job.sequence += 1
    digest, (sequence, name, args) = data[:SIGNATURE], unpack(job.secret, data)
    if sequence != job.sequence:
        raise RuntimeError(f"the ranks disagree: command {sequence} came as {job.sequence}")
    if name == EXIT:
        return False
    answer = _run(job, worker, name, args, {})
    job.commands.set(
        answer_key(job.sequence, job.rank), pack(job.secret, job.sequence, digest, answer)
    )
    # off the critical path: rank 0 has the previous answer since it posted this command
    job.commands.delete_key(answer_key(job.sequence - 1, job.rank))
    return True
