"""Messages between rank 0 and the collector process, over one socket pair.

A message is a pickled value (protocol 5) whose numpy columns travel beside it, uncopied by pickle.
Rank 0's end blocks, the collector's end belongs to an event loop. Both trust each other: the
socket has no name and is inherited.
"""

from __future__ import annotations

import asyncio
import pickle
import select
import socket
import struct
from collections.abc import Callable
from typing import Any

HEAD = struct.Struct("<QI")  # bytes of the pickle, number of columns
SIZE = struct.Struct("<Q")


class Closed(Exception):
    """The other end is gone."""


def pack(value: Any) -> list[bytes | memoryview]:
    columns: list[pickle.PickleBuffer] = []
    body = pickle.dumps(value, protocol=5, buffer_callback=columns.append)
    views = [column.raw() for column in columns]
    head = HEAD.pack(len(body), len(views)) + b"".join(SIZE.pack(len(view)) for view in views)
    return [head + body, *views]


class BlockingPipe:
    """Rank 0's end. `alive` is asked every now and then while waiting, and may raise."""

    def __init__(self, sock: socket.socket, alive: Callable[[], None] = lambda: None):
        self._sock, self._alive = sock, alive
        sock.setblocking(False)

    def send(self, value: Any) -> None:
        for part in pack(value):
            view = memoryview(part)
            while len(view):
                self._wait(for_write=True)
                try:
                    view = view[self._sock.send(view) :]
                except BlockingIOError:
                    continue
                except OSError as error:
                    raise Closed from error

    def receive(self) -> Any:
        size, count = HEAD.unpack(self._read(HEAD.size))
        sizes = [SIZE.unpack(self._read(SIZE.size))[0] for _ in range(count)]
        body = self._read(size)
        return pickle.loads(body, buffers=[self._read(length) for length in sizes])

    def ready(self) -> bool:
        """Whether something has arrived."""
        return bool(select.select([self._sock], [], [], 0)[0])

    def close(self) -> None:
        self._sock.close()

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while len(view):
            self._wait()
            try:
                received = self._sock.recv_into(view)
            except BlockingIOError:
                continue
            except OSError as error:
                raise Closed from error
            if not received:
                raise Closed
            view = view[received:]
        return data

    def _wait(self, for_write: bool = False) -> None:
        """Until the socket is ready. A forked child of user code may hold the other end open after
        the collector died, so the end of the stream alone would not be noticed."""
        watched = [self._sock]
        while not any(select.select(*((), watched) if for_write else (watched, ()), (), 0.25)):
            self._alive()


class AsyncPipe:
    """The collector's end."""

    def __init__(self, sock: socket.socket):
        self._sock = sock
        sock.setblocking(False)
        self._writing = asyncio.Lock()

    async def send(self, value: Any) -> None:
        loop = asyncio.get_running_loop()
        async with self._writing:
            for part in pack(value):
                try:
                    await loop.sock_sendall(self._sock, part)
                except OSError as error:
                    raise Closed from error

    async def receive(self) -> Any:
        size, count = HEAD.unpack(await self._read(HEAD.size))
        sizes = [SIZE.unpack(await self._read(SIZE.size))[0] for _ in range(count)]
        body = await self._read(size)
        return pickle.loads(body, buffers=[await self._read(length) for length in sizes])

    async def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while len(view):
            try:
                received = await asyncio.get_running_loop().sock_recv_into(self._sock, view)
            except OSError as error:
                raise Closed from error
            if not received:
                raise Closed
            view = view[received:]
        return data
