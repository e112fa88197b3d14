"""Dr.GRPO's aggregation: the sum of a sample's token losses over one constant, so that long answers
are not favoured. Source: 2503.20783.

With `disable_grpo_std_normalization: true` this makes GRPO Dr.GRPO:
`custom_pg_loss_reducer_function_path: spmd_rl.algo.dr_grpo.reducer`. It is also the example of
what such a function looks like.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def reducer(
    total_lengths: list[int],
    response_lengths: list[int],
    loss_masks: list[Tensor],
    calculate_per_token_loss: bool,
    args: Any,
) -> Callable[[Tensor], Tensor]:
    """[R] token losses of a micro-batch -> the sum over its samples of sum / constant; the constant
    is `rollout.rollout_max_response_len`.
    """
    mask = torch.cat(loss_masks)

    def reduce(token_losses: Tensor) -> Tensor:
        return (mask * token_losses).sum() / args.rollout_max_response_len

    return reduce
