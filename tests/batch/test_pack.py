"""Packed micro-batches: which logits belong to which token, padding, context-parallel halves."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spmd_rl.batch.pack import Packer, shard_weights
from spmd_rl.batch.plan import make_shard, mask_totals, plan_steps
from spmd_rl.types import Batch

sizes = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 9)), min_size=1, max_size=8)


def shard_of(sizes, max_tokens=30, steps=1):
    """A shard of samples with (prompt, response) lengths; token k of the batch has the value k."""
    total = [p + r for p, r in sizes]
    response = sum(r for _, r in sizes)
    batch = Batch(
        tokens=np.arange(1, sum(total) + 1, dtype=np.int32),
        total_lengths=np.array(total, np.int32),
        response_lengths=np.array([r for _, r in sizes], np.int32),
        loss_mask=(np.arange(response) % 3 > 0).astype(np.uint8),
        rewards=np.zeros(len(sizes), np.float32),
        raw_rewards=np.zeros(len(sizes), np.float32),
        rollout_ids=np.arange(len(sizes)),
    )
    plans = plan_steps(
        total,
        mask_totals(batch),
        batch.rollout_ids,
        dp=1,
        global_batch_size=len(sizes) // steps,
        max_tokens=max_tokens,
    )
    return make_shard(batch, plans, 0)


def response_tokens(shard):
    """[R] the shard's response tokens, sample after sample."""
    rows = np.split(shard.batch.tokens, np.cumsum(shard.batch.total_lengths)[:-1])
    pairs = zip(rows, shard.batch.response_lengths, strict=True)
    return np.concatenate([row[len(row) - size :] for row, size in pairs])


def test_a_small_example():
    shard = shard_of([(2, 3), (1, 1)])
    packed = Packer(shard).pack([0, 1])
    assert packed.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert packed.cu_seqlens.tolist() == [0, 5, 7] and packed.cu_seqlens.dtype == torch.int32
    assert packed.logit_rows.tolist() == [1, 2, 3, 5]
    assert packed.targets.tolist() == [3, 4, 5, 7]
    assert packed.response_rows.tolist() == [0, 1, 2, 3]
    assert packed.sample_ids.tolist() == [0, 0, 0, 1]


def test_padding_is_a_sequence_of_its_own():
    packed = Packer(shard_of([(2, 3), (1, 1)]), tp=2, pad_multiple=8).pack([0, 1])
    assert packed.tokens.shape == (1, 16)
    assert packed.lengths == [5, 2, 9]
    assert packed.logit_rows.tolist() == [1, 2, 3, 5]


@pytest.mark.parametrize("cp", [1, 2])
def test_no_samples_make_a_dummy_micro_batch(cp):
    packed = Packer(shard_of([(2, 3)]), tp=2, cp=cp).pack([])
    assert packed.tokens.shape[1] >= 2 and packed.logit_rows.shape == (0,)
    assert packed.samples == [] and sum(packed.lengths) == packed.tokens.shape[1] * cp


@settings(deadline=None)
@given(sizes, st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 8]))
def test_every_response_token_is_read_from_the_row_before_it(sizes, cp, tp, pad_multiple):
    shard = shard_of(sizes)
    expected = response_tokens(shard)
    seen = np.zeros(len(expected), int)
    for samples in shard.forward:
        for rank in range(cp):
            packer = Packer(shard, tp=tp, cp=cp, cp_rank=rank, pad_multiple=pad_multiple)
            packed = packer.pack(samples)
            local = packed.tokens.shape[1]
            assert local % (tp * pad_multiple) == 0 and sum(packed.lengths) == local * cp
            assert all(n % (2 * cp) == 0 for n in packed.lengths) or cp == 1
            rows = packed.response_rows.numpy()
            seen[rows] += 1
            np.testing.assert_array_equal(packed.targets.numpy(), expected[rows])
            # a row holds the token before its target: tokens count upward in this batch
            read = packed.tokens[0, packed.logit_rows].numpy()
            np.testing.assert_array_equal(read, packed.targets.numpy() - 1)
            owner = torch.tensor(samples)[packed.sample_ids].numpy()
            ends = np.cumsum(shard.batch.response_lengths)
            np.testing.assert_array_equal(owner, np.searchsorted(ends, rows, side="right"))
    np.testing.assert_array_equal(seen, 1)


def test_context_parallel_ranks_hold_mirrored_chunks():
    shard = shard_of([(3, 5)])
    halves = [Packer(shard, cp=2, cp_rank=rank).pack([0]) for rank in range(2)]
    assert [h.tokens.tolist() for h in halves] == [[[1, 2, 7, 8]], [[3, 4, 5, 6]]]
    assert [h.position_ids.tolist() for h in halves] == [[[0, 1, 6, 7]], [[2, 3, 4, 5]]]
    assert [h.targets.tolist() for h in halves] == [[8], [4, 5, 6, 7]]


@pytest.mark.parametrize("per_token", [False, True])
def test_weights_of_each_step_belong_to_its_samples(per_token):
    shard = shard_of([(1, 2), (1, 4), (2, 1), (3, 3)], steps=2)
    weights = shard_weights(shard, per_token)
    lengths, mask = shard.batch.response_lengths.tolist(), torch.from_numpy(shard.batch.loss_mask)
    parts, masks = torch.split(weights, lengths), torch.split(mask, lengths)
    for step in shard.steps:
        members = [i for b in step for i in b]
        if per_token:
            tokens = sum(max(int(masks[i].sum()), 1) for i in members)
            for i in members:
                torch.testing.assert_close(parts[i], masks[i] / tokens)
        else:
            for i in members:
                torch.testing.assert_close(parts[i], masks[i] / max(masks[i].sum(), 1) / 2)
