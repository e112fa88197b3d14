"""The model's weights as Hugging Face tensors, streamed: whole tensors in one order, seen by every
train rank.

Collective over all train ranks: tensor-parallel and expert-parallel parts are gathered, pipeline
stages broadcast theirs. At most one parameter (of each expert rank) is whole at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from spmd_rl.trainer.parallel import Groups
from spmd_rl.weights.names import NameMap, global_name


class Parameter(NamedTuple):
    """One parameter of this rank under its global name."""

    name: str
    value: torch.nn.Parameter


class Whole(NamedTuple):
    """What another pipeline stage must know of a tensor to receive it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str


def named_parameters(chunks: list[Any]) -> list[Parameter]:
    """This rank's parameters, layers counted over all stages and experts over all expert ranks."""
    return [
        Parameter(global_name(name, *offsets), parameter)
        for chunk, offsets in _with_offsets(chunks)
        for name, parameter in chunk.named_parameters()
    ]


def named_tensors(chunks: list[Any]) -> list[tuple[str, Tensor]]:
    """All that a checkpoint holds of this rank: parameters and the routers' biases."""
    biases = [
        (global_name(name, *offsets), buffer)
        for chunk, offsets in _with_offsets(chunks)
        for name, buffer in chunk.named_buffers()
        if name.endswith(".router.expert_bias")
    ]
    return [*named_parameters(chunks), *biases]


def _with_offsets(chunks: list[Any]) -> Iterator[tuple[Any, tuple[int, int]]]:
    """Each chunk with the numbers of its first layer and first expert."""
    for chunk in chunks:
        layers = chunk.decoder.layers
        first = layers[0].layer_number - 1 if len(layers) else 0
        experts = [getattr(layer.mlp, "local_expert_indices", None) for layer in layers]
        yield chunk, (first, next((indices[0] for indices in experts if indices), 0))


@torch.no_grad()
def hf_tensors(
    chunks: list[Any],
    names: NameMap,
    groups: Groups,
    of: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """(HF name, whole tensor) of all weights, or of what `of` makes of each parameter (its
    gradient).
    """
    mine = named_tensors(chunks) if of is None else named_parameters(chunks)
    read = of or (lambda parameter: parameter.detach())
    mine = [(name, value) for name, value in mine if not names.tied_copy(name)]
    stream = _wholes([(name, read(value)) for name, value in mine], names, groups)
    if groups.pp_size > 1:
        about = [
            about for name, value in mine for about in _about(name, read(value), names, groups)
        ]
        stream = _over_stages(stream, about, groups)
    for name, whole in stream:
        yield from names.to_hf(name, whole)
        del whole  # before the next is gathered


def _wholes(
    mine: list[tuple[str, Tensor]], names: NameMap, groups: Groups
) -> Iterator[tuple[str, Tensor]]:
    """Parameter after parameter; none is held here while the next is gathered."""
    for name, part in mine:
        yield from _gather(name, part, names, groups)


def _over_stages(
    stream: Iterator[tuple[str, Tensor]], mine: list[Whole], groups: Groups
) -> Iterator[tuple[str, Tensor]]:
    """Stage after stage; the owner of each tensor broadcasts it."""
    listed: list[list[Whole]] = [[] for _ in range(groups.pp_size)]
    dist.all_gather_object(listed, mine, group=groups.pp)
    ranks = dist.get_process_group_ranks(groups.pp)
    for stage, wholes in enumerate(listed):
        for about in wholes:
            if stage == groups.pp_rank:
                tensor = next(stream)[1].contiguous()
            else:
                tensor = torch.empty(about.shape, dtype=about.dtype, device=about.device)
            dist.broadcast(tensor, src=ranks[stage], group=groups.pp)
            yield about.name, tensor


def _gather(
    name: str, part: Tensor, names: NameMap, groups: Groups
) -> Iterator[tuple[str, Tensor]]:
    """The whole tensor; of an expert, also those that the other expert ranks hold in its place."""
    expert = names.entry(name).expert
    group, _, size = groups.tensor_parallel(expert)
    if size > 1 and names.sources(name).kind != "whole":
        parts = [torch.empty_like(part) for _ in range(size)]
        dist.all_gather(parts, part.contiguous(), group=group)
        part = names.join(name, parts)
        parts.clear()
    wholes = [part]
    if expert and groups.ep_size > 1:
        wholes = [torch.empty_like(part) for _ in range(groups.ep_size)]
        dist.all_gather(wholes, part.contiguous(), group=groups.ep)
    yield from zip(_peers(name, names, groups), wholes, strict=True)


def _peers(name: str, names: NameMap, groups: Groups) -> list[str]:
    """The names under which the expert ranks hold this parameter."""
    if not names.entry(name).expert or groups.ep_size == 1:
        return [name]
    each = names.experts // groups.ep_size
    return [global_name(name, 0, (rank - groups.ep_rank) * each) for rank in range(groups.ep_size)]


def _about(name: str, part: Tensor, names: NameMap, groups: Groups) -> Iterator[Whole]:
    size = groups.tensor_parallel(names.entry(name).expert)[2]
    shape = list(part.shape)
    if size > 1 and names.sources(name).kind != "whole":
        shape[1 if names.sources(name).kind == "columns" else 0] *= size
    for peer in _peers(name, names, groups):
        yield Whole(peer, tuple(shape), part.dtype, part.device.type)
