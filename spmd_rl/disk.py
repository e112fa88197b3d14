"""Files that are there whole or not at all, and that a power failure leaves there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


def write_synced(path: Path, data: bytes | str) -> None:
    """On disk when this returns; a text is UTF-8. Raises OSError."""
    with open(path, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        sync(file)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to that takes the place of `path` once all of it is on disk."""
    aside = path.with_name(f".{path.name}.part")
    with open(aside, "wb") as file:
        yield file
        sync(file)
    aside.replace(path)


def sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """The names in it are on disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
