"""Grouping and padded attention against a plain loop, without SGLang."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spmd_rl.rollout import attention
from spmd_rl.rollout.attention import SMALL, WASTE, attend, build_group, group_rows, rows_of

PAIRS = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), min_size=1, max_size=40)


@given(PAIRS)
@settings(deadline=None, max_examples=60)
def test_groups_hold_every_row_once_with_bounded_waste(pairs):
    rows = rows_of([q for q, _ in pairs], [p for _, p in pairs])
    groups = group_rows(rows)
    assert sorted(row for group in groups for row in group) == sorted(rows)
    for group in groups:
        wide, long = max(r.queries for r in group), max(r.keys for r in group)
        real = sum(r.queries * r.keys for r in group)
        assert len(group) <= SMALL or wide * long * len(group) <= WASTE * real


def test_a_long_request_is_cut_into_rows_that_see_what_came_before(monkeypatch):
    monkeypatch.setattr(attention, "LIMIT", 60)
    assert [tuple(row) for row in rows_of([10, 2], [5, 0])] == [
        (0, 0, 4, 9),
        (0, 4, 4, 13),
        (0, 8, 2, 15),
        (1, 10, 2, 2),
    ]


@given(PAIRS, st.sampled_from([(4, 4), (4, 2), (6, 1)]), st.booleans(), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_padded_calls_equal_a_loop_over_requests(pairs, heads, decode, seed):
    if decode:
        pairs = [(1, prefix) for _, prefix in pairs]
    check(pairs, heads, seed)


def test_long_requests_equal_the_loop_when_they_are_cut(monkeypatch):
    monkeypatch.setattr(attention, "LIMIT", 100)
    check([(40, 13), (1, 30), (25, 0)], (4, 2), 0)


@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (14, 2)])
def test_a_rows_bits_do_not_depend_on_its_company(heads):
    rng = random.Random(0)
    for seed in range(4):
        pairs = [(rng.choice([1, 1, 2, 5, 30]), rng.choice([0, 7, 90, 200, 520])) for _ in range(9)]
        query, keys, values, table, pool = paged(pairs, heads, seed)
        rows = rows_of([q for q, _ in pairs], [p for _, p in pairs])
        together, alone = torch.zeros_like(query), torch.zeros_like(query)
        for group in group_rows(rows):
            attend(build_group(group, table, pool), query, together, keys, values, 0.3)
        for row in rows:
            attend(build_group([row], table, pool), query, alone, keys, values, 0.3)
        assert torch.equal(together, alone)


def check(pairs: list[tuple[int, int]], heads: tuple[int, int], seed: int) -> None:
    query_heads, key_heads = heads
    query, keys, values, table, pool = paged(pairs, heads, seed)
    output = torch.full_like(query, float("nan"))
    for rows in group_rows(rows_of([q for q, _ in pairs], [p for _, p in pairs])):
        attend(build_group(rows, table, pool), query, output, keys, values, 0.3)

    start = 0
    for (count, prefix), request in zip(pairs, pool, strict=True):
        mine = table[request, : prefix + count]
        k = keys[mine].repeat_interleave(query_heads // key_heads, 1)
        v = values[mine].repeat_interleave(query_heads // key_heads, 1)
        scores = torch.einsum("qhd,khd->hqk", query[start : start + count], k) * 0.3
        seen = torch.arange(prefix + count) <= torch.arange(count)[:, None] + prefix
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        expected = torch.einsum("hqk,khd->qhd", weights, v)
        assert output[start : start + count] == pytest.approx(expected, abs=1e-5)
        start += count


def paged(pairs: list[tuple[int, int]], heads: tuple[int, int], seed: int):
    """Queries, a cache whose pages lie in any order, and the tables that find them."""
    query_heads, key_heads = heads
    generator = torch.Generator().manual_seed(seed)
    lengths = [q + p for q, p in pairs]
    slots = torch.randperm(sum(lengths) + 5, generator=generator)  # the cache, in any order
    keys = torch.randn(len(slots), key_heads, 16, generator=generator)
    values = torch.randn(len(slots), key_heads, 16, generator=generator)
    unused = slots[sum(lengths) :]
    keys[unused] = values[unused] = float("nan")  # never written: must not be read
    table = unused[0].repeat(len(pairs) + 1, max(lengths) + 3)
    pool = torch.randperm(len(pairs) + 1, generator=generator)[: len(pairs)]
    start = 0
    for request, length in zip(pool, lengths, strict=True):
        table[request, :length] = slots[start : start + length]
        start += length
    query = torch.randn(sum(q for q, _ in pairs), query_heads, 16, generator=generator)
    return query, keys, values, table, pool
