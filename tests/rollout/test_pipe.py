"""Messages over a socket pair: whole, in order, with columns beside the pickle."""

import asyncio
import socket
import threading

import numpy as np
import pytest

from spmd_rl.rollout.pipe import AsyncPipe, BlockingPipe, Closed, pack


def test_columns_are_not_pickled():
    column = np.arange(1_000_000, dtype=np.int32)
    parts = pack({"column": column})
    assert len(parts) == 2 and len(parts[0]) < 1000
    assert np.shares_memory(np.frombuffer(parts[1], dtype=np.int32), column)


def test_there_and_back():
    ours, theirs = socket.socketpair()
    messages = [
        1,
        {"a": np.arange(3_000_000), "b": [np.zeros(0), np.ones((2, 3))], "c": "x" * 100_000},
        None,
        [np.float32(2)],
    ]

    async def echo():
        pipe = AsyncPipe(theirs)
        for _ in messages:
            await pipe.send(await pipe.receive())

    thread = threading.Thread(target=asyncio.run, args=(echo(),))
    thread.start()
    pipe = BlockingPipe(ours)
    for message in messages:
        pipe.send(message)
        back = pipe.receive()
        assert np.array_equal(back["a"], message["a"]) if isinstance(message, dict) else True
        if isinstance(message, dict):
            assert back["c"] == message["c"] and back["b"][1].tolist() == [[1.0] * 3] * 2
            back["a"][0] = 7  # writable
        else:
            assert back == message
    thread.join()
    ours.close()
    theirs.close()


def test_the_end_of_the_other_side():
    ours, theirs = socket.socketpair()
    pipe = BlockingPipe(ours)
    theirs.send(b"half a message")
    theirs.close()
    with pytest.raises(Closed):
        pipe.receive()
    ours.close()


def test_waiting_asks_whether_the_other_side_lives():
    ours, theirs = socket.socketpair()

    def dead():
        raise RuntimeError("it is gone")

    with pytest.raises(RuntimeError, match="it is gone"):
        BlockingPipe(ours, dead).receive()
    ours.close()
    theirs.close()
