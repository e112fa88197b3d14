"""From what a model's last layer gives to numbers of response tokens.

In: the output rows of a micro-batch on this rank. Out: flat [r] tensors of whole responses, also
where context parallelism splits them; gradients flow through. Knows no losses.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from spmd_rl.config.schema import Config
from spmd_rl.trainer.data import Piece
from spmd_rl.trainer.logprob import log_probs_and_entropy
from spmd_rl.trainer.parallel import Groups


class LogProbs(NamedTuple):
    """Current log-probs and entropies of a piece's response tokens, [r], and their logits."""

    log_probs: Tensor
    entropy: Tensor
    logits: Tensor  # [rows, vocabulary / tp] of this rank, before any temperature


class PolicyHead:
    """From logits to log-probs and entropies: temperature, vocabulary shards, cp."""

    columns = 2  # of a `LogProbs`, those with an entry for each response token

    def __init__(self, cfg: Config, groups: Groups, vocab_size: int):
        sft = cfg.algo.loss_type == "sft_loss"
        self.temperature = 1.0 if sft else cfg.rollout.rollout_temperature
        self.chunk_size = cfg.train.log_probs_chunk_size
        self.vocab_size = vocab_size
        self.groups = groups

    def __call__(self, output: Tensor, piece: Piece) -> LogProbs:
        """[1, rows, vocabulary / tp] logits -> values of whole responses."""
        log_probs, entropy = log_probs_and_entropy(
            output[0],
            piece.micro_batch.targets,
            self.vocab_size,
            self.temperature,
            self.chunk_size,
            self.groups.tp,
        )
        log_probs = whole_responses(log_probs, piece, self.groups)
        entropy = whole_responses(entropy, piece, self.groups)
        return LogProbs(log_probs, entropy, output[0])


class Values(NamedTuple):
    """What the critic expects at each response token before it is drawn, [r]."""

    values: Tensor


class ValueHead:
    """From the value layer's output to values."""

    columns = 1

    def __init__(self, groups: Groups):
        self.groups = groups

    def __call__(self, output: Tensor, piece: Piece) -> Values:
        """[1, rows, 1] float32 -> values of whole responses."""
        return Values(whole_responses(output[0, :, 0], piece, self.groups))


def whole_responses(values: Tensor, piece: Piece, groups: Groups) -> Tensor:
    """[rows] of this rank -> [r] of the piece's responses, over context-parallel ranks."""
    if groups.cp_size == 1:
        return values
    return _Gather.apply(values, piece.slots, len(piece.rows), groups.cp)


class _Gather(torch.autograd.Function):
    """Values of all context-parallel ranks in order. Each rank computes the whole loss from them,
    so backward only takes this rank's share: parameters' gradients are added over the ranks.
    """

    @staticmethod
    def forward(ctx, values: Tensor, slots: Tensor, size: int, group) -> Tensor:
        ctx.save_for_backward(slots)
        whole = values.new_zeros(size).index_copy_(0, slots, values)
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (slots,) = ctx.saved_tensors
        return grads[0].index_select(0, slots), None, None, None
