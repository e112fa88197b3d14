"""Worker processes for verifying answers, with a hard time limit for each.

Comes in: pairs of answers; goes out: booleans. The limit is processor time, kept by the worker
(worker.py); one that dies, is given up, or sleeps beyond all reason is killed and replaced, so no
answer can stall or crash a run. Workers start when first needed.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections import OrderedDict

START_TIMEOUT = 60.0  # seconds to import sympy on a busy machine
WALL = 20  # times the limit: a question that takes as long is stuck, however busy the machine
REMEMBERED = 10_000  # pairs; the samples of a group often answer alike


class Worker:
    """One process and the socket to it. asyncio's own subprocesses can hang when their start is
    cancelled (seen with CPython 3.11), hence plain ones."""

    def __init__(self, timeout: float):
        self._sock, theirs = socket.socketpair()
        self._sock.setblocking(False)
        argv = [sys.executable, "-m", "spmd_rl.rewards.worker", str(timeout)]
        with theirs:
            self.process = subprocess.Popen(argv, stdin=theirs.fileno(), stdout=theirs.fileno())
        self.ready = False

    async def ask(self, pair: tuple[str, str]) -> bytes:
        """Its word for the answer; EOFError when the process is gone."""
        line = json.dumps(pair).encode() + b"\n"
        try:
            await asyncio.get_running_loop().sock_sendall(self._sock, line)
        except OSError as error:
            raise EOFError from error
        return await self.line()

    async def line(self) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            try:
                received = await asyncio.get_running_loop().sock_recv(self._sock, 4096)
            except OSError as error:
                raise EOFError from error
            if not received:
                raise EOFError
            line += received
        return line.strip()

    def kill(self) -> None:
        self._sock.close()
        self.process.kill()
        self.process.wait()


class Pool:
    """At most `size` workers, one question each at a time, `timeout` processor seconds for it."""

    def __init__(self, size: int, timeout: float):
        self.size, self.timeout = size, timeout
        self.overtime = 0  # answers that ran into the limit
        self.crashed = 0  # answers that took their worker down
        self._turn = asyncio.Semaphore(size)
        self._idle: list[Worker] = []
        self._known: OrderedDict[tuple[str, str], bool] = OrderedDict()

    async def equal(self, answer: str, truth: str) -> bool:
        """Whether the answers are equal; False when that cannot be found out in time."""
        pair = (answer, truth)
        if pair in self._known:
            return self._known[pair]
        async with self._turn:
            result = await self._ask(pair)
        self._known[pair] = result
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return result

    def workers(self) -> list[int]:
        """Process ids of the idle workers."""
        return [worker.process.pid for worker in self._idle]

    async def close(self) -> None:
        while self._idle:
            self._idle.pop().kill()

    async def _ask(self, pair: tuple[str, str]) -> bool:
        worker = self._idle.pop() if self._idle else Worker(self.timeout)
        try:
            if not worker.ready:
                await _started(worker)
            word = await asyncio.wait_for(worker.ask(pair), WALL * self.timeout)
        except BaseException as error:
            # Cancelled or late: its answer would be taken for that to the next question.
            worker.kill()
            if isinstance(error, asyncio.TimeoutError):
                self.overtime += 1
                return False
            if isinstance(error, EOFError):
                self.crashed += 1
                return False
            raise
        self._idle.append(worker)
        self.overtime += word == b"overtime"
        self.crashed += word == b"crashed"
        return word == b"true"


async def _started(worker: Worker) -> None:
    try:
        await asyncio.wait_for(worker.line(), START_TIMEOUT)
    except (EOFError, asyncio.TimeoutError) as error:
        status = worker.process.poll()
        raise RuntimeError(
            f"a reward worker could not start (exit status {status}): is math-verify installed? "
            "Its own words are in the log"
        ) from error
    worker.ready = True
