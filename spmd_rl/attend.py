"""Attention over short sequences in plain torch: the same bits in the trainer and in a CPU engine.

torch's fused CPU kernel approximates exp, and its result depends on how queries are grouped: the
two sides' log-probs of one token then differ by up to 3e-5. Plain matrix products depend neither on
the number of rows (from 4 on) nor on masked padding (from 16 keys on). At this length they cost no
more.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHORT = 128  # keys; beyond, the fused kernel is quicker, and sums are split in another way
ROWS = 4  # fewer rows take another path through the matrix product


def suits(x: Tensor, keys: int) -> bool:
    """Whether a call over `keys` keys is for `attend`; else for scaled_dot_product_attention."""
    return keys <= SHORT and x.device.type == "cpu" and x.dtype == torch.float32


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """query [B, heads, Q, D], key and value [B, groups, K, D] -> [B, heads, Q, D].

    `mask` is added to the scores: [1 or B, 1, 1 or Q, K].
    """
    batch, heads, queries, _ = query.shape
    groups = key.size(1)
    # Heads that share keys are that many more queries; too few of them are computed repeatedly.
    rows = heads // groups * queries
    copies = -(-ROWS // rows)
    folded = (query * scale).reshape(batch, groups, rows, -1)
    if copies > 1:
        folded = folded.repeat(1, 1, copies, 1)
    if mask.size(-2) > 1:
        mask = mask.repeat(1, 1, heads // groups * copies, 1)
    scores = torch.matmul(folded, key.transpose(-1, -2)).add_(mask)
    result = torch.matmul(torch.softmax(scores, -1), value)
    return result[:, :, :rows].reshape(batch, heads, queries, -1)
