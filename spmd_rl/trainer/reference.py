"""The reference model: weights kept on the host and swapped into the one model when they are
needed.

A second model on the device would cost its memory all the time; this costs two copies a rollout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Reference:
    """A copy of the chunks' parameters as they are now."""

    def __init__(self, chunks: list[Any]):
        self.parameters = [p for chunk in chunks for p in chunk.parameters()]
        self.weights = [_to_host(p) for p in self.parameters]

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model is the reference inside the context; afterwards it is bitwise what it was."""
        current = [_to_host(p) for p in self.parameters]
        _copy(self.weights, self.parameters)
        try:
            yield
        finally:
            _copy(current, self.parameters)


def _to_host(parameter: Tensor) -> Tensor:
    host = torch.empty_like(parameter, device="cpu", pin_memory=parameter.is_cuda)
    return host.copy_(parameter.detach())


@torch.no_grad()
def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source, non_blocking=True)
    if targets and targets[0].is_cuda:
        torch.cuda.synchronize()
