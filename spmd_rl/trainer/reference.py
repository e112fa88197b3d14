"""Other weights than those that learn: kept on the host and swapped into the one model when
needed.

`Reference` is the model that KL terms compare with, `Pushed` what the engines were given last. A
second model on the device would cost its memory all the time; this costs two copies a rollout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from spmd_rl.trainer.parallel import Groups

KEPT = 2  # pushes: samples of the one before the last may still be on their way


class Reference:
    """A copy of the chunks' parameters as they are now."""

    def __init__(self, chunks: list[Any]):
        self.parameters = [p for chunk in chunks for p in chunk.parameters()]
        self.weights = [_to_host(p) for p in self.parameters]

    def take(self) -> None:
        """Become what the model is now."""
        with torch.no_grad():
            for kept, parameter in zip(self.weights, self.parameters, strict=True):
                kept.copy_(parameter)

    def put_back(self) -> None:
        """The model becomes this one."""
        _copy(self.weights, self.parameters)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model is this one inside the context; afterwards it is bitwise what it was."""
        current = [_to_host(p) for p in self.parameters]
        self.put_back()
        try:
            yield
        finally:
            _copy(current, self.parameters)


class Pushed:
    """The weights of the last two pushes, by version."""

    def __init__(self, chunks: list[Any]):
        self.chunks = chunks
        self.versions: dict[int, Reference] = {}

    def keep(self, version: int) -> None:
        if len(self.versions) < KEPT:
            self.versions[version] = Reference(self.chunks)
        else:
            kept = self.versions.pop(min(self.versions))
            kept.take()
            self.versions[version] = kept

    @contextlib.contextmanager
    def swapped_in(self, versions: np.ndarray | None, groups: Groups) -> Iterator[None]:
        """The weights that sampled most tokens, whose versions [R] are given, on all ranks; the
        oldest kept where older ones did. Collective over data-parallel ranks.
        """
        if versions is None or not self.versions:
            yield
            return
        known = sorted(self.versions)
        found = np.clip(np.searchsorted(known, versions, side="right") - 1, 0, None)
        counts = torch.from_numpy(np.bincount(found, minlength=len(known)))
        dist.all_reduce(counts, group=groups.dp)
        with self.versions[known[int(counts.argmax())]].swapped_in():
            yield


def _to_host(parameter: Tensor) -> Tensor:
    host = torch.empty_like(parameter, device="cpu", pin_memory=parameter.is_cuda)
    return host.copy_(parameter.detach())


@torch.no_grad()
def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source, non_blocking=True)
    if targets and targets[0].is_cuda:
        torch.cuda.synchronize()
