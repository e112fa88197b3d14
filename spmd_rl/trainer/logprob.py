"""Log-probability of each target token and entropy of each row, from logits split over tensor-
parallel ranks.

Logits are divided by the temperature and accumulated in float32. All work happens in two float32
buffers that together are `chunk_size` rows of this rank's vocabulary, forward and backward:
backward recomputes the softmax from the saved logits, so nothing else of their size exists but
their gradient. Columns past `vocab_size` (padding of the embedding) take no part. Megatron's fused
cross entropy is not used: its backward casts to bf16.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CACHE_ROWS = 256  # rows at once on a CPU, where a chunk that stays in cache is fastest
CHUNK_BYTES = 256 * 1024**2  # of the buffers, where `chunk_size` leaves it open


def log_probs_and_entropy(
    logits: Tensor,
    targets: Tensor,
    vocab_size: int,
    temperature: float = 1.0,
    chunk_size: int = -1,
    group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Logits [rows, vocabulary / tp], targets [rows] -> float32 log-probs and entropies [rows]."""
    if chunk_size < 1:
        chunk_size = max(CHUNK_BYTES // (4 * max(logits.size(1), 1)), 2)
    if logits.device.type == "cpu" and (group is None or group.size() == 1):
        chunk_size = min(chunk_size, CACHE_ROWS)
    return _LogProbEntropy.apply(logits, targets, vocab_size, temperature, chunk_size, group)


class _LogProbEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, vocab_size, temperature, chunk_size, group):
        shard = _Shard(logits, vocab_size, group, temperature, chunk_size)
        log_prob = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
        entropy, log_sum = torch.empty_like(log_prob), torch.empty_like(log_prob)
        space = shard.space(logits)
        for at in shard.blocks(len(targets)):
            values = shard.forward(logits[at, : shard.columns], targets[at], space)
            log_prob[at], entropy[at], log_sum[at] = values
        ctx.save_for_backward(logits, targets, entropy, log_sum)
        ctx.shard = shard
        ctx.set_materialize_grads(False)
        return log_prob, entropy

    @staticmethod
    def backward(ctx, grad_log_prob, grad_entropy):
        logits, targets, entropy, log_sum = ctx.saved_tensors
        shard, columns = ctx.shard, ctx.shard.columns
        grad = torch.empty_like(logits)
        grad[:, columns:] = 0
        if grad_log_prob is None:
            grad_log_prob = torch.zeros_like(log_sum)
        space = shard.space(logits)
        for at in shard.blocks(len(targets)):
            grad[at, :columns] = shard.backward(
                logits[at, :columns],
                targets[at],
                log_sum[at],
                entropy[at],
                grad_log_prob[at],
                None if grad_entropy is None else grad_entropy[at],
                space,
            )
        return grad, None, None, None, None, None


class _Shard:
    """This rank's columns of the vocabulary, and how many rows are handled at once."""

    def __init__(
        self, logits: Tensor, vocab_size: int, group: Any, temperature: float, chunk_size: int
    ):
        self.group = group if group is not None and group.size() > 1 else None
        self.first = logits.size(1) * group.rank() if self.group is not None else 0
        self.columns = min(max(vocab_size - self.first, 0), logits.size(1))
        self.scale = 1.0 / temperature
        self.rows = max(min(chunk_size, 2 * len(logits)) // 2, 1)

    def space(self, logits: Tensor) -> Tensor:
        """[2, rows, columns] float32, used for every block in turn."""
        size = (2, self.rows, self.columns)
        return torch.empty(size, dtype=torch.float32, device=logits.device)

    def blocks(self, rows: int) -> list[slice]:
        return [slice(start, start + self.rows) for start in range(0, rows, self.rows)]

    def forward(self, logits: Tensor, targets: Tensor, space: Tensor):
        values, weights = self._scaled(logits, space[0]), space[1, : len(logits)]
        if self.columns:
            top = values.amax(-1)
        else:
            top = torch.full(targets.shape, float("-inf"), device=logits.device)
        if self.group is not None:
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=self.group)
        values.sub_(top.unsqueeze(1))
        target = self._pick(values, targets)
        torch.exp(values, out=weights)
        sums = torch.stack([weights.sum(-1), weights.mul_(values).sum(-1), target])
        if self.group is not None:
            dist.all_reduce(sums, group=self.group)
        total, weighted, target = sums
        log_total = total.log()
        return target - log_total, log_total - weighted / total, top + log_total

    def backward(self, logits, targets, log_sum, entropy, grad_log_prob, grad_entropy, space):
        log_p = self._scaled(logits, space[0]).sub_(log_sum.unsqueeze(1))
        slope = (self.scale * grad_log_prob).unsqueeze(1)
        if grad_entropy is None:
            grad = log_p.exp_().mul_(-slope)
        else:
            p = torch.exp(log_p, out=space[1, : len(logits)])
            of_entropy = (-self.scale * grad_entropy).unsqueeze(1)
            grad = log_p.add_(entropy.unsqueeze(1)).mul_(of_entropy).sub_(slope).mul_(p)
        if self.columns:
            local, inside = self._local(targets)
            grad.scatter_add_(1, local.unsqueeze(1), inside.unsqueeze(1) * slope)
        return grad

    def _scaled(self, logits: Tensor, buffer: Tensor) -> Tensor:
        values = buffer[: len(logits)].copy_(logits)
        return values if self.scale == 1.0 else values.mul_(self.scale)

    def _pick(self, values: Tensor, targets: Tensor) -> Tensor:
        if not self.columns:
            return torch.zeros(targets.shape, device=values.device)
        local, inside = self._local(targets)
        return values.gather(1, local.unsqueeze(1)).squeeze(1).masked_fill(~inside, 0.0)

    def _local(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        local = targets - self.first
        inside = (local >= 0) & (local < self.columns)
        return local.clamp(0, self.columns - 1), inside
