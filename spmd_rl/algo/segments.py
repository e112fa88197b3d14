"""Ragged rows in one flat array: sums, broadcasts and backward recurrences within each sample.

`lengths` [n] are the response lengths in order, `sample_ids` [R] the sample each token belongs to.
Works for zero-length samples and for an empty batch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sample_ids(lengths: Tensor) -> Tensor:
    """[n] lengths -> [R] int64 index of the sample each token belongs to."""
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)


def segment_sum(values: Tensor, ids: Tensor, count: int) -> Tensor:
    """[R] values -> [count] sums over the tokens of each sample; differentiable."""
    return values.new_zeros(count).index_add(0, ids, values)


def segment_mean(values: Tensor, mask: Tensor, ids: Tensor, count: int) -> Tensor:
    """[R] values -> [count] means over mask=1 tokens; 0 where a sample has none."""
    mask = mask.to(values.dtype)
    return segment_sum(values * mask, ids, count) / segment_sum(mask, ids, count).clamp_min(1)


def last_unmasked(mask: Tensor, ids: Tensor, count: int) -> Tensor:
    """[R] mask -> [count] flat position of each sample's last mask=1 token, or -1."""
    positions = torch.arange(len(ids), device=ids.device).masked_fill(mask == 0, -1)
    last = torch.full((count,), -1, dtype=torch.int64, device=ids.device)
    return last.scatter_reduce(0, ids, positions, "amax")


def discounted_suffix_sum(values: Tensor, lengths: Tensor, decay: float) -> Tensor:
    """y_t = v_t + decay * y_{t+1} within each sample, for all samples at once.

    Doubles the window each pass (1, 2, 4, ... tokens), so log2(longest) passes over the flat array
    do what a loop over tokens would; no padding to a common length exists that could change the
    result.
    """
    if not len(values):
        return values.clone()
    ids = sample_ids(lengths)
    left = lengths.cumsum(0)[ids] - torch.arange(len(ids), device=ids.device)  # tokens to the end
    total, window = values, 1
    while window < int(lengths.max()):
        reached = torch.where(left[:-window] > window, total[window:], 0) * decay**window
        total = torch.cat([total[:-window] + reached, total[-window:]])
        window *= 2
    return total
