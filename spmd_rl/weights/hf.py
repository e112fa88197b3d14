"""Hugging Face checkpoints: read only the slices a rank holds, write sharded safetensors with an
index.

In: a directory and Megatron parameters (or a stream of HF tensors). Out: filled parameters (or a
directory that transformers loads). Knows the name map, not process groups.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from spmd_rl.weights.names import NameMap

SHARD_BYTES = 5 * 1024**3
_COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.model",
    "*.py",
)


_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}  # as safetensors calls them


class Checkpoint:
    """Lazy slices of the tensors in a checkpoint directory; a context manager that closes its
    files.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.where = _tensor_files(self.directory)
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def slice(self, name: str) -> Any:
        """A handle of tensor `name` whose indexing reads only what is asked for."""
        if name not in self.where:
            raise ValueError(f"model.hf_checkpoint: {self.directory} holds no tensor '{name}'")
        file = self.where[name]
        if file not in self._files:
            opened = safe_open(self.directory / file, framework="pt", device="cpu")
            self._files[file] = self._stack.enter_context(opened)
        return self._files[file].get_slice(name)


def _tensor_files(directory: Path) -> dict[str, str]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return json.loads(index.read_text())["weight_map"]
    single = directory / "model.safetensors"
    if not single.is_file():
        raise ValueError(f"model.hf_checkpoint: {directory} has no model.safetensors (or index)")
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single.name)


def tensor_names(directory: str | Path) -> set[str]:
    return set(_tensor_files(Path(directory)))


def count(directory: str | Path) -> int:
    """How many numbers the checkpoint holds."""
    with Checkpoint(directory) as checkpoint:
        return sum(math.prod(checkpoint.slice(name).get_shape()) for name in checkpoint.where)


@torch.no_grad()
def load(
    directory: str | Path,
    parameters: Iterable[tuple[str, Tensor]],
    names: NameMap,
    tp: tuple[int, int] = (0, 1),
    experts_tp: tuple[int, int] = (0, 1),
) -> None:
    """Fill parameters (by global Megatron name) with this rank's part of the checkpoint.

    `experts_tp`: rank and size of the experts' tensor parallelism; `tp`: of all else.
    """
    with Checkpoint(directory) as checkpoint:
        for name, parameter in parameters:
            rank, size = experts_tp if names.entry(name).expert else tp
            part = names.shard(name, checkpoint.slice, parameter.shape, rank, size)
            if part.shape != parameter.shape:
                raise ValueError(
                    f"model.hf_checkpoint: {name} has shape {tuple(part.shape)}, but config.json "
                    f"describes {tuple(parameter.shape)}"
                )
            parameter.copy_(part)


def save(
    directory: str | Path,
    tensors: Iterator[tuple[str, Tensor]],
    template: str | Path,
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write HF tensors as they come, in files of about `shard_bytes`, beside the template's other
    files. At most one tensor is held.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    copy_template(template, directory, dtype)
    room = _header_room(template, shard_bytes)
    files: list[_File] = []
    try:
        for name, tensor in tensors:
            tensor = tensor.detach().to("cpu").contiguous()
            if not files or not files[-1].takes(name, tensor, shard_bytes):
                if files:
                    files[-1].close()
                files.append(_File(directory / f"part-{len(files)}.safetensors", room))
            files[-1].add(name, tensor)
            del tensor  # before the next is made
    finally:
        if files:
            files[-1].close()
    total = sum(file.size for file in files)
    _name_files(directory, [list(file.tensors) for file in files], total)


class _File:
    """A safetensors file that grows by a tensor at a time. The format has the names in front, so
    room is left for them; they are written at the end, padded with spaces.
    """

    def __init__(self, path: Path, room: int):
        self.room, self.size = room, 0
        self.tensors: dict[str, Any] = {}
        self.used = 64  # bytes of the header: what is in every one
        self.file = path.open("wb")
        self.file.seek(8 + room)

    def takes(self, name: str, tensor: Tensor, limit: int) -> bool:
        """Whether the tensor belongs into this file: an empty one takes any."""
        fits = self.size + tensor.nbytes <= limit and self.size % tensor.element_size() == 0
        named = self.used + _entry_bytes(name) <= self.room
        return not self.tensors or (fits and named)

    def add(self, name: str, tensor: Tensor) -> None:
        end = self.size + tensor.nbytes
        self.tensors[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.size, end],
        }
        self.used += _entry_bytes(name)
        if tensor.nbytes:
            self.file.write(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        self.size = end

    def close(self) -> None:
        header = json.dumps({"__metadata__": {"format": "pt"}} | self.tensors).encode()
        with self.file:
            self.file.seek(0)
            self.file.write(struct.pack("<Q", self.room) + header.ljust(self.room))


def _entry_bytes(name: str) -> int:
    """At most, in a header: the name, and numbers of up to 13 digits in three places."""
    return len(json.dumps(name)) + 160


def _header_room(template: str | Path, shard_bytes: int) -> int:
    """For the names of one file: all the template's, fewer where its tensors fill many files."""
    template = Path(template)
    try:
        where = _tensor_files(template)
    except ValueError:  # only a configuration
        return 1 << 16
    size = sum((template / file).stat().st_size for file in set(where.values()))
    room = sum(_entry_bytes(name) for name in where) + 256
    return -(-int(room * min(1.0, 4 * shard_bytes / max(size, 1))) // 4096) * 4096


def _name_files(directory: Path, names: list[list[str]], total: int) -> None:
    """The usual names, which say how many files there are, and the index."""
    if len(names) == 1:
        (directory / "part-0.safetensors").replace(directory / "model.safetensors")
        return
    weight_map = {}
    for i, members in enumerate(names):
        file = f"model-{i + 1:05d}-of-{len(names):05d}.safetensors"
        (directory / f"part-{i}.safetensors").replace(directory / file)
        weight_map |= dict.fromkeys(members, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def copy_template(template: str | Path, directory: Path, dtype: torch.dtype) -> None:
    """Config, tokenizer and generation settings of the checkpoint that training started from."""
    for pattern in _COPIED:
        for file in sorted(Path(template).glob(pattern)):
            shutil.copyfile(file, directory / file.name)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    key = "dtype" if "dtype" in config else "torch_dtype"
    config[key] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2) + "\n")
