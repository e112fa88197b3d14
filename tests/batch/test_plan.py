"""Micro-batch plans: what must hold for any lengths, and slime's first-fit as a yardstick."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spmd_rl.architecture import read
from spmd_rl.batch.plan import best_fit, make_shard, mask_totals, plan_batch, plan_steps
from spmd_rl.planner.shape import flops_terms
from spmd_rl.types import Batch
from tests.models import tiny_model
from tests.trainer.cases import config, placement
from tools.bench_plan import CAP as TOKENS
from tools.bench_plan import draw, lockstep, our_plan

CAP = 100
lengths_of_many = st.lists(st.integers(1, 140), min_size=1, max_size=60)


def first_fit(lengths, cap):
    """slime's packing: each sample, in order of arrival, into the first bin with room."""
    bins, room = [], []
    for i, length in enumerate(lengths):
        at = next((b for b, left in enumerate(room) if length <= left), None)
        if at is None:
            bins.append([i])
            room.append(cap - length)
        else:
            bins[at].append(i)
            room[at] -= length
    return bins


def plan(lengths, dp=1, rollout_ids=None, **options):
    ids = range(len(lengths)) if rollout_ids is None else rollout_ids
    return plan_steps(lengths, lengths, list(ids), dp=dp, **options)


def check(plans, lengths, dp, group=1, cap=None):
    for step in plans:
        assert len(step.micro_batches) == dp
        counts = {len(rank) for rank in step.micro_batches}
        assert len(counts) == 1 and counts.pop() % group == 0
        for rank in step.micro_batches:
            assert rank[0], "each rank has a sample"
            for members in rank:
                total = sum(lengths[i] for i in members)
                assert cap is None or total <= cap or len(members) == 1
    seen = Counter(i for s in plans for r in s.micro_batches for b in r for i in b)
    assert seen == Counter(range(len(lengths)))


def test_the_yardstick_is_slimes_first_fit():
    assert first_fit([100, 200, 300], 300) == [[0, 1], [2]]
    lengths = [500, 100, 250, 60, 700, 40, 300]
    assert first_fit(lengths, 600) == [[0, 1], [2, 3, 5], [4], [6]]


def test_order_of_arrival_does_not_cost_a_bin():
    lengths = [40, 40, 60, 60]
    assert len(first_fit(lengths, 100)) == 3
    assert best_fit([0, 1, 2, 3], lengths, 100) == [[2, 0], [3, 1]]


@settings(deadline=None)
@given(
    lengths_of_many,
    st.integers(1, 4),
    st.integers(1, 2),
    st.sampled_from([False, True, "flops"]),
    st.integers(1, 3),
)
def test_dynamic_plans(lengths, dp, group, balance, steps):
    lengths = (lengths * dp * steps)[: len(lengths) // (dp * steps) * dp * steps] or [
        1
    ] * dp * steps
    plans = plan(
        lengths,
        dp,
        global_batch_size=len(lengths) // steps,
        max_tokens=CAP,
        balance=bool(balance),
        group=group,
        costs=[50 * n + n * n for n in lengths] if balance == "flops" else None,
    )
    assert len(plans) == steps
    check(plans, lengths, dp, group, CAP)
    size = len(lengths) // steps
    for k, step in enumerate(plans):
        members = {i for rank in step.micro_batches for b in rank for i in b}
        assert members == set(range(k * size, (k + 1) * size))
        assert step.num_rollouts == size
        assert step.num_tokens == sum(lengths[i] for i in members)


@settings(deadline=None)
@given(lengths_of_many)
def test_sorted_best_fit_stays_within_its_bound(lengths):
    bins = best_fit(list(range(len(lengths))), lengths, 140)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= 140 for b in bins)
    # at most 11/9 of the optimum plus 1, and the optimum is at least the total over the cap
    assert len(bins) <= 11 / 9 * max(len(first_fit(lengths, 140)), 1) + 1


@settings(deadline=None)
@given(lengths_of_many, st.integers(1, 3))
def test_balancing_never_needs_more_micro_batches(lengths, dp):
    if len(lengths) < dp:
        return
    counts = [
        len(plan(lengths, dp, max_tokens=140, balance=balance)[0].micro_batches[0])
        for balance in (False, True)
    ]
    assert counts[0] == counts[1]


def test_an_oversized_sample_is_alone():
    step = plan([500, 10, 20], max_tokens=100, balance=True)[0]
    assert sorted(map(sorted, step.micro_batches[0])) == [[0], [1, 2]]


def test_equal_samples_are_dealt_evenly():
    step = plan([100] * 4, 2, max_tokens=600)[0]
    assert step.micro_batches == [[[0, 2]], [[1, 3]]]


def test_fixed_micro_batches_are_chunks_in_order():
    step = plan([5] * 8, 2, micro_batch_size=2)[0]
    assert step.micro_batches == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def test_fixed_micro_batches_balanced_hold_like_lengths():
    lengths = [9, 1, 8, 2, 7, 3, 6, 4]
    step = plan(lengths, 2, micro_batch_size=2, balance=True)[0]
    check([step], lengths, 2)
    assert step.micro_batches == [[[0, 2], [1, 3]], [[4, 6], [5, 7]]]


def test_siblings_stay_in_one_step_and_count_once():
    ids = [10, 10, 11, 12, 12, 12, 13]
    first, second = plan([5] * 7, rollout_ids=ids, global_batch_size=2, max_tokens=100)
    assert first.micro_batches == [[[0, 1, 2]]] and second.micro_batches == [[[3, 4, 5, 6]]]
    assert first.num_rollouts == 2 and first.num_tokens == 15


