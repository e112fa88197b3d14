"""Attention for CPU engines: a whole batch in a few padded SDPA calls.

SGLang's `torch_native` backend loops over the requests in Python. This one, registered through
SGLang's own hooks (see cpu_sglang.py), groups rows of similar size, so that padding stays
bounded, and reads cached prefixes from the paged KV cache as torch_native does. Sliding windows
and cross attention are left to torch_native.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from spmd_rl.attend import ROWS, SHORT, suits
from spmd_rl.attend import attend as attend_short

NAME = "torch_batched"
WASTE = 1.4  # padded work of a group at most this multiple of its real work ...
SMALL = 8  # ... unless it has fewer rows than this: a call costs more than the padding
LIMIT = 2**22  # query x key cells of a group, which bounds its mask and its gathered keys


class Row(NamedTuple):
    """A run of queries of one request: query i of it may see keys up to `keys - queries + i`."""

    request: int
    start: int  # of its queries in the flat query tensor
    queries: int
    keys: int


class Group(NamedTuple):
    """Rows computed by one call: B rows padded to Q queries and K keys."""

    source: torch.Tensor  # [B, Q] flat query positions; padding repeats a real one
    live: torch.Tensor | None  # [B, Q] bool, None when nothing is padded
    slots: torch.Tensor  # [B * K] positions in the KV cache
    mask: torch.Tensor  # [B, 1, Q, K] added to the scores


def rows_of(queries: Sequence[int], prefixes: Sequence[int]) -> list[Row]:
    """One row a request; a long request is cut so that no row exceeds LIMIT."""
    rows, start = [], 0
    for request, (count, prefix) in enumerate(zip(queries, prefixes, strict=True)):
        step = max(1, min(count, LIMIT // max(1, prefix + count)))
        for first in range(0, count, step):
            size = min(step, count - first)
            rows.append(Row(request, start + first, size, prefix + first + size))
        start += count
    return rows


def group_rows(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of similar shape together: bounded waste, bounded cells. Short rows keep to themselves:
    they are computed in another way, and a row's bits must not depend on its company.
    """
    short = [row for row in rows if row.keys <= SHORT]
    long = [row for row in rows if row.keys > SHORT]
    return [*_grouped(short), *_grouped(long)]


def _grouped(rows: Sequence[Row]) -> list[list[Row]]:
    groups: list[list[Row]] = []
    current: list[Row] = []
    work = widest = longest = 0
    for row in sorted(rows, key=lambda row: (row.queries, row.keys)):
        wide, long = max(widest, row.queries), max(longest, row.keys)
        cells = wide * long * (len(current) + 1)
        wasteful = len(current) >= SMALL and cells > WASTE * (work + row.queries * row.keys)
        if current and (wasteful or cells > LIMIT):
            groups.append(current)
            current, work, wide, long = [], 0, row.queries, row.keys
        current.append(row)
        work, widest, longest = work + row.queries * row.keys, wide, long
    return [*groups, current] if current else groups


