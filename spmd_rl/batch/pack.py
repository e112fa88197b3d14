"""A shard's micro-batches as packed tensors: sequences one after another in one row (Megatron's
`thd`), and index tensors that say which logits belong to which response token.

The logits of row p predict token p + 1, so a response token is read from the row before it. Under
context parallelism a rank holds chunks r and 2cp-1-r of each sequence (padded to 2cp chunks); the
targets are cut out before the split, so no rank needs a neighbour's token. Knows no process groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spmd_rl.algo.aggregate import token_weights
from spmd_rl.algo.segments import sample_ids
from spmd_rl.types import Shard


class MicroBatch(NamedTuple):
    """T tokens of this rank, R of their successors being response tokens, S samples."""

    tokens: Tensor  # [1, T] int64
    position_ids: Tensor  # [1, T] int64
    lengths: list[int]  # whole sequences as attention sees them: padded for cp, a dummy at the end
    cu_seqlens: Tensor  # [sequences + 1] int32, cumulative `lengths`
    logit_rows: Tensor  # [R] int64 rows whose logits predict the response tokens
    targets: Tensor  # [R] int64 the response tokens
    response_rows: Tensor  # [R] int64 their places in the shard's flat response arrays
    sample_ids: Tensor  # [R] int64 which of the micro-batch's samples (0..S-1)
    samples: list[int]  # [S] indices into the shard


class Packer:
    """The shard's flat arrays on a device, and micro-batches cut from them.

    `tp`: local tokens are a multiple of it (sequence parallelism) times `pad_multiple` (GPU
    kernels: 128); what is missing is a dummy sequence of zeros at the end, without response tokens.
    """

    def __init__(
        self,
        shard: Shard,
        *,
        device: torch.device | str = "cpu",
        tp: int = 1,
        cp: int = 1,
        cp_rank: int = 0,
        pad_multiple: int = 1,
    ):
        batch = shard.batch
        self.device = torch.device(device)
        self.multiple, self.cp, self.cp_rank = tp * pad_multiple, cp, cp_rank
        self.tokens = torch.from_numpy(batch.tokens).long()
        self.total_lengths = torch.from_numpy(batch.total_lengths).long()
        self.response_lengths = torch.from_numpy(batch.response_lengths).long()
        self.token_starts = self.total_lengths.cumsum(0) - self.total_lengths
        self.response_starts = self.response_lengths.cumsum(0) - self.response_lengths

    def pack(self, samples: list[int]) -> MicroBatch:
        """The micro-batch of these samples of the shard; of none: a dummy sequence alone."""
        lengths = self._padded_lengths(samples)
        ends = torch.tensor(lengths).cumsum(0)
        starts = ends - torch.tensor(lengths)
        positions = torch.arange(int(ends[-1])) - starts.repeat_interleave(torch.tensor(lengths))

        chosen = torch.tensor(samples, dtype=torch.int64)
        starts, totals = starts[: len(samples)], self.total_lengths[chosen]
        row = self._row(samples, lengths, self.tokens, 0)

        sizes = self.response_lengths[chosen]
        logit_rows = _ranges(starts + totals - sizes - 1, sizes)
        response_rows = _ranges(self.response_starts[chosen], sizes)
        targets, of = row[logit_rows + 1], sample_ids(sizes)
        if self.cp > 1:
            mine = zigzag(lengths, self.cp, self.cp_rank)
            local = torch.full_like(row, -1)
            local[mine] = torch.arange(len(mine))
            row, positions, logit_rows = row[mine], positions[mine], local[logit_rows]
            held = logit_rows >= 0
            logit_rows, response_rows = logit_rows[held], response_rows[held]
            targets, of = targets[held], of[held]
        tensors = {
            "tokens": row[None],
            "position_ids": positions[None],
            "cu_seqlens": torch.cat([ends.new_zeros(1), ends]).int(),
            "logit_rows": logit_rows,
            "targets": targets,
            "response_rows": response_rows,
            "sample_ids": of,
        }
        tensors = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        return MicroBatch(lengths=lengths, samples=list(samples), **tensors)

    def places(self, samples: list[int]) -> Tensor:
        """[T] int64 places of the micro-batch's tokens in the shard's flat ones; -1: padding."""
        lengths = self._padded_lengths(samples)
        row = self._row(samples, lengths, torch.arange(len(self.tokens)), -1)
        if self.cp > 1:
            row = row[zigzag(lengths, self.cp, self.cp_rank)]
        return row.to(self.device)

    def _row(self, samples: list[int], lengths: list[int], values: Tensor, empty: int) -> Tensor:
        """[all tokens] `values` of the shard's tokens, as the packed row has them unsplit."""
        padded = torch.tensor(lengths)
        chosen = torch.tensor(samples, dtype=torch.int64)
        starts, totals = (padded.cumsum(0) - padded)[: len(samples)], self.total_lengths[chosen]
        row = torch.full((sum(lengths),), empty, dtype=torch.int64)
        row[_ranges(starts, totals)] = values[_ranges(self.token_starts[chosen], totals)]
        return row

    def _padded_lengths(self, samples: list[int]) -> list[int]:
        """Each sequence padded to 2cp chunks; the row to `multiple` tokens on every cp rank."""
        chunks = 2 * self.cp if self.cp > 1 else 1
        lengths = [-(-n // chunks) * chunks for n in self.total_lengths[samples].tolist()]
        step = self.multiple * self.cp
        if step % chunks:
            step *= 2
        missing = -sum(lengths) % step
        if not samples:
            missing = max(step, chunks)
        return [*lengths, missing] if missing else lengths


def zigzag(lengths: list[int], cp: int, cp_rank: int) -> Tensor:
    """Which tokens of the packed row a cp rank holds: chunks r and 2cp-1-r of each sequence."""
    pieces, start = [], 0
    for length in lengths:
        chunk = length // (2 * cp)
        for piece in (cp_rank, 2 * cp - 1 - cp_rank):
            pieces.append(torch.arange(start + piece * chunk, start + (piece + 1) * chunk))
        start += length
    return torch.cat(pieces)


def shard_weights(shard: Shard, per_token: bool) -> Tensor:
    """[R] float32 weight of each response token of the shard in its step's loss.

    The step's loss is the sum of weight * token loss over all ranks: see `algo.aggregate`.
    """
    count = len(shard.batch)
    num_rollouts, num_tokens = torch.ones(2, count, dtype=torch.int64)
    for step, bins in enumerate(shard.steps):
        members = [i for samples in bins for i in samples]
        num_rollouts[members] = shard.num_rollouts[step]
        num_tokens[members] = shard.num_tokens[step]
    return token_weights(
        torch.from_numpy(shard.batch.loss_mask),
        sample_ids(torch.from_numpy(shard.batch.response_lengths).long()),
        torch.from_numpy(shard.mask_totals),
        num_rollouts,
        num_tokens,
        per_token,
    )


def _ranges(starts: Tensor, sizes: Tensor) -> Tensor:
    """[sum of sizes] start, start + 1, ... of each range, one after another."""
    first = (sizes.cumsum(0) - sizes - starts).repeat_interleave(sizes)
    return torch.arange(len(first)) - first
