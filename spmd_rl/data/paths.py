"""Paths of data sets: `path@[start:stop]` names a slice of the rows, as in slime."""

from __future__ import annotations

import re

_SLICE = re.compile(r"^(?P<path>.+)@\[(?P<start>-?\d*):(?P<stop>-?\d*)\]$")


def split_slice(path: str) -> tuple[str, slice | None]:
    """The file and the rows taken of it (None: all); a malformed slice is a ValueError."""
    match = _SLICE.match(path)
    if match:
        start, stop = match["start"], match["stop"]
        if "-" not in (start, stop):
            return match["path"], slice(_number(start), _number(stop))
    if match or "@[" in path:
        raise ValueError(
            f"'{path}': rows are taken with path@[start:stop], such as x.jsonl@[0:100]"
        )
    return path, None


def _number(text: str) -> int | None:
    return int(text) if text else None