def test_fully_masked_samples_count_as_one_token():
    step = plan_steps([5, 5], [0, 3], [0, 1], dp=1, max_tokens=100)[0]
    assert step.num_tokens == 4


def test_too_few_samples_for_a_multiple_leave_empty_micro_batches_at_the_end():
    step = plan([90] * 5, 2, max_tokens=100, balance=True)[0]
    assert [[len(b) for b in rank] for rank in step.micro_batches] == [[1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"dp": 4, "max_tokens": 10}, "cannot feed 4 data-parallel ranks"),
        ({"dp": 1, "global_batch_size": 2}, "not a multiple of train.global_batch_size 2"),
        ({"dp": 1, "micro_batch_size": 2}, "not a multiple of train.micro_batch_size 2"),
    ],
)
def test_refusals_name_the_key(options, words):
    with pytest.raises(ValueError, match=words):
        plan([5, 5, 5], **options)


def test_forward_passes_may_have_another_limit():
    lengths = [40, 60, 30, 70, 20, 80, 50, 50]
    step = plan(lengths, 2, max_tokens=100, forward_max_tokens=200, balance=True)[0]
    assert step.forward is not None
    for forward, training in zip(step.forward, step.micro_batches, strict=True):
        assert sorted(sum(forward, [])) == sorted(sum(training, []))
        assert len(forward) == len(step.forward[0]) < len(training)
        assert all(sum(lengths[i] for i in members) <= 200 for members in forward)


@pytest.mark.parametrize(("samples", "dp", "most"), [(2048, 8, 1.005), (8192, 64, 1.01)])
def test_ranks_seldom_wait_where_micro_batches_are_nearly_full(samples, dp, most):
    lengths = draw(np.random.default_rng(samples), samples)
    plan = our_plan(lengths, dp)
    assert lockstep(plan, lengths) <= most
    least = -(-sum(lengths) // TOKENS)
    assert sum(map(len, plan)) == -(-least // dp) * dp


@pytest.mark.parametrize("cp", [1, 2])
def test_balancing_operations_keeps_the_limit_and_beats_balancing_tokens(cp):
    """A configuration as the job reads it; under cp a sample's tokens lie on several ranks."""
    model = tiny_model("qwen3", hidden=64)
    lengths = np.clip(np.random.default_rng(0).lognormal(7.5, 1.0, 512), 16, 16000).astype(int)
    made = batch(lengths.tolist(), [1] * len(lengths))
    linear, square = flops_terms(read(model))
    work = [linear * n + square * n * n for n in lengths.tolist()]
    found = {}
    for key in ("balance_data", "balance_by_flops"):
        cfg = config(model, train={"max_tokens_per_gpu": 16384 // cp, key: True})
        where = placement(8 * cp, cp=cp)
        cfg.train.global_batch_size = len(lengths)
        (step,) = plan_batch(made, cfg, where)
        check([step], lengths.tolist(), 8, cap=16384)
        found[key] = lockstep(step.micro_batches, work)
    assert found["balance_by_flops"] < found["balance_data"]


def test_other_loads_than_tokens_keep_the_token_limit():
    lengths = [90, 60, 40, 30, 30, 20, 10, 10]
    step = plan(lengths, 2, max_tokens=100, balance=True, costs=[n**2 for n in lengths])[0]
    check([step], lengths, 2, cap=100)


def batch(total, response, rollout_ids=None):
    rng = np.random.default_rng(0)
    n, r = len(total), sum(response)
    return Batch(
        tokens=rng.integers(0, 1000, sum(total)).astype(np.int32),
        total_lengths=np.array(total, np.int32),
        response_lengths=np.array(response, np.int32),
        loss_mask=rng.integers(0, 2, r).astype(np.uint8),
        rewards=np.arange(n, dtype=np.float32),
        raw_rewards=np.arange(n, dtype=np.float32) * 2,
        rollout_ids=np.array(rollout_ids or range(n), np.int64),
        rollout_log_probs=rng.normal(size=r).astype(np.float32),
    )


def test_shards_hold_every_sample_once_with_its_own_rows():
    whole = batch([7, 5, 9, 4, 6, 8], [3, 2, 4, 1, 2, 5], [0, 0, 1, 2, 3, 3])
    totals = mask_totals(whole)
    plans = plan_steps(
        whole.total_lengths,
        totals,
        whole.rollout_ids,
        dp=2,
        global_batch_size=2,
        max_tokens=12,
    )
    seen = []
    for rank in range(2):
        shard = make_shard(whole, plans, rank)
        assert sorted(i for s in shard.steps for b in s for i in b) == list(range(len(shard.batch)))
        assert shard.forward == [members for step in shard.steps for members in step]
        tokens = np.split(shard.batch.tokens, np.cumsum(shard.batch.total_lengths)[:-1])
        rows = np.split(whole.tokens, np.cumsum(whole.total_lengths)[:-1])
        for k, reward in enumerate(shard.batch.rewards):
            i = int(reward)
            np.testing.assert_array_equal(tokens[k], rows[i])
            siblings = whole.rollout_ids == whole.rollout_ids[i]
            assert shard.mask_totals[k] == max(totals[siblings].sum(), 1)
            seen.append(i)
        assert shard.num_rollouts == [2, 2]
    assert sorted(seen) == list(range(6))
