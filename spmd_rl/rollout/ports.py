"""Ports of this host: bound first and kept until the server that was told one listens on it.

Comes in: the address of the host; goes out: port numbers. A kept port cannot be handed to anyone
else: the kernel skips it, and only a socket that sets SO_REUSEADDR and names it, as the server's
does, can listen there.
"""

from __future__ import annotations

import socket


class Ports:
    """Reserved ports, freed together once the servers have taken them."""

    def __init__(self, host: str):
        self.host = host
        self._held: dict[int, socket.socket] = {}

    def reserve(self) -> int:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        held = socket.socket(family, socket.SOCK_STREAM)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((self.host, 0))
        port = held.getsockname()[1]
        self._held[port] = held
        return port

    def release(self, port: int) -> None:
        if port in self._held:
            self._held.pop(port).close()

    def close(self) -> None:
        for port in list(self._held):
            self.release(port)
