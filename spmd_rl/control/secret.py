"""The job's secret: known to its ranks, and to nobody else on the machines or the network.

torch's store answers whoever reaches its port, so neither the secret nor a key made from it ever
goes through it: rank 0 leaves the secret in a file of the run folder that only this user may read,
and removes it once every rank has read it. What is signed with it (commands and their answers)
cannot be forged, and keys for single purposes come from it.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING

from spmd_rl import disk

if TYPE_CHECKING:
    from spmd_rl.control.job import Job

PREFIX = ".secret-"
SHARED_DISK_SECONDS = 60.0  # a network disk may show a new file late
SIGNATURE = 16  # bytes


class Secret:
    """Made by `share`; the empty secret signs, but protects nothing (tests of single parts)."""

    def __init__(self, value: bytes = b""):
        self._value = value

    def seal(self, body: bytes, *about: bytes) -> bytes:
        """`SIGNATURE` bytes (keyed BLAKE2b, RFC 7693), then the body. `about`: what the signature
        is for as well, so that it fits no other place.
        """
        return self._sign(body, *about) + body

    def unseal(self, data: bytes, *about: bytes) -> memoryview:
        """The body; RuntimeError if it was not this job's ranks that sealed it, for this place."""
        body = memoryview(data)[SIGNATURE:]
        if not hmac.compare_digest(data[:SIGNATURE], self._sign(body, *about)):
            raise RuntimeError(
                "a message without this job's signature was found in its store: something that "
                "does not belong to the job writes to the store's port"
            )
        return body

    def _sign(self, body: bytes | memoryview, *about: bytes) -> bytes:
        signature = hashlib.blake2b(key=self._value, digest_size=SIGNATURE)
        for part in (*about, body):
            signature.update(part)
        return signature.digest()

    def key(self, purpose: str) -> str:
        """A key of 32 hexadecimal digits for one purpose, the same on all ranks."""
        return hashlib.blake2b(purpose.encode(), key=self._value, digest_size=16).hexdigest()

    def __repr__(self) -> str:
        return "Secret(...)"


def share(job: Job, run_dir: Path) -> Secret:
    """All ranks together: the same new secret on each. Raises PermissionError for a file that is
    not only ours, FileNotFoundError where the run folder is not shared.
    """
    path = run_dir / f"{PREFIX}{job.token}"
    if job.rank == 0:
        for old in run_dir.glob(f"{PREFIX}*"):  # of an attempt that was killed while it started
            old.unlink(missing_ok=True)
        value = secrets.token_bytes(32)
        if job.world > 1:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with open(descriptor, "wb") as file:
                file.write(value)
                disk.sync(file)
            job.store.set("secret", "")
        return Secret(value)
    job.store.get("secret")  # before the first look: a network disk remembers what was not there
    return Secret(_read(path))


def forget(job: Job, run_dir: Path) -> None:
    """Rank 0, once all ranks have it: nothing of it stays on the disk."""
    with contextlib.suppress(OSError):
        (run_dir / f"{PREFIX}{job.token}").unlink()


def _read(path: Path) -> bytes:
    end = time.monotonic() + SHARED_DISK_SECONDS
    while True:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            break
        except FileNotFoundError:
            if time.monotonic() > end:
                raise FileNotFoundError(
                    f"{path.parent} is not on a disk that all nodes share: rank 0's file there was "
                    f"not seen within {SHARED_DISK_SECONDS:.0f} s; set logging.run_dir to one"
                ) from None
            time.sleep(0.05)
    with open(descriptor, "rb") as file:
        about = os.fstat(file.fileno())
        if about.st_uid != os.geteuid() or stat.S_IMODE(about.st_mode) & 0o077:
            raise PermissionError(f"{path} is not this user's alone: remove it")
        return file.read()
