"""The model's weights as Hugging Face tensors, streamed: whole tensors in one order, seen by every
train rank.

Collective over all train ranks: tensor-parallel parts are gathered, pipeline stages broadcast
theirs. At most one parameter is whole at a time.
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


def named_parameters(chunks: list[Any]) -> list[Parameter]:
    """This rank's parameters, layers counted over all pipeline stages."""
    found = []
    for chunk in chunks:
        layers = chunk.decoder.layers
        offset = layers[0].layer_number - 1 if len(layers) else 0
        for name, parameter in chunk.named_parameters():
            found.append(Parameter(global_name(name, offset), parameter))
    return found


@torch.no_grad()
def hf_tensors(
    chunks: list[Any],
    names: NameMap,
    groups: Groups,
    of: Callable[[Tensor], Tensor] = lambda parameter: parameter.detach(),
) -> Iterator[tuple[str, Tensor]]:
    """(HF name, whole tensor) of every parameter, or of what `of` makes of each (its gradient)."""
    for name, whole in _whole_tensors(chunks, names, groups, of):
        yield from names.to_hf(name, whole)


def _whole_tensors(
    chunks: list[Any], names: NameMap, groups: Groups, of: Callable[[Tensor], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    mine = [p for p in named_parameters(chunks) if not names.tied_copy(p.name)]
    if groups.pp_size == 1:
        for name, parameter in mine:
            yield name, _gather(name, of(parameter), names, groups)
        return
    yield from _over_stages(mine, names, groups, of)


def _over_stages(
    mine: list[Parameter], names: NameMap, groups: Groups, of: Callable[[Tensor], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Stage after stage; the owner of each tensor broadcasts it."""
    values = {p.name: p.value for p in mine}
    listed: list[list[str]] = [[] for _ in range(groups.pp_size)]
    dist.all_gather_object(listed, list(values), group=groups.pp)
    ranks = dist.get_process_group_ranks(groups.pp)
    for stage, stage_names in enumerate(listed):
        for name in stage_names:
            whole = None
            if stage == groups.pp_rank:
                whole = _gather(name, of(values[name]), names, groups).contiguous()
            about = [None if whole is None else (whole.shape, whole.dtype, whole.device.type)]
            dist.broadcast_object_list(about, src=ranks[stage], group=groups.pp)
            assert about[0] is not None
            shape, dtype, device = about[0]
            if whole is None:
                whole = torch.empty(shape, dtype=dtype, device=device)
            dist.broadcast(whole, src=ranks[stage], group=groups.pp)
            yield name, whole


def _gather(name: str, part: Tensor, names: NameMap, groups: Groups) -> Tensor:
    if groups.tp_size == 1 or names.sources(name).kind == "whole":
        return part
    parts = [torch.empty_like(part) for _ in range(groups.tp_size)]
    dist.all_gather(parts, part.contiguous(), group=groups.tp)
    return names.join(name, parts)
