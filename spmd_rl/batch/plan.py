"""Which samples make which optimizer step, and how each step's samples become micro-batches of each
data-parallel rank.

Pure Python on rank 0: lengths in, indices out. Every rank gets the same number of micro-batches in
a step, because pipelines and expert parallelism run them in lockstep. Packing is sorted best-fit,
which needs fewer micro-batches than slime's first-fit in arrival order and is faster; balancing is
longest-first into the least loaded bin, then bins of equal load are dealt to the ranks of a round.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spmd_rl import architecture
from spmd_rl.planner.shape import flops_terms
from spmd_rl.types import Batch, Placement, Shard, StepPlan

if TYPE_CHECKING:
    from spmd_rl.config.schema import Config

Bins = list[list[int]]


def plan_batch(batch: Batch, cfg: Config, placement: Placement) -> list[StepPlan]:
    """`plan_steps` with what the configuration says."""
    train, megatron = cfg.train, cfg.megatron
    group = 1
    if megatron.get("virtual_pipeline_model_parallel_size"):
        group = megatron.get("microbatch_group_size_per_vp_stage") or placement.pp
    cap = forward_cap = None
    if train.use_dynamic_batch_size:
        assert train.max_tokens_per_gpu is not None, "checked with the configuration"
        cap = train.max_tokens_per_gpu * placement.cp
        forward_cap = (train.log_probs_max_tokens_per_gpu or 0) * placement.cp or None
    costs = None
    if train.balance_by_flops:
        linear, square = flops_terms(architecture.read_shape(cfg.model.hf_checkpoint))
        lengths = batch.total_lengths.astype(np.int64)
        costs = linear * lengths + square * lengths**2
    return plan_steps(
        batch.total_lengths,
        mask_totals(batch),
        batch.rollout_ids,
        dp=placement.dp,
        global_batch_size=train.global_batch_size,
        max_tokens=cap,
        forward_max_tokens=forward_cap,
        micro_batch_size=train.micro_batch_size,
        balance=train.balance_data or train.balance_by_flops,
        group=group,
        costs=costs,
    )


def plan_steps(
    total_lengths: Sequence[int] | np.ndarray,
    mask_totals: Sequence[int] | np.ndarray,
    rollout_ids: Sequence[int] | np.ndarray,
    *,
    dp: int,
    global_batch_size: int | None = None,
    max_tokens: int | None = None,
    forward_max_tokens: int | None = None,
    micro_batch_size: int = 1,
    balance: bool = False,
    group: int = 1,
    costs: Sequence[int] | np.ndarray | None = None,
) -> list[StepPlan]:
    """One plan per optimizer step; each step takes the next `global_batch_size` rollouts.

    Samples that share a rollout id stay in one step. `max_tokens`: limit of a micro-batch (a longer
    sample is alone); None: `micro_batch_size` samples each. `forward_max_tokens`: another limit for
    passes without gradient. `group`: the number of micro-batches is a multiple of it (virtual
    pipeline). `costs`: what to balance, if not tokens.
    """
    lengths = np.asarray(total_lengths).tolist()
    totals = np.asarray(mask_totals).tolist()
    loads = lengths if costs is None else np.asarray(costs, dtype=np.int64).tolist()
    plans = []
    for samples, num_rollouts in _steps(np.asarray(rollout_ids).tolist(), global_batch_size):
        if len(samples) < dp:
            raise ValueError(
                f"a step of {len(samples)} samples cannot feed {dp} data-parallel ranks: raise "
                "train.global_batch_size (or keep more samples), or use fewer training ranks"
            )
        if max_tokens is None:
            bins = fixed_bins(samples, loads, micro_batch_size, dp * group, balance)
        else:
            bins = token_bins(samples, lengths, loads, max_tokens, dp * group, balance)
        ranks = deal(bins, loads, dp, balance)
        forward = None
        if max_tokens and forward_max_tokens and forward_max_tokens != max_tokens:
            forward = _forward_bins(ranks, lengths, forward_max_tokens, group)
        num_tokens = sum(max(totals[i], 1) for i in samples)
        plans.append(StepPlan(ranks, num_rollouts, num_tokens, forward))
    return plans


def _steps(rollout_ids: list[int], size: int | None) -> list[tuple[list[int], int]]:
    """(samples in order, rollouts) of each step."""
    siblings: dict[int, list[int]] = {}
    for i, rollout in enumerate(rollout_ids):
        siblings.setdefault(rollout, []).append(i)
    rollouts = list(siblings.values())
    size = size or len(rollouts)
    if not rollouts or len(rollouts) % size:
        raise ValueError(
            f"the batch has {len(rollouts)} rollouts, not a multiple of train.global_batch_size "
            f"{size}: samples would be generated and never trained on; change "
            "rollout.rollout_batch_size x n_samples_per_prompt, or set num_steps_per_rollout alone"
        )
    chunks = [rollouts[k : k + size] for k in range(0, len(rollouts), size)]
    return [(sorted(i for members in chunk for i in members), size) for chunk in chunks]


def fixed_bins(
    samples: list[int], loads: list[int], micro_batch_size: int, multiple: int, balance: bool
) -> Bins:
    """Chunks of `micro_batch_size`, in order or (balanced) of samples of like load."""
    if len(samples) % (micro_batch_size * multiple):
        raise ValueError(
            f"a step of {len(samples)} samples is not a multiple of train.micro_batch_size "
            f"{micro_batch_size} x {multiple} (data-parallel ranks x virtual-pipeline group); "
            "change train.global_batch_size, or set train.use_dynamic_batch_size: true"
        )
    if balance:
        samples = sorted(samples, key=lambda i: (-loads[i], i))
    chunks = range(0, len(samples), micro_batch_size)
    return [sorted(samples[k : k + micro_batch_size]) for k in chunks]


def token_bins(
    samples: list[int], lengths: list[int], loads: list[int], cap: int, multiple: int, balance: bool
) -> Bins:
    """Bins of at most `cap` tokens, their number a multiple of `multiple`.

    Bins are empty only where there are not enough samples to reach the multiple.
    """
    bins, tried = None, 0
    if balance:  # mostly as few bins as the tokens need at least will do
        least = -(-sum(min(lengths[i], cap) for i in samples) // cap)
        tried = -(-least // multiple) * multiple
        bins = least_loaded(samples, lengths, loads, cap, tried)
    if bins is None:
        packed = best_fit(samples, lengths, cap)
        count = -(-len(packed) // multiple) * multiple
        if balance and count != tried:
            bins = least_loaded(samples, lengths, loads, cap, count)
        if bins is None and balance:
            bins = _level_last(packed, lengths, loads, cap, count, multiple)
        if bins is None:
            bins = _split_until(packed, loads, count)
    bins = [sorted(members) for members in bins]
    return sorted(bins, key=lambda members: members[0] if members else len(lengths))


def best_fit(samples: list[int], lengths: list[int], cap: int) -> Bins:
    """Longest first, each into the fullest bin that still has room."""
    bins: Bins = []
    width = len(samples)  # one integer, tokens left x width + bin, sorts faster than a pair
    room: list[int] = []  # ascending
    for i in sorted(samples, key=lengths.__getitem__, reverse=True):
        size = lengths[i]
        at = bisect_left(room, size * width)
        if at == len(room):
            entry = cap * width + len(bins)
            bins.append([])
        else:
            entry = room.pop(at)
        bins[entry % width].append(i)
        insort(room, entry - size * width)
    return bins


def least_loaded(
    samples: list[int], lengths: list[int], loads: list[int], cap: int, count: int
) -> Bins | None:
    """Heaviest first, each into the least loaded of `count` bins; None where that breaks `cap`."""
    bins: Bins = [[] for _ in range(count)]
    tokens = [0] * count
    heap = list(range(count))  # load x count + bin
    for i in sorted(samples, key=loads.__getitem__, reverse=True):
        entry = heap[0]
        b = entry % count
        total = tokens[b] + lengths[i]
        if total > cap and bins[b]:
            return None
        bins[b].append(i)
        tokens[b] = total
        heapq.heapreplace(heap, entry + loads[i] * count)
    return bins


def _level_last(
    bins: Bins, lengths: list[int], loads: list[int], cap: int, count: int, multiple: int
) -> Bins | None:
    """`count` bins from nearly full ones, which are about equal: only the emptiest `multiple` are
    filled anew, so that the ranks that share them have equal loads; None where that breaks `cap`.
    """
    fullest_first = sorted(bins, key=lambda members: -sum(loads[i] for i in members))
    full, rest = fullest_first[: count - multiple], fullest_first[count - multiple :]
    samples = [i for members in rest for i in members]
    level = least_loaded(samples, lengths, loads, cap, multiple)
    return full + level if level and all(level) else None


def _split_until(bins: Bins, loads: list[int], count: int) -> Bins:
    """`count` bins, by halving the heaviest that has several samples; then empty ones."""
    bins = list(bins)
    heap: list[tuple[float, int]] = [
        (-sum(loads[i] for i in members), b) for b, members in enumerate(bins)
    ]
    heap = [entry for entry in heap if len(bins[entry[1]]) > 1]
    heapq.heapify(heap)
    while len(bins) < count and heap:
        halves: Bins = [[], []]
        weight = [0.0, 0.0]
        b = heapq.heappop(heap)[1]
        for i in sorted(bins[b], key=lambda i: (-loads[i], i)):
            side = int(weight[1] < weight[0])
            halves[side].append(i)
            weight[side] += loads[i]
        bins[b] = halves[0]
        bins.append(halves[1])
        for number, half, total in zip((b, len(bins) - 1), halves, weight, strict=True):
            if len(half) > 1:
                heapq.heappush(heap, (-total, number))
    return bins + [[] for _ in range(count - len(bins))]


def deal(bins: Bins, loads: list[int], dp: int, balance: bool) -> list[Bins]:
    """[dp][micro-batch] bins: in turn, or (balanced) each round bins of like load, heaviest first.

    Within a round the rank with the least so far takes the heaviest bin.
    """
    if not balance:
        return [bins[rank::dp] for rank in range(dp)]
    load = {b: sum(loads[i] for i in members) for b, members in enumerate(bins)}
    order = sorted(load, key=lambda b: (-load[b], b))
    ranks: list[Bins] = [[] for _ in range(dp)]
    so_far = [0.0] * dp
    for k in range(0, len(order), dp):
        turn = sorted(range(dp), key=lambda rank: (so_far[rank], rank))
        for rank, b in zip(turn, order[k : k + dp], strict=True):
            ranks[rank].append(bins[b])
            so_far[rank] += load[b]
    return ranks


def _forward_bins(ranks: list[Bins], lengths: list[int], cap: int, group: int) -> list[Bins]:
    """The same samples on the same ranks under another token limit, equally many bins on each."""
    packed = [best_fit([i for b in bins for i in b], lengths, cap) for bins in ranks]
    count = -(-max(len(bins) for bins in packed) // group) * group
    return [[sorted(members) for members in _split_until(bins, lengths, count)] for bins in packed]


def mask_totals(batch: Batch) -> np.ndarray:
    """[N] int64 mask total of each sample."""
    ends = np.cumsum(batch.response_lengths, dtype=np.int64)
    mask = batch.loss_mask.view(np.bool_)  # counting bools is 10x faster than summing bytes
    slices = zip((ends - batch.response_lengths).tolist(), ends.tolist(), strict=True)
    return np.array([np.count_nonzero(mask[a:b]) for a, b in slices], dtype=np.int64)


def sibling_totals(batch: Batch) -> np.ndarray:
    """[N] int64 mask total over all samples of the sample's rollout id, at least 1."""
    ids = np.unique(batch.rollout_ids, return_inverse=True)[1]
    return np.maximum(np.bincount(ids, mask_totals(batch))[ids], 1).astype(np.int64)


