"""Log-probability of each target token and entropy of each row, from logits split over tensor-
parallel ranks.

Logits are divided by the temperature and accumulated in float32, `chunk_size` rows at a time, so
that float32 copies never exist for more than one chunk; backward recomputes the softmax from the
saved logits. Columns past `vocab_size` (padding of the embedding) take no part. Megatron's fused
cross entropy is not used: its backward casts to bf16.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CACHE_ROWS = 128  # rows at once on a CPU, where a chunk that stays in cache is fastest


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
        chunk_size = max(len(targets), 1)
    if logits.device.type == "cpu" and (group is None or group.size() == 1):
        chunk_size = min(chunk_size, CACHE_ROWS)
    return _LogProbEntropy.apply(logits, targets, vocab_size, temperature, chunk_size, group)


class _LogProbEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, vocab_size, temperature, chunk_size, group):
        shard = _Shard(logits, vocab_size, group)
        rows = len(targets)
        log_prob = torch.empty(rows, dtype=torch.float32, device=logits.device)
        entropy, log_sum = torch.empty_like(log_prob), torch.empty_like(log_prob)
        for start in range(0, rows, chunk_size):
            at = slice(start, start + chunk_size)
            log_prob[at], entropy[at], log_sum[at] = shard.forward(
                logits[at, : shard.columns], targets[at], temperature
            )
        ctx.save_for_backward(logits, targets, entropy, log_sum)
        ctx.shard, ctx.temperature, ctx.chunk_size = shard, temperature, chunk_size
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
        for start in range(0, len(targets), ctx.chunk_size):
            at = slice(start, start + ctx.chunk_size)
            grad[at, :columns] = shard.backward(
                logits[at, :columns],
                targets[at],
                log_sum[at],
                entropy[at],
                grad_log_prob[at],
                None if grad_entropy is None else grad_entropy[at],
                ctx.temperature,
            )
        return grad, None, None, None, None, None


class _Shard:
    """This rank's columns of the vocabulary."""

    def __init__(self, logits: Tensor, vocab_size: int, group: Any):
        self.group = group if group is not None and group.size() > 1 else None
        self.first = logits.size(1) * group.rank() if self.group is not None else 0
        self.columns = min(max(vocab_size - self.first, 0), logits.size(1))

    def forward(self, logits: Tensor, targets: Tensor, temperature: float):
        scaled = logits.float() if temperature == 1.0 else logits.float() * (1.0 / temperature)
        if self.columns:
            top = scaled.amax(-1)
        else:
            top = torch.full(targets.shape, float("-inf"), device=logits.device)
        if self.group is not None:
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=self.group)
        shifted = scaled - top.unsqueeze(1)
        target = self._pick(shifted, targets)
        weights = shifted.exp()
        sums = torch.stack([weights.sum(-1), (weights.mul_(shifted)).sum(-1), target])
        if self.group is not None:
            dist.all_reduce(sums, group=self.group)
        total, weighted, target = sums
        log_total = total.log()
        return target - log_total, log_total - weighted / total, top + log_total

    def backward(self, logits, targets, log_sum, entropy, grad_log_prob, grad_entropy, temperature):
        scaled = logits.float() if temperature == 1.0 else logits.float() * (1.0 / temperature)
        log_p = scaled - log_sum.unsqueeze(1)
        scale = 1.0 / temperature
        if grad_entropy is None:
            grad = log_p.exp_().mul_((-scale * grad_log_prob).unsqueeze(1))
        else:
            factor = log_p + entropy.unsqueeze(1)
            factor.mul_((-scale * grad_entropy).unsqueeze(1))
            factor.sub_((scale * grad_log_prob).unsqueeze(1))
            grad = log_p.exp_().mul_(factor)
        if self.columns:
            local, inside = self._local(targets)
            grad.scatter_add_(1, local.unsqueeze(1), (inside * scale * grad_log_prob).unsqueeze(1))
        return grad

    def _pick(self, values: Tensor, targets: Tensor) -> Tensor:
        if not self.columns:
            return torch.zeros(targets.shape, device=values.device)
        local, inside = self._local(targets)
        return values.gather(1, local.unsqueeze(1)).squeeze(1).masked_fill(~inside, 0.0)

    def _local(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        local = targets - self.first
        inside = (local >= 0) & (local < self.columns)
        return local.clamp(0, self.columns - 1), inside
