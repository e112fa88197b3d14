"""What every layer needs to know of a packed micro-batch, computed once for all layers.

Sequences of different length lie one after another in one row of tokens (`thd`). `Packing` is
Megatron's PackedSeqParams (Transformer Engine reads those fields) plus token positions, rotary
tables, and the buckets in which the plain-torch attention runs. Knows nothing of losses or samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from spmd_rl.batch.pack import zigzag

LONG = 256  # a sequence this long is worth an attention call of its own
MAX_PADDING = 1.125  # rows a bucket of short sequences may have, relative to its tokens


class Bucket(NamedTuple):
    """Sequences attended in one call: `count` rows of `length` tokens."""

    count: int
    length: int
    rows: Tensor | None  # [count x length] token indices (a short row repeats its last); None: all


@dataclass
class Packing(PackedSeqParams):
    """One micro-batch's sequences. `lengths` are those before any split over cp ranks."""

    lengths: tuple[int, ...] = ()
    positions: Tensor | None = None  # [t] of this rank's tokens
    cp_size: int = 1
    cp_rank: int = 0
    places: Tensor | None = None  # [t] of this rank's tokens in the shard; -1: padding
    cache: dict[Any, Any] = field(default_factory=dict)  # rotary tables, buckets, experts

    def rotary(self, inv_freq: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [t, 1, rotary dimensions / 2] of this rank's tokens, typed as `like`."""
        if "rotary" not in self.cache:
            assert self.positions is not None
            angles = torch.outer(torch.arange(max(self.lengths)).float(), inv_freq)
            self.cache["rotary"] = [
                table.to(like).index_select(0, self.positions).unsqueeze(1)
                for table in (angles.cos(), angles.sin())
            ]
        cos, sin = self.cache["rotary"]
        return cos, sin

    def buckets(self, device: torch.device) -> tuple[list[Bucket], Tensor | None]:
        """Attention calls covering every token once, and the order that undoes their sorting."""
        if "buckets" not in self.cache:
            self.cache["buckets"] = _buckets(self.lengths, device)
        return self.cache["buckets"]

    def causal(self, length: int) -> Tensor:
        """[1, 1, length, length] to add to scores: no query sees a later key."""
        if ("causal", length) not in self.cache:
            mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
            self.cache["causal", length] = mask
        return self.cache["causal", length]

    def visible(self, device: torch.device) -> Tensor:
        """[t, t x cp] which keys, gathered over cp ranks, each of this rank's queries sees."""
        if "visible" not in self.cache:
            lengths, cp_size = list(self.lengths), self.cp_size
            rows = [zigzag(lengths, cp_size, rank).to(device) for rank in range(cp_size)]
            starts = torch.tensor(self.lengths, device=device).cumsum(0)
            keys = torch.cat(rows)
            queries = rows[self.cp_rank]
            same = torch.bucketize(queries, starts, right=True)[:, None] == torch.bucketize(
                keys, starts, right=True
            )
            self.cache["visible"] = same & (queries[:, None] >= keys)
        return self.cache["visible"]


def packing(
    lengths: list[int], positions: Tensor, ends: Tensor, cp_size: int = 1, cp_rank: int = 0
) -> Packing:
    """The packing of whole sequences of these lengths (multiples of 2 x cp_size when cp_size > 1).

    `positions` [t] are those of this rank's tokens, `ends` [sequences + 1] int32 cumulative
    lengths.
    """
    longest = max(lengths)
    return Packing(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        cu_seqlens_q_padded=ends,
        cu_seqlens_kv_padded=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=tuple(lengths),
        positions=positions,
        cp_size=cp_size,
        cp_rank=cp_rank,
    )


def _buckets(lengths: tuple[int, ...], device: torch.device) -> tuple[list[Bucket], Tensor | None]:
    """Long sequences alone; short ones with others of about their length."""
    if len(set(lengths)) == 1:
        return [Bucket(len(lengths), lengths[0], None)], None
    starts = torch.tensor((0, *lengths)).cumsum(0).tolist()
    buckets, undo, done = [], torch.empty(starts[-1], dtype=torch.int64), 0
    for members in _group_lengths(lengths):
        longest = lengths[members[0]]
        first = torch.tensor([starts[i] for i in members])
        size = torch.tensor([lengths[i] for i in members])
        offset = torch.arange(longest)
        inside = offset < size[:, None]
        rows = first[:, None] + torch.minimum(offset, size[:, None] - 1)
        slots = torch.arange(done, done + rows.numel()).view_as(rows)
        undo[rows[inside]] = slots[inside]
        done += rows.numel()
        buckets.append(Bucket(len(members), longest, rows.view(-1).to(device)))
    return buckets, undo.to(device)


def _group_lengths(lengths: tuple[int, ...]) -> list[list[int]]:
    """Indices, longest sequence first, cut where padding to the longest would waste too much."""
    groups: list[list[int]] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[groups[-1][0]] if groups else 0
        fits = groups and longest < LONG
        if fits and longest * (len(groups[-1]) + 1) <= MAX_PADDING * (tokens + lengths[i]):
            groups[-1].append(i)
            tokens += lengths[i]
        else:
            groups.append([i])
            tokens = lengths[i]
    return groups
