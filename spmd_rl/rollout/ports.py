"""Ports of this host: bound first and kept while the server that was told one listens on it.

Comes in: the address of the host; goes out: port numbers. A kept port cannot be handed to anyone
else, not even while a dead server is replaced: the kernel skips it, and only a socket that sets
SO_REUSEADDR and names it, as the server's does, can listen there.
"""

from __future__ import annotations

import socket


class Ports:
    """Reserved ports: a server that is started again finds its own."""

    def __init__(self, host: str):
        self.host = host
        self._held: list[socket.socket] = []

    def reserve(self) -> int:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        held = socket.socket(family, socket.SOCK_STREAM)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((self.host, 0))
        self._held.append(held)
        return held.getsockname()[1]

    def close(self) -> None:
        for held in self._held:
            held.close()
        self._held.clear()
