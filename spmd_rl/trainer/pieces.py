"""What of the model and its optimizer this rank writes to a checkpoint, and what it reads back.

In: model chunks and Megatron's optimizer. Out: pieces: boxes of whole tensors under the names
Megatron's own torch_dist checkpoints use. A weight and its Adam moments are written by the rank
whose optimizer owns them, so that all data-parallel ranks write equal shares and none sends
anything. Knows no files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN = "fp32_param"  # Megatron's name for the fp32 copy of a bf16 parameter

Box = tuple[tuple[int, ...], tuple[int, ...]]  # where it begins in its tensor, its extent


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a whole tensor, and the memory that holds it."""

    key: str
    whole: tuple[int, ...]  # shape of the whole tensor
    offset: tuple[int, ...]
    values: Tensor  # contiguous; its shape is the extent of the box
    padded: bool = False  # the whole tensor's first axis may have another length elsewhere


class Region(NamedTuple):
    """A run of a parameter's numbers that is a block of one whole tensor."""

    key: str
    whole: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]  # of the block, without the axes that `prepended` counts
    start: int  # where the block begins in the flat parameter
    prepended: int
    padded: bool
    replica: Any  # Megatron's replica id: zeros, then the place among data-parallel peers


class Owned(NamedTuple):
    """The part [start, stop) of a flat parameter whose optimizer state is on this rank."""

    optimizer: Any
    start: int
    stop: int
    tensors: dict[str, Tensor]  # moments, and the fp32 parameter where it is another memory
    shared: bool  # data-parallel peers own the same: the first of them writes


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The run [start, stop) of a row-major array as boxes, in the order of the run."""
    if stop <= start:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, last = start // row, stop // row
    if start % row:
        for offset, size in boxes(shape[1:], start % row, min(row, stop - first * row)):
            yield (first, *offset), (1, *size)
        first += 1
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if first <= last and stop % row:
        for offset, size in boxes(shape[1:], 0, stop % row):
            yield (last, *offset), (1, *size)


def to_save(chunks: list[Any], optimizer: Any | None, metadata: dict[str, Any]) -> list[Piece]:
    """What this rank writes. `optimizer` None: weights only."""
    owners = owned(optimizer)
    found: list[Piece] = []
    for tensor, regions in _regions(chunks, metadata):
        mine = owners.get(id(tensor))
        if mine is None and optimizer is not None and tensor.requires_grad:
            continue  # other ranks' optimizers own all of it
        for region in regions:
            *elsewhere, peer = region.replica
            if any(elsewhere) or (peer and (mine is None or mine.shared)):
                continue
            found += _weights(region, tensor, mine)
            found += _state(region, mine)
    return found


def to_load(chunks: list[Any], optimizer: Any | None, metadata: dict[str, Any]) -> list[Piece]:
    """What this rank reads: all of its weights, the optimizer state that it owns."""
    owners = owned(optimizer)
    found: list[Piece] = []
    for tensor, regions in _regions(chunks, metadata):
        for region in regions:
            found += _weights(region, tensor, None)
            found += _state(region, owners.get(id(tensor)))
    return found


def _weights(region: Region, tensor: Tensor, owner: Owned | None) -> Iterator[Piece]:
    start, stop = (owner.start, owner.stop) if owner else (0, tensor.numel())
    return _cut(region, region.key, tensor.detach().view(-1), 0, start, stop)


def _state(region: Region, owner: Owned | None) -> Iterator[Piece]:
    for name, flat in owner.tensors.items() if owner else ():
        key = f"optimizer.state.{name}.{region.key}"
        yield from _cut(region, key, flat, owner.start, owner.start, owner.stop)  # type: ignore


def _cut(
    region: Region, key: str, flat: Tensor, begins: int, start: int, stop: int
) -> Iterator[Piece]:
    """The boxes of [start, stop) of a parameter in a region; `flat` holds it from `begins` on."""
    start = max(start, region.start)
    stop = min(stop, region.start + math.prod(region.shape))
    before = (0,) * region.prepended
    for offset, size in boxes(region.shape, start - region.start, stop - region.start):
        at, start = start - begins, start + math.prod(size)
        yield Piece(
            key,
            region.whole,
            tuple(a + b for a, b in zip(region.offset, before + offset, strict=True)),
            flat[at : start - begins].view((1,) * region.prepended + size),
            region.padded,
        )


def _regions(chunks: list[Any], metadata: dict[str, Any]) -> Iterator[tuple[Tensor, list[Region]]]:
    """Each tensor of the model with the whole tensors that it is a part of."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    for chunk in chunks:
        for entry in nested_values(chunk.sharded_state_dict(metadata=metadata)):
            if isinstance(entry, ShardedTensorFactory):
                parts: Iterable[Any] = nested_values(entry.build())
            elif isinstance(entry, ShardedTensor):
                parts = [entry]
            else:  # objects: Transformer Engine's empty extra states
                continue
            assert entry.data is not None
            yield entry.data, [_region(entry.data, part) for part in parts]


def _region(tensor: Tensor, part: Any) -> Region:
    assert part.data.is_contiguous(), part.key
    start = (part.data.data_ptr() - tensor.data_ptr()) // tensor.element_size()
    replica = part.replica_id if isinstance(part.replica_id, tuple) else (part.replica_id,)
    return Region(
        part.key,
        tuple(part.global_shape),
        tuple(part.global_offset),
        tuple(part.local_shape),
        start,
        part.prepend_axis_num,
        part.allow_shape_mismatch,
        replica,
    )


def owned(optimizer: Any | None) -> dict[int, Owned]:
    """By id of the parameter: what this rank's optimizer owns of it."""
    found: dict[int, Owned] = {}
    for part in optimizers(optimizer):
        shared = not hasattr(part, "model_param_group_index_map")
        for parameter, start, stop, tensors in _whole(part) if shared else _split(part):
            main = tensors["param"]
            kept = {name: tensors[name].view(-1) for name in MOMENTS if name in tensors}
            if main.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr():
                kept[MAIN] = main.detach().view(-1)
            found[id(parameter)] = Owned(part, start, stop, kept, shared)
    return found


def optimizers(optimizer: Any | None) -> list[Any]:
    """Megatron's optimizers inside a chained one, without those that have nothing to do."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer] if optimizer else [])
    return [part for part in parts if not getattr(part, "is_stub_optimizer", False)]


State = tuple[Any, int, int, dict[str, Tensor]]  # parameter, start, stop, its state and `param`


def _split(part: Any) -> Iterator[State]:
    """Of Megatron's DistributedOptimizer, which deals parameters out over data-parallel ranks."""
    for parameter in part.model_param_group_index_map:
        at = part._get_model_param_range_map(parameter)["param"]
        yield parameter, at.start, at.end, part._get_main_param_and_optimizer_states(parameter)


def _whole(part: Any) -> Iterator[State]:
    """Of the others (`megatron.use_distributed_optimizer: false`)."""
    halves = getattr(part, "float16_groups", [])
    mains = getattr(part, "fp32_from_float16_groups", [])
    half_of = {
        id(main): parameter
        for ours, theirs in zip(halves, mains, strict=True)
        for parameter, main in zip(ours, theirs, strict=True)
    }
    for group in part.optimizer.param_groups:
        for main in group["params"]:
            parameter = half_of.get(id(main), main)
            yield parameter, 0, parameter.numel(), part.optimizer.state[main] | {"param": main}
