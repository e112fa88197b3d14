#!/usr/bin/env python3
"""Micro-batch planning against slime's first-fit: milliseconds, micro-batches, lockstep loss.

Lengths are log-normal (mean about 3.4k, at most 16k tokens). "lockstep" is the sum over micro-batch
rounds of the slowest rank's tokens, over a perfect split. Both planners run in this process; status
1 when ours misses a limit or needs more micro-batches. Pure Python and numpy.
"""

from __future__ import annotations

import heapq
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from spmd_rl.batch.plan import plan_steps  # noqa: E402

CAP = 16384
# samples, dp, most milliseconds, most lockstep
SIZES = ((512, 8, 5, 1.01), (2048, 8, 10, 1.005), (2048, 64, 10, 1.005), (8192, 64, 80, 1.01))
REPEATS = 7

Ranks = list[list[list[int]]]


def first_fit_plan(lengths: list[int], dp: int) -> Ranks:
    """slime's schedule: first-fit in order, split the largest bin up to a multiple of dp, deal."""
    bins: list[list[int]] = []
    sums: list[int] = []
    for i, length in enumerate(lengths):
        for b, total in enumerate(sums):
            if total + length <= CAP:
                bins[b].append(i)
                sums[b] += length
                break
        else:
            bins.append([i])
            sums.append(length)
    while len(bins) % dp:
        b = max((b for b in range(len(bins)) if len(bins[b]) > 1), key=sums.__getitem__)
        halves: list[tuple[int, int, list[int]]] = [(0, 0, []), (0, 1, [])]
        for i in sorted(bins[b], key=lambda i: -lengths[i]):
            total, side, members = heapq.heappop(halves)
            heapq.heappush(halves, (total + lengths[i], side, [*members, i]))
        (sums[b], _, bins[b]), (total, _, members) = halves
        bins.append(members)
        sums.append(total)
    return [bins[rank::dp] for rank in range(dp)]


def our_plan(lengths: list[int], dp: int) -> Ranks:
    ids = range(len(lengths))
    plans = plan_steps(lengths, lengths, list(ids), dp=dp, max_tokens=CAP, balance=True)
    return plans[0].micro_batches


def draw(rng: np.random.Generator, samples: int) -> list[int]:
    """Lengths with a long tail, cut off at CAP."""
    return np.clip(rng.lognormal(np.log(2400), 0.85, samples), 16, CAP).astype(int).tolist()


def measure(plan: Callable[[list[int], int], Ranks], lengths: list[int], dp: int) -> dict:
    seconds = []
    ranks: Ranks = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        ranks = plan(lengths, dp)
        seconds.append(time.perf_counter() - began)
    return {
        "ms": statistics.median(seconds) * 1e3,
        "micro_batches": sum(len(rank) for rank in ranks),
        "lockstep": lockstep(ranks, lengths),
    }


def lockstep(ranks: Ranks, lengths: list[int]) -> float:
    rounds = zip(*ranks, strict=True)
    slowest = sum(max(sum(lengths[i] for i in b) for b in bins) for bins in rounds)
    return slowest / (sum(lengths) / len(ranks))


def main() -> int:
    rng = np.random.default_rng(0)
    rows, good = [], True
    print(f"{'samples':>7} {'dp':>3} {'planner':10} {'ms':>8} {'bins':>5} {'lockstep':>9}")
    for samples, dp, most_ms, most_lockstep in SIZES:
        lengths = draw(rng, samples)
        row: dict[str, Any] = {"samples": samples, "dp": dp, "least": -(-sum(lengths) // CAP)}
        for name, plan in (("spmd_rl", our_plan), ("first-fit", first_fit_plan)):
            row[name] = seen = measure(plan, lengths, dp)
            print(
                f"{samples:7} {dp:3} {name:10} {seen['ms']:8.2f} {seen['micro_batches']:5} "
                f"{seen['lockstep']:9.4f}"
            )
        ours, other = row["spmd_rl"], row["first-fit"]
        row["ratio"] = other["ms"] / ours["ms"]
        good &= ours["micro_batches"] <= other["micro_batches"]
        good &= ours["ms"] <= most_ms and ours["lockstep"] <= most_lockstep
        rows.append(row)
    ratio = min(row["ratio"] for row in rows if row["samples"] > 1000)
    print(json.dumps({"ratio": ratio, "results": rows}))
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
