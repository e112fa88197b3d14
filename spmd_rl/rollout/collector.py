"""Rank 0's handle of the collector process.

Comes in: rollout numbers; goes out: batches and metrics. Failures in there, user code included,
are raised here with their traceback; its death within a second, with the end of its log. Must not
import torch or the HTTP stack.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import spmd_rl
from spmd_rl.config.schema import Config
from spmd_rl.control.children import Child, spawn
from spmd_rl.rollout.pipe import BlockingPipe, Closed
from spmd_rl.types import Batch

LOG_LINES = 20  # of the process's log, told when it died
CLOSE_SECONDS = 5.0


Until = Callable[[], bool] | None


class CollectorError(RuntimeError):
    """Something in the collector process failed; the text is its traceback."""


class EnginesUnreachable(CollectorError):
    """The collector got no answer from an engine: most likely it is dead, and who started it will
    say how it ended.
    """

    is_symptom = True


class Rollout(NamedTuple):
    """One rollout, ready to train on."""

    batch: Batch
    metrics: dict[str, float]
    state: dict[str, Any]  # where the data stands after it, for checkpoints


FAILURES = {"user": ValueError, "engine": EnginesUnreachable, "code": CollectorError}


class Collector:
    """Starts the process at once; prompts load there while engines come up."""

    def __init__(self, cfg: Config, run_dir: Path | str, engines: Any = None):
        self.log = Path(run_dir) / "logs" / "collector.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.notes: list[str] = []  # what the user should know about the data
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        self._answers: dict[int, Any] = {}
        self._sent = 0
        self._state: dict[str, Any] = {}
        self._num_prompts: int | None = None
        self._until: Until = None  # when what is being waited for is to be abandoned
        # called a few times a second while an answer is awaited
        self.while_waiting: Callable[[], None] = lambda: None
        self._evaluation = 0  # the request
        self._sending = False
        self._reported: list[tuple[int, int, str]] = []
        ours, theirs = socket.socketpair()
        with theirs:
            self._child = _spawn(self.log, theirs)
        self._pipe = BlockingPipe(ours, self._check_alive)
        self._setup: int | None = self._send("setup", cfg.model_dump())
        if engines is not None:
            self.connect(engines)

    @property
    def pid(self) -> int:
        return self._child.process.pid

    @property
    def num_prompts(self) -> int:
        """Prompts of the data set; waits until they are loaded."""
        if self._num_prompts is None:
            self._num_prompts = int(self._call("num_prompts"))
        return self._num_prompts

    def connect(self, addresses: Any) -> None:
        """Tell the process where the engines are (fleet.EngineAddresses). Returns at once; says or
        raises what loading the data came to, if that is known by now."""
        self._send("connect", addresses)
        while self._pipe.ready():
            self._receive()

    def collect(self, rollout: int, version: int, until: Until = None) -> Rollout | None:
        """Generate one rollout, with engines that hold the weights of `version`.

        Once `until()` is true it is abandoned: None. Load a state before collecting again.
        """
        answer = self._call("collect", rollout, version, until=until)
        if answer is None:
            return None
        result = Rollout(*answer)
        self._state = result.state
        return result

    def begin_evaluation(self, rollout: int) -> None:
        """Evaluate with the weights that the engines hold. Returns at once."""
        self._evaluation = self._send("evaluate", rollout)

    def finish_evaluation(self, until: Until = None) -> dict[str, float] | None:
        """Metrics of the evaluation begun last; None when `until()` came true before its end."""
        self._until = until
        try:
            return self._wait(self._evaluation)
        finally:
            self._until = None

    def state(self) -> dict[str, Any]:
        """Where the data stands after the last rollout."""
        return self._state

    def broke(self, indices: list[int]) -> None:
        """These engines are being started again: others get their requests."""
        self._send("broke", indices)

    def mended(self, index: int, starts: int) -> None:
        """The engine generates again; it was started again `starts` times."""
        self._send("mended", index, starts)

    def reported(self) -> list[tuple[int, int, str]]:
        """Engines found broken since the last call: index, how often it was started again, why."""
        found, self._reported = self._reported, []
        return found

    def load_state(self, state: dict[str, Any]) -> None:
        self._call("load_state", state)
        self._state = state

    def close(self) -> None:
        """End the process; it is gone when this returns."""
        try:
            if self._child.poll() is None:
                self._send("close")
                self._child.process.wait(CLOSE_SECONDS)
        except Exception:  # it is killed anyway
            pass
        finally:
            self._child.stop()
            self._pipe.close()

    def _call(self, name: str, *args: Any, until: Until = None) -> Any:
        if until is not None and until():
            return None
        number, self._until = self._send(name, *args), until
        try:
            return self._wait(number)
        finally:
            self._until = None

    def _send(self, name: str, *args: Any) -> int:
        self._sent += 1
        number, self._sending = self._sent, True
        try:
            self._pipe.send((number, name, args))
        except Closed:
            self._died()
        finally:
            self._sending = False
        return number

    def _wait(self, number: int) -> Any:
        """The answer to a request; a failure of any earlier one comes first."""
        while number not in self._answers:
            self._receive()
        return self._answers.pop(number)

    def _receive(self) -> None:
        """Take in one answer."""
        try:
            answered, value, failure = self._pipe.receive()
        except Closed:
            self._died()
        if failure is not None:
            raise FAILURES[failure.kind](failure.text)
        if answered == self._setup:
            self.notes = value
            for note in value:
                print(f"data: {note}", flush=True)
        if answered:
            self._answers[answered] = value
        else:
            self._reported.append(value)

    def _check_alive(self) -> None:
        """While an answer is awaited, a few times a second."""
        if self._child.poll() is not None and not self._pipe.ready():
            self._died()
        if self._sending:  # what follows may send, and a message must not stand within another
            return
        if self._until is not None and self._until():
            self._until = None
            self._send("abandon")
        self.while_waiting()

    def _died(self) -> NoReturn:
        status = self._child.process.wait(CLOSE_SECONDS)
        raise CollectorError(
            f"the end of {self.log}:\n{self._tail()}\nthe collector process {describe(status)}"
        )

    def _tail(self) -> str:
        with self.log.open("rb") as file:
            file.seek(max(self._log_start, self.log.stat().st_size - 16_384))
            lines = file.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-LOG_LINES:]) or "(it said nothing)"


def describe(status: int) -> str:
    """How a process ended, in words."""
    if status >= 0:
        return f"ended with exit status {status}"
    if -status == signal.SIGKILL:
        return "was killed by SIGKILL (out of memory?)"
    return f"was killed by {signal.Signals(-status).name}"


def _spawn(log: Path, theirs: socket.socket) -> Child:
    package = str(Path(spmd_rl.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    env = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    argv = [sys.executable, "-m", "spmd_rl.rollout.process"]
    return spawn(argv, env=env | {"TOKENIZERS_PARALLELISM": "false"}, log=log, stdin=theirs)