def make_shard(
    batch: Batch, plans: list[StepPlan], dp_rank: int, totals: np.ndarray | None = None
) -> Shard:
    """The samples of one data-parallel rank, in the order its micro-batches use them.

    `totals`: `sibling_totals(batch)`, where it is known already.
    """
    totals = sibling_totals(batch) if totals is None else totals
    order, rest = shard_plan(plans, dp_rank, totals)
    return Shard(batch=batch.take(order), **rest)


def shard_plan(
    plans: list[StepPlan], dp_rank: int, totals: np.ndarray
) -> tuple[list[int], dict[str, Any]]:
    """Which samples a shard has, in order, and its fields besides the batch."""
    steps = [plan.micro_batches[dp_rank] for plan in plans]
    order = [i for step in steps for members in step for i in members]
    place = {i: k for k, i in enumerate(order)}

    def local(bins: Bins) -> Bins:
        return [[place[i] for i in members] for members in bins]

    forward = [
        plan.forward[dp_rank] if plan.forward else plan.micro_batches[dp_rank] for plan in plans
    ]
    return order, {
        "steps": [local(step) for step in steps],
        "num_rollouts": [plan.num_rollouts for plan in plans],
        "num_tokens": [plan.num_tokens for plan in plans],
        "mask_totals": totals[order],
        "forward": [members for bins in forward for members in local(bins)],
    }
