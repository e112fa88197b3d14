"""Notices: what any rank has to say to rank 0 outside commands, from any thread.

Comes in: plain JSON values; goes out: the same, in the order of posting, read when rank 0 likes.
They are signed with the job's secret, as commands are.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spmd_rl.control.job import Job

KIND = b"notice"  # the signature of anything else fits none


class Notices:
    """A client of the board with a socket of its own; use one in one thread."""

    def __init__(self, job: Job):
        self._store, self._secret = job.connect("notices"), job.secret
        self._read = 0

    def post(self, value: Any) -> None:
        number = str(self._store.add("posted", 1))
        data = self._secret.seal(json.dumps(value).encode(), KIND, number.encode())
        self._store.set(number, data)

    def read(self) -> list[Any]:
        """Those posted since the last call. Rank 0 only: they are removed."""
        found = []
        while self._read < self._store.add("posted", 0):
            self._read += 1
            number = str(self._read)
            body = self._secret.unseal(self._store.get(number), KIND, number.encode())
            found.append(json.loads(bytes(body)))
            self._store.delete_key(number)
        return found
