"""Handing shards to ranks: what arrives equals what was cut, in no more bytes than it needs."""

from dataclasses import fields

import numpy as np
import torch.distributed as dist
import torch.multiprocessing as mp

from spmd_rl.batch.plan import make_shard, mask_totals, plan_steps
from spmd_rl.batch.ship import Shipping, data_parallel_ranks, from_bytes, to_bytes
from spmd_rl.types import Batch, Placement


def example(n=24, **columns):
    rng = np.random.default_rng(0)
    response = rng.integers(1, 50, n)
    total = response + rng.integers(1, 20, n)
    batch = Batch(
        tokens=rng.integers(0, 1000, total.sum()).astype(np.int32),
        total_lengths=total.astype(np.int32),
        response_lengths=response.astype(np.int32),
        loss_mask=rng.integers(0, 2, response.sum()).astype(np.uint8),
        rewards=rng.normal(size=n).astype(np.float32),
        raw_rewards=rng.normal(size=n).astype(np.float32),
        rollout_ids=np.arange(n) // 2,
        rollout_log_probs=rng.normal(size=response.sum()).astype(np.float32),
        **columns,
    )
    plans = plan_steps(
        batch.total_lengths,
        mask_totals(batch),
        batch.rollout_ids,
        dp=2,
        global_batch_size=6,
        max_tokens=150,
        forward_max_tokens=300,
        balance=True,
    )
    return batch, plans


def assert_same(one, other):
    for f in fields(Batch):
        a, b = getattr(one.batch, f.name), getattr(other.batch, f.name)
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(one.mask_totals, other.mask_totals)
    assert one.steps == other.steps and one.forward == other.forward
    assert one.num_rollouts == other.num_rollouts and one.num_tokens == other.num_tokens


def test_bytes_and_back():
    batch, plans = example(truncated=np.zeros(24, np.uint8))
    for dp_rank in range(2):
        shard = make_shard(batch, plans, dp_rank)
        assert_same(from_bytes(to_bytes(shard)), shard)


def test_a_large_shard_needs_hardly_more_than_its_arrays():
    batch, plans = example(n=600)
    shard = make_shard(batch, plans, 0)
    needed = sum(v.nbytes for f in fields(Batch) if (v := getattr(shard.batch, f.name)) is not None)
    assert len(to_bytes(shard)) <= 1.1 * needed


def test_ranks_of_one_data_parallel_rank():
    def ranks(**sizes):
        placement = Placement(8, 8, tuple(range(8)), (), (), False, **sizes)
        return data_parallel_ranks(placement)

    assert ranks(dp=8) == list(range(8))
    assert ranks(tp=2, dp=4) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert ranks(tp=2, cp=2, dp=2) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert ranks(tp=2, pp=2, dp=2) == [0, 0, 1, 1, 0, 0, 1, 1]


def one_rank(rank, path):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=4)
    batch, plans = example()
    placement = Placement(6, 6, (0, 1, 2, 3), (4, 5), (), False, tp=2, dp=2)
    shipping = Shipping(placement, rank, dist.group.WORLD)
    assert all(shipping.near)  # one machine
    kept = []
    for near in (True, True, True, False):  # the last as between machines
        shipping.near = [True] + [near] * 3
        shard = shipping.hand_out(*((batch, plans) if rank == 0 else (None, None)))
        assert_same(shard, make_shard(batch, plans, rank // 2))
        shard.batch.tokens[:] = 0  # nobody else sees it, and no later shard
        kept = [shard] if near else [*kept, shard]  # each replaces the one before
    assert len(shipping.lenders) == (2 if rank == 0 else 0)
    assert all(len(lender.regions) == 2 for lender in shipping.lenders.values())
    dist.destroy_process_group()


def test_every_rank_receives_its_own_shard(tmp_path):
    mp.spawn(one_rank, (tmp_path / "meeting",), nprocs=4)