def padded_length(keys: int) -> int:
    """Keys of a call: a length from which on more padding changes no bit of a result.

    SDPA on CPU takes 512 keys at a time; matrix products sum 192 terms at a time, but halve what
    lies between 192 and 384; vectors hold 16 floats.
    """
    blocks, rest = divmod(keys, 512)
    rest = 384 if 192 < rest < 384 else -(-rest // 16) * 16
    return blocks * 512 + rest


def build_group(rows: Sequence[Row], table: torch.Tensor, pool: torch.Tensor) -> Group:
    """Index tensors of a group. `table` [requests, positions] and `pool` [requests] are
    SGLang's page table.
    """
    width, length = max(r.queries for r in rows), padded_length(max(r.keys for r in rows))
    if width > 1:  # a single one is padded with the heads that share its keys
        width = -(-width // ROWS) * ROWS
    queries = torch.tensor([r.queries for r in rows])[:, None]
    keys = torch.tensor([r.keys for r in rows])[:, None]
    starts = torch.tensor([r.start for r in rows])[:, None]
    nth_query, nth_key = torch.arange(width)[None], torch.arange(length)[None]
    # Padding reads a real key and is masked: an unwritten cache slot could hold a NaN.
    requests = pool[torch.tensor([r.request for r in rows])]
    slots = table[requests[:, None], torch.minimum(nth_key, keys - 1)]
    visible = (
        nth_key[:, None] <= (keys - queries + torch.minimum(nth_query, queries - 1))[..., None]
    )
    mask = torch.zeros(visible.shape).masked_fill_(~visible, float("-inf"))[:, None]
    padded = bool((queries != width).any())
    return Group(
        source=starts + torch.minimum(nth_query, queries - 1),
        live=nth_query < queries if padded else None,
        slots=slots.reshape(-1),
        mask=mask,
    )


def attend(
    group: Group,
    query: torch.Tensor,
    output: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    scaling: float | None,
) -> None:
    """One padded call; writes the rows' results into `output` [tokens, heads, width]."""
    batch, width = group.source.shape
    heads = key_cache.shape[1]
    repeat = query.shape[1] // heads
    keys = key_cache.index_select(0, group.slots).view(batch, -1, *key_cache.shape[1:])
    values = value_cache.index_select(0, group.slots).view(batch, -1, *value_cache.shape[1:])
    keys, values = keys.transpose(1, 2).to(query.dtype), values.transpose(1, 2).to(query.dtype)
    picked = query[group.source]  # [B, Q, heads * repeat, width]
    if suits(query, keys.size(2)):
        scale = scaling or query.size(-1) ** -0.5
        result = attend_short(picked.transpose(1, 2), keys, values, group.mask, scale)
        _write(group, result.transpose(1, 2), output)
        return
    if width == 1:  # decode: the heads that share keys are that many queries of one head
        picked = pad(picked.view(batch, heads, repeat, -1), (0, 0, 0, max(0, ROWS - repeat)))
    else:
        picked = picked.transpose(1, 2)
    result = scaled_dot_product_attention(
        picked,
        keys,
        values,
        attn_mask=group.mask.to(query.dtype),
        scale=scaling,
        enable_gqa=width > 1 and repeat > 1,
    )
    if width == 1:
        result = result[:, :, :repeat].reshape(batch, 1, heads * repeat, -1)
    else:
        result = result.transpose(1, 2)
    _write(group, result, output)


def _write(group: Group, result: torch.Tensor, output: torch.Tensor) -> None:
    """`result` [B, Q, heads, width] to where its queries lie."""
    if group.live is None:
        output[group.source.view(-1)] = result.reshape(-1, *result.shape[2:])
    else:
        output[group.source[group.live]] = result[group.live]


@cache
def backend_class() -> type:
    """The backend; a function, because SGLang is imported only where engines are made."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    class TorchBatchedBackend(TorchNativeAttnBackend):
        """torch_native with its two per-request loops replaced."""

        groups: list[Group] | None = None

        def init_forward_metadata(self, forward_batch):
            super().init_forward_metadata(forward_batch)
            self.groups = None  # made by the first layer, used by all

        def _run(self, rows, args, scaling):
            query, output, key_cache, value_cache, table, pool = args
            if self.groups is None:
                self.groups = [build_group(g, table, pool) for g in group_rows(rows())]
            for group in self.groups:
                attend(group, query, output, key_cache, value_cache, scaling)
            return output

        def _run_sdpa_forward_extend(self, *args, **kwargs):
            # query, output, key_cache, value_cache, table, pool, seq_lens, prefix_lens,
            # extend_lens, encoder_lens
            if _special(args[9], kwargs) or not kwargs.get("causal"):
                return super()._run_sdpa_forward_extend(*args, **kwargs)
            return self._run(
                lambda: rows_of(args[8].tolist(), args[7].tolist()), args[:6], kwargs["scaling"]
            )

        def _run_sdpa_forward_decode(self, *args, **kwargs):
            # query, output, key_cache, value_cache, table, pool, seq_lens, encoder_lens
            if _special(args[7], kwargs):
                return super()._run_sdpa_forward_decode(*args, **kwargs)
            return self._run(
                lambda: [Row(i, i, 1, n) for i, n in enumerate(args[6].tolist())],
                args[:6],
                kwargs["scaling"],
            )

    return TorchBatchedBackend


def _special(encoder_lens, kwargs) -> bool:
    return (
        encoder_lens is not None
        or kwargs.get("is_cross_attn", False)
        or kwargs.get("sliding_window_size") is not None
    )
