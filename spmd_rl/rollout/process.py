"""The collector process: reads requests from rank 0, answers them, ends when rank 0 does.

Comes in: on standard input, a socket with pickled requests [number, name, arguments]; the first is
the configuration. Goes out: [number, value or None, Failure or None]. All user code runs here, so
that it can neither stall nor crash the trainer.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from spmd_rl.rollout.pipe import AsyncPipe, Closed

COMMANDS = ("num_prompts", "connect", "collect", "evaluate", "load_state", "close")
NEWS = ("broke", "mended")  # of engines: taken in at once, also while a command is at work

TORCH_HINT = (
    "The collector loads transformers without torch unless a function of yours needs it: write "
    "'import torch' at the top of the module that the configuration names.\n"
)


class Failure(NamedTuple):
    """Why a request failed."""

    text: str  # traceback, or the sentence of a DataError
    kind: str  # user: a sentence about what the user gave; engine: none answered; code: the rest


def main() -> None:
    faulthandler.enable()
    sock = socket.socket(fileno=os.dup(0))
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)  # user code that forks or reads stdin must not meet the socket
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for rank 0, which ends this process
    _find_user_code()
    asyncio.run(serve(AsyncPipe(sock)))
    sys.stdout.flush()
    os._exit(0)  # threads of user code that still block must not hold up the end


async def serve(pipe: AsyncPipe) -> None:
    """Requests one after another. News are taken in between; "abandon" ends the request at hand, if
    any, and its answer is None. What nobody asked for goes out under number 0: engines that the
    client found broken.
    """
    service = None
    requests: asyncio.Queue[tuple[int, str, tuple] | None] = asyncio.Queue()
    current: asyncio.Task[Any] | None = None
    reports: set[asyncio.Task[None]] = set()

    async def receive() -> None:
        try:
            while True:
                number, name, args = await pipe.receive()
                if name in NEWS and service is not None:
                    getattr(service, name)(*args)
                elif name != "abandon":
                    requests.put_nowait((number, name, args))
                elif current is not None:
                    current.cancel()
        except Closed:
            requests.put_nowait(None)

    def report(index: int, starts: int, why: str) -> None:
        task = asyncio.create_task(pipe.send((0, (index, starts, why), None)))
        reports.add(task)
        task.add_done_callback(reports.discard)

    receiving = asyncio.create_task(receive())
    while request := await requests.get():
        number, name, args = request
        value, failure = None, None
        try:
            if service is None:
                service, value = await _start(args[0], report)
            else:
                assert name in COMMANDS, name
                current = asyncio.create_task(getattr(service, name)(*args))
                value = await current
        except asyncio.CancelledError:
            pass
        except Exception as error:
            failure = _failure(error)
        current = None
        try:
            await pipe.send((number, value, failure))
        except Closed:
            break
        if name == "close":
            break
    receiving.cancel()


async def _start(settings: dict[str, Any], report: Callable[[int, int, str], None]):
    """The service and what the user should know about the data."""
    from spmd_rl.config.schema import Config
    from spmd_rl.rollout.service import Service

    service = await asyncio.get_running_loop().run_in_executor(
        None, lambda: Service(Config.model_validate(settings), True, report)
    )
    settle()
    return service, service.notes


def settle() -> None:
    """What is loaded by now stays: one look through all of it for garbage takes 0.1 to 0.4 s. With
    thousands of requests in flight Python's own thresholds would have it look so often that it
    takes two fifths of the processor (measured with 4,096; tools/bench_collect.py).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


def _failure(error: Exception) -> Failure:
    from spmd_rl.data.rows import DataError
    from spmd_rl.rollout.answers import EngineUnreachable

    text = "".join(traceback.format_exception(error))
    if isinstance(error, ImportError) and "PyTorch" in text and "torch" not in sys.modules:
        text += TORCH_HINT
    print(text, file=sys.stderr, flush=True)
    if isinstance(error, DataError):
        return Failure(str(error), "user")
    return Failure(text, "engine" if isinstance(error, EngineUnreachable) else "code")


def _find_user_code() -> None:
    """Hooks may live in the working directory. It comes last: a script there that is named like a
    module of the standard library must not take its place."""
    sys.path[:] = [path for path in sys.path if path not in ("", os.getcwd())] + [os.getcwd()]


if __name__ == "__main__":
    # `python -m` runs this file as __main__; what is pickled must be known by its real name.
    from spmd_rl.rollout.process import main as run

    run()
