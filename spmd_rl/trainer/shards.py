"""Files of a torch_dist checkpoint: each rank writes one, laid out once; any rank reads any part.

In: pieces. Out: `__<rank>_0.distcp` files and `.metadata`, as torch.distributed.checkpoint and
Megatron write and read them. Reading runs no code of the checkpoint: tensors are taken as raw
bytes, and of the index only the classes of the format are unpickled. Knows no models.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import struct
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spmd_rl import disk
from spmd_rl.trainer.pieces import Piece

INDEX = ".metadata"
ALIGNMENT = 64  # of every tensor in a file, as torch.save aligns them
WRITE_BYTES = 1 << 26  # handed to the kernel at once
LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip entry: length of its name, of its extra field


class Chunk(NamedTuple):
    """Where a piece lies. Plain values: chunks are gathered from all ranks for the index."""

    key: str
    dtype: str  # float32
    whole: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    file: str
    start: int
    length: int


class Image:
    """What this rank's file will hold, in host memory; made once, filled anew for every save."""

    def __init__(self, pieces: list[Piece], file: str, pinned: bool):
        self.file = file
        self.chunks: list[Chunk] = []
        frames, places, end = [], [], 0
        for piece in pieces:
            head, tail = _frame(piece.values)
            start = -(-end // ALIGNMENT) * ALIGNMENT
            end = start + len(head) + piece.values.nbytes + len(tail)
            self.chunks.append(_chunk(piece, file, start, end - start))
            frames.append((start, head, end - len(tail), tail))
            places.append((start + len(head), piece.values.nbytes))
        self.bytes = torch.zeros(end, dtype=torch.uint8, pin_memory=pinned)
        for start, head, at, tail in frames:
            _put(self.bytes, start, head)
            _put(self.bytes, at, tail)
        self._values = [
            self.bytes[start : start + size].view(piece.values.dtype).view(piece.values.shape)
            for piece, (start, size) in zip(pieces, places, strict=True)
        ]

    def fits(self, pieces: list[Piece]) -> bool:
        """Whether the pieces are those the image was laid out for."""
        return len(pieces) == len(self.chunks) and all(
            (chunk.key, chunk.offset, chunk.size) == (p.key, p.offset, tuple(p.values.shape))
            for chunk, p in zip(self.chunks, pieces, strict=True)
        )

    def fill(self, pieces: list[Piece]) -> None:
        """Copy the values; afterwards training may change them. Like writing, it leaves the
        interpreter to others while it copies.
        """
        devices = {piece.values.device for piece in pieces if piece.values.is_cuda}
        for place, piece in zip(self._values, pieces, strict=True):
            place.copy_(piece.values, non_blocking=True)
        for device in devices:  # named: a thread of its own has another current device
            torch.cuda.synchronize(device)

    def write(self, directory: str | Path) -> None:
        """To disk, and on it when this returns. Holds the interpreter for none of it."""
        view = memoryview(self.bytes.numpy())  # type: ignore[arg-type]
        with open(Path(directory) / self.file, "wb", buffering=0) as file:
            at = 0
            while at < len(view):
                at += file.write(view[at : at + WRITE_BYTES])
            disk.sync(file)


def _chunk(piece: Piece, file: str, start: int, length: int) -> Chunk:
    dtype = str(piece.values.dtype).removeprefix("torch.")
    size = tuple(piece.values.shape)
    return Chunk(piece.key, dtype, piece.whole, piece.offset, size, file, start, length)


def _put(target: Tensor, at: int, data: bytes) -> None:
    target[at : at + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _frame(values: Tensor) -> tuple[bytes, bytes]:
    """What torch.save writes before and after a tensor's bytes (none of which are copied here)."""
    shape = torch.empty(values.shape, dtype=values.dtype, device="meta")
    empty = torch.empty(0, dtype=values.dtype).new_empty(shape.shape)  # never touched: no memory
    with tempfile.TemporaryFile() as file, torch.serialization.skip_data():
        torch.save(empty, file)
        size = file.tell()
        file.seek(0)
        with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as view:
            start = _payload(view, 0, size)
            assert start is not None and start % ALIGNMENT == 0
            return view[:start], view[start + values.nbytes : size]


class _Window(io.RawIOBase):
    """A part of a mapped file as a file of its own."""

    def __init__(self, view: mmap.mmap, start: int, length: int):
        self._view, self._start, self._length, self._at = view, start, length, 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        stop = self._length if size is None or size < 0 else min(self._at + size, self._length)
        data = self._view[self._start + self._at : self._start + stop]
        self._at = stop
        return data


def _payload(view: mmap.mmap, start: int, length: int) -> int | None:
    """Where the bytes of the one tensor of a torch.save archive begin in `view`."""
    window = _Window(view, start, length)
    with zipfile.ZipFile(window) as archive:  # type: ignore[arg-type]
        for entry in archive.infolist():
            if entry.filename.endswith("/data/0") and entry.compress_type == zipfile.ZIP_STORED:
                window.seek(entry.header_offset)
                name, extra = LOCAL_HEADER.unpack(window.read(LOCAL_HEADER.size))
                return start + entry.header_offset + LOCAL_HEADER.size + name + extra
    return None


def write_index(directory: str | Path, chunks: Iterable[Chunk]) -> None:
    """The index of all ranks' chunks, and what says that Megatron can read this."""
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    tensors: dict[str, dcp.TensorStorageMetadata] = {}
    places: dict[dcp.MetadataIndex, _StorageInfo] = {}
    for chunk in chunks:
        if chunk.key not in tensors:
            kind = dcp.TensorProperties(dtype=getattr(torch, chunk.dtype))
            tensors[chunk.key] = dcp.TensorStorageMetadata(kind, torch.Size(chunk.whole), [])
        known = tensors[chunk.key].chunks
        offset, size = torch.Size(chunk.offset), torch.Size(chunk.size)
        at = dcp.MetadataIndex(chunk.key, offset, len(known))
        known.append(dcp.ChunkStorageMetadata(offset, size))
        places[at] = _StorageInfo(chunk.file, chunk.start, chunk.length)
    index = dcp.Metadata(state_dict_metadata=dict(tensors), storage_data=places)
    disk.write_synced(Path(directory) / INDEX, pickle.dumps(index))


class _Unread:
    """In place of what Megatron adds to its index for itself (plans of the ranks that wrote)."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _Plain(pickle.Unpickler):
    """Unpickles the format's own values only: an index that names anything else is refused."""

    MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    NAMES = {
        ("torch", "Size"),
        ("torch", "device"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
    }

    def find_class(self, module: str, name: str) -> Any:
        allowed = (module, name) in self.NAMES or (
            module in self.MODULES and (name == "_StorageInfo" or name in _FORMAT)
        )
        if not allowed and module.startswith(("torch.distributed.checkpoint.", "megatron.core.")):
            return _Unread
        if not allowed and not (module == "torch" and name in _DTYPES):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of an index")
        return super().find_class(module, name)


_FORMAT = {
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
}
_DTYPES = {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class Stored:
    """A checkpoint on disk, open for reading; a context manager."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        try:
            self.index: Any = _Plain(io.BytesIO((self.directory / INDEX).read_bytes())).load()
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError) as error:
            raise ValueError(f"{self.directory} is no readable checkpoint: {error}") from error
        self._files: dict[str, mmap.mmap] = {}

    def __enter__(self) -> Stored:
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.clear()  # unmapped with the last tensor that looks at it

    def __contains__(self, key: str) -> bool:
        return key in self.index.state_dict_metadata

    def fill(self, pieces: list[Piece]) -> None:
        """Read what the pieces hold, from whatever chunks it was written in."""
        for piece in pieces:
            about = self.index.state_dict_metadata.get(piece.key)
            if about is None:
                raise ValueError(f"{self.directory} holds no tensor '{piece.key}'")
            here, there = piece.whole, tuple(about.size)
            if here[piece.padded :] != there[piece.padded :]:
                raise ValueError(
                    f"{self.directory} holds another model: '{piece.key}' has the shape "
                    f"{list(there)} there and {list(here)} here"
                )
            if piece.padded:
                piece.values.zero_()
            self._fill(piece, about)

    @torch.no_grad()
    def _fill(self, piece: Piece, about: Any) -> None:
        from torch.distributed.checkpoint.metadata import MetadataIndex

        missing = piece.values.numel()
        for chunk in about.chunks:
            both = _overlap(piece, tuple(chunk.offsets), tuple(chunk.sizes))
            if both is None:
                continue
            ours, theirs = both
            info = self.index.storage_data[MetadataIndex(piece.key, chunk.offsets)]
            source = self._tensor(info, about.properties.dtype, tuple(chunk.sizes))[theirs]
            piece.values[ours].copy_(source)
            missing -= source.numel()
        if missing and not piece.padded:
            raise ValueError(f"{self.directory} holds only a part of the tensor '{piece.key}'")

    def _tensor(self, info: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """A stored tensor; where it lies plainly in its file, as a view of the file."""
        view = self._map(info.relative_path)
        start = _payload(view, info.offset, info.length)
        count = math.prod(shape)
        if start is None or start + count * dtype.itemsize > info.offset + info.length:
            data = io.BytesIO(view[info.offset : info.offset + info.length])
            return torch.load(data, map_location="cpu", weights_only=True)
        return torch.frombuffer(view, dtype=dtype, count=count, offset=start).view(shape)

    def _map(self, name: str) -> mmap.mmap:
        if name not in self._files:
            path = (self.directory / name).resolve()
            if path.parent != self.directory.resolve():
                raise ValueError(f"{self.directory}: its index names a file outside it: {name}")
            with open(path, "rb") as file:
                self._files[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._files[name]


Slices = tuple[slice, ...]


def _overlap(
    piece: Piece, offset: tuple[int, ...], size: tuple[int, ...]
) -> tuple[Slices, Slices] | None:
    """What a piece and a stored chunk share, as slices of each; None: nothing."""
    ours, theirs = [], []
    extent = piece.values.shape
    for a, n, b, m in zip(piece.offset, extent, offset, size, strict=True):
        low, high = max(a, b), min(a + n, b + m)
        if low >= high:
            return None
        ours.append(slice(low - a, high - a))
        theirs.append(slice(low - b, high - b))
    return tuple(ours), tuple(theirs)
