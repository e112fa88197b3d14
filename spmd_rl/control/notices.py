"""Notices: what any rank has to say to rank 0 outside commands, from any thread.

Comes in: plain JSON values; goes out: the same, in the order of posting, read when rank 0 likes.
They are signed with the job's secret, as commands are.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from spmd_rl.control.secret import SIGNATURE

if TYPE_CHECKING:
    from spmd_rl.control.job import Job

KIND = b"notice"  # the signature of anything else fits none


class Notices:
    """A client of the board with a socket of its own; use one in one thread."""

    def __init__(self, job: Job):
        self._store, self._sign = job.connect("notices"), job.secret.sign
        self._read = 0

    def post(self, value: Any) -> None:
        number, body = str(self._store.add("posted", 1)), json.dumps(value).encode()
        self._store.set(number, self._sign(KIND, number.encode(), body) + body)

    def read(self) -> list[Any]:
        """Those posted since the last call. Rank 0 only: they are removed."""
        found = []
        while self._read < self._store.add("posted", 0):
            self._read += 1
            number = str(self._read)
            data = self._store.get(number)
            signature, body = data[:SIGNATURE], data[SIGNATURE:]
            if signature != self._sign(KIND, number.encode(), body):
                raise RuntimeError("a notice in the job's store was not written by a rank of ours")
            found.append(json.loads(body))
            self._store.delete_key(number)
        return found
