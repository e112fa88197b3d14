"""Cells against transformers: numbers of one cell from the files its ranks left."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.parity import reference
from tools.parity.measure import batch, joined


@functools.lru_cache(maxsize=4)
def expected(path: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, dict[str, Tensor]]:
    return reference.compute(path, batch(), dtype)


def cell(task: dict[str, Any], world: int, folder: Path) -> dict[str, Any]:
    """{logits, grads} of fp32 or {bf16, bf16 grads, other experts} of bf16, and which tensors came
    out otherwise than they went in.
    """
    files = [folder / f"{task['name']}.{rank}.pt" for rank in range(world)]
    parts = [torch.load(file, weights_only=False) for file in files]
    want, want_grads = expected(task["path"])
    logits = joined(parts, *want.shape)
    grads = parts[0]["gradients"]
    found: dict[str, Any] = {"differ": sorted({n for part in parts for n in part["differ"]})}
    if grads.keys() != want_grads.keys():
        odd = sorted(grads.keys() ^ want_grads.keys())
        return found | {"failed": f"gradients of other tensors than transformers': {odd[:3]}"}
    if task["dtype"] == "float32":
        return found | {
            "logits": largest([logits - want]) / largest([want]),
            "grads": max(  # each tensor's own largest; all of them for an expert without tokens
                largest([grads[name] - value]) / (largest([value]) or largest(want_grads.values()))
                for name, value in want_grads.items()
            ),
        }
    theirs, their_grads = expected(task["path"], torch.bfloat16)
    off, their_off = (logits - want).norm(dim=1), (theirs - want).norm(dim=1)
    turned = _turned(off) | _turned(their_off)
    if turned.any():
        found["other experts"] = [int(_turned(o).sum()) for o in (off, their_off)]
    found["bf16"] = norm([off[~turned]]) / norm([their_off[~turned]])
    if not turned.any():  # a token through other experts has another gradient
        mine = norm(grads[name] - value for name, value in want_grads.items())
        found["bf16 grads"] = mine / norm(their_grads[n] - v for n, v in want_grads.items())
    return found


def _turned(off: Tensor) -> Tensor:
    """Rows so far off that rounding must have chosen another expert for a token."""
    return off > 10 * off.median()


def largest(tensors: Any) -> float:
    """The largest number of all; NaN where one is."""
    return torch.stack([tensor.abs().max() for tensor in tensors]).max().item()


def norm(tensors: Any) -> float:
    return torch.stack([tensor.double().norm() for tensor in tensors]).norm().item()
