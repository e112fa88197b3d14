"""Weights of a torch.distributed checkpoint, read tensor by tensor in one process without a GPU.

In: a directory that Megatron's torch_dist format (or FSDP's model state) was saved to. Out: Hugging
Face tensors, one whole tensor in memory at a time, whatever layout wrote them. Builds no model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from spmd_rl.weights.names import NameMap

OTHERS = ("optimizer", "random", "rng_state", "chained_")  # what a checkpoint holds beside weights


class Reader:
    """Any part of any tensor of a checkpoint directory."""

    def __init__(self, directory: str | Path):
        directory = Path(directory)
        if not (directory / ".metadata").is_file() and (directory / "model").is_dir():
            directory = directory / "model"  # rollout_N of our own checkpoints
        if not (directory / ".metadata").is_file():
            raise ValueError(
                f"--input-dir {directory} holds no .metadata: give the directory that a "
                "torch_dist checkpoint was saved to (rollout_N, iter_N or release)"
            )
        self.files: Any = FileSystemReader(directory)
        metadata = self.files.read_metadata()
        self.files.set_up_storage_reader(metadata, is_coordinator=True)
        found = metadata.state_dict_metadata
        self.tensors = {k: v for k, v in found.items() if isinstance(v, TensorStorageMetadata)}

    def shape(self, name: str) -> torch.Size:
        return self.tensors[name].size

    def read(self, name: str, *index: int) -> Tensor:
        """The tensor, or its slice at `index` of the first dimensions."""
        metadata = self.tensors[name]
        shape = metadata.size[len(index) :]
        offsets = torch.Size((*index, *(0 for _ in shape)))
        sizes = torch.Size((*(1 for _ in index), *shape))
        into = torch.empty(sizes, dtype=metadata.properties.dtype)
        chunk = ChunkStorageMetadata(offsets, sizes)
        items = create_read_items_for_chunk_list(name, metadata, [chunk])
        self.files.read_data(LoadPlan(items), _Into(into)).wait()
        return into.view(shape)


class _Into(DefaultLoadPlanner):
    """Copies what is read into one tensor."""

    def __init__(self, into: Tensor):
        super().__init__()
        self.into = into

    def resolve_tensor(self, read_item: Any) -> Tensor:
        region = self.into
        places = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        for dim, (start, length) in enumerate(places):
            region = region.narrow(dim, start, length)
        return region

    def commit_tensor(self, read_item: Any, tensor: Tensor) -> None:
        pass


def hf_tensors(reader: Reader, names: NameMap, layers: int) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) of every weight in a Megatron checkpoint."""
    for key in sorted(reader.tensors):
        if key.startswith(OTHERS):
            continue
        for name, index in _parts(key, names, layers):
            if not names.tied_copy(name):
                yield from names.to_hf(name, reader.read(key, *index))


def _parts(key: str, names: NameMap, layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Parameters that a tensor of the checkpoint holds: layers and experts may be its first
    dimensions.
    """
    stacked = key.startswith("decoder.layers.") and not key.split(".")[2].isdigit()
    for layer in range(layers) if stacked else [None]:
        index = () if layer is None else (layer,)
        name = key.replace("decoder.layers.", f"decoder.layers.{layer}.") if index else key
        if ".experts.experts." not in key:
            yield name, index
            continue
        for expert in range(names.experts):
            place = f".experts.local_experts.{expert}."
            yield name.replace(".experts.experts.", place), (*index, expert)
