"""Rows of a JSONL or Parquet file, found once and parsed when asked for.

Comes in: a path with an optional `@[start:stop]`; goes out: dicts by position. The file stays on
disk (mapped), so a million rows cost an index of 24 MB. It must not know what the columns mean:
`fault` says what is wrong with a row.
"""

from __future__ import annotations

import json
import mmap
import tempfile
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import orjson

from spmd_rl.data.paths import split_slice

Fault = Callable[[dict[str, Any]], str | None]  # what is wrong with a row, or None
MOST_NOTES = 5  # of skipped rows; more are only counted


class DataError(ValueError):
    """A data set cannot be used; the text is a sentence for the user."""


class Rows:
    """The good rows of one file, in file order."""

    def __init__(self, path: str, fault: Fault = lambda row: None, on_bad_line: str = "stop"):
        self.path, rows = split_slice(path)
        self.notes: list[str] = []  # what was skipped, for the user
        self.skipped = 0
        file, self._unit = _open(Path(self.path))
        with file:
            file.seek(0, 2)
            size = file.tell()
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        starts, stops, numbers = self._find_lines()
        if rows is not None:
            starts, stops, numbers = starts[rows], stops[rows], numbers[rows]
        self._starts, self._stops = array("q"), array("q")
        for start, stop, number in zip(starts, stops, numbers, strict=True):
            problem = self._problem(start, stop, fault)
            if problem is None:
                self._starts.append(start)
                self._stops.append(stop)
            else:
                self._bad(f"{self.path} {self._unit} {number}: {problem}", on_bad_line)
        if self.skipped > MOST_NOTES:
            self.notes.append(f"{self.path}: {self.skipped} unreadable {self._unit}s skipped")
        if not self._starts:
            raise DataError(f"{path} holds no usable rows")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _parse(self._map[self._starts[index] : self._stops[index]])

    def _find_lines(self) -> tuple[array, array, array]:
        """Where each line that is not blank starts and stops, and its number counted from 1."""
        starts, stops, numbers = array("q"), array("q"), array("q")
        data, position, number = self._map, 0, 0
        if data[:3] == b"\xef\xbb\xbf":
            position = 3
        while position < len(data):
            stop = data.find(b"\n", position)
            stop = len(data) if stop < 0 else stop
            number += 1
            if position < stop and (data[position] > 32 or data[position:stop].strip()):
                starts.append(position)
                stops.append(stop)
                numbers.append(number)
            position = stop + 1
        return starts, stops, numbers

    def _problem(self, start: int, stop: int, fault: Fault) -> str | None:
        line = self._map[start:stop]
        try:
            row = _parse(line)
        except UnicodeDecodeError:
            return "not UTF-8"
        except json.JSONDecodeError as error:
            if line.lstrip()[:1] == b"[":
                return "a list, but one JSON object per line is expected"
            return f"not JSON ({error.msg} at character {error.pos + 1})"
        if not isinstance(row, dict):
            return f"a {type(row).__name__}, but one JSON object per line is expected"
        return fault(row)

    def _bad(self, sentence: str, on_bad_line: str) -> None:
        if on_bad_line == "stop":
            raise DataError(f"{sentence}. Repair it, or set data.on_bad_line: skip")
        self.skipped += 1
        if self.skipped <= MOST_NOTES:
            self.notes.append(f"{sentence}; skipped")


def _parse(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return json.loads(line)  # slower, but takes NaN


def _open(path: Path) -> tuple[IO[bytes], str]:
    if not path.is_file():
        raise DataError(f"the data file {path} does not exist")
    if path.suffix == ".parquet":
        return _spill_parquet(path), "row"
    return path.open("rb"), "line"


def _spill_parquet(path: Path) -> IO[bytes]:
    """The rows as JSON lines in a file without a name: random access without holding the table."""
    import pyarrow.parquet as parquet

    out = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    for batch in parquet.ParquetFile(path).iter_batches(batch_size=2048):
        lines = (orjson.dumps(row, default=str) for row in batch.to_pylist())
        out.write(b"\n".join(lines) + b"\n")
    out.flush()
    return out
