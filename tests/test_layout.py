"""Placement: every rank has a role, engines lie whole on nodes, misfits are sentences."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spmd_rl.config.errors import ConfigError
from spmd_rl.config.schema import Config
from spmd_rl.layout import describe, launched, parts, place, planned_world
from spmd_rl.types import Placement


def config(placement: dict, megatron: dict | None = None, **sections: dict) -> Config:
    return Config.model_validate(
        {
            "placement": {"device": "cpu"} | placement,
            "model": {"hf_checkpoint": "model"},
            "rollout": {"rollout_batch_size": 512, "num_steps_per_rollout": 1},
            "train": {"global_batch_size": 512, "use_dynamic_batch_size": True},
            "megatron": megatron or {},
        }
        | sections
    )


def misfit(cfg: Config, world: int, ranks_per_node: int) -> str:
    with pytest.raises(ConfigError) as error:
        place(cfg, world, ranks_per_node)
    assert len(error.value.faults) == 1, error.value.faults
    return error.value.faults[0]


def test_colocated_engines_cover_the_train_ranks():
    p = place(config({"colocate": True, "rollout_num_gpus_per_engine": 2}), 8, 4)
    assert p.train_ranks == p.rollout_ranks == tuple(range(8))
    assert [e.ranks for e in p.engines] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert [e.host_rank for e in p.engines] == [0, 0, 4, 4]
    assert [e.base_gpu_id for e in p.engines] == [0, 2, 0, 2]


def test_a_teacher_that_the_job_serves_lies_beside_the_first_engine():
    algo = {"use_opd": True, "opd_type": "sglang", "opd_teacher_load": "teacher"}
    p = place(config({"actor_num_gpus_per_node": 2}, algo=algo), 4, 4)
    assert [e.ranks for e in p.engines] == [(2,), (3,)]
    assert p.teacher and (p.teacher.index, p.teacher.ranks, p.teacher.host_rank) == (2, (2,), 0)
    assert place(config({"actor_num_gpus_per_node": 2}), 4, 4).teacher is None
    on_gpus = config({"actor_num_gpus_per_node": 2, "device": "cuda"}, algo=algo)
    assert "give its address as reward.rm_url" in misfit(on_gpus, 4, 4)


def test_separate_engines_never_lie_on_train_ranks():
    cfg = config({"actor_num_gpus_per_node": 4, "rollout_num_gpus_per_engine": 2})
    p = place(cfg, 8, 8)
    assert p.train_ranks == (0, 1, 2, 3)
    assert [e.ranks for e in p.engines] == [(4, 5), (6, 7)]
    assert [(e.host_rank, e.base_gpu_id) for e in p.engines] == [(0, 4), (0, 6)]


def test_nodes_of_four_gpus():
    """Nothing takes 8 GPUs a node for granted."""
    cfg = config(
        {"actor_num_nodes": 2, "actor_num_gpus_per_node": 4, "rollout_num_gpus_per_engine": 8},
        {"tensor_model_parallel_size": 4},
    )
    p = place(cfg, 16, 4)
    (engine,) = p.engines
    assert engine.ranks == tuple(range(8, 16))
    assert [(q.node_rank, q.host_rank, q.base_gpu_id) for q in parts(engine, 4)] == [
        (0, 8, 0),
        (1, 12, 0),
    ]
    assert (p.tp, p.dp) == (4, 2)


def test_rollout_num_gpus_alone_says_who_trains():
    p = place(config({"rollout_num_gpus": 3}), 4, 4)
    assert (p.train_ranks, p.rollout_ranks) == ((0,), (1, 2, 3))


def test_whole_nodes_train_when_only_nodes_are_given():
    p = place(config({"actor_num_nodes": 2}), 12, 4)
    assert (p.train_ranks, p.rollout_ranks) == (tuple(range(8)), tuple(range(8, 12)))


def test_numbers_of_train_ranks_do_not_bind_when_colocated():
    cfg = config({"colocate": True, "actor_num_gpus_per_node": 1, "rollout_num_gpus": 7})
    assert place(cfg, 4, 4).train_ranks == (0, 1, 2, 3)


def test_without_engines_every_rank_trains():
    cfg = config({"rollout_num_gpus": 1}, algo={"loss_type": "sft_loss"})
    p = place(cfg, 4, 4)
    assert (p.train_ranks, p.rollout_ranks, p.engines) == ((0, 1, 2, 3), (), ())


def test_misfits_name_key_and_fix():
    text = misfit(config({}), 4, 4)
    assert "no rank is left for engines" in text
    assert "placement.colocate: true" in text
    text = misfit(config({"actor_num_gpus_per_node": 8, "colocate": True}), 4, 4)
    assert "asks for 8 ranks that train, but there are 4 ranks" in text
    text = misfit(config({"actor_num_gpus_per_node": 4, "rollout_num_gpus": 2}), 8, 8)
    assert "4 ranks that train" in text
    assert "start 6" in text
    text = misfit(config({"colocate": True}, {"pipeline_model_parallel_size": 3}), 4, 4)
    assert "megatron.pipeline_model_parallel_size 3 does not divide the 4 train ranks" in text
    text = misfit(config({"colocate": True, "rollout_num_gpus_per_engine": 3}), 12, 4)
    assert "unevenly over nodes of 4 ranks" in text
    text = misfit(config({"colocate": True, "rollout_num_gpus_per_engine": 8}), 12, 4)
    assert "does not divide the 12 GPUs" in text
    text = misfit(
        config({"actor_num_gpus_per_node": 2, "rollout_num_gpus_per_engine": 4}), 6 * 2, 6
    )
    assert text  # 10 engine GPUs
    text = misfit(config({"colocate": True}), 6, 4)
    assert "cannot be 4 on every node" in text
    text = misfit(
        config({"colocate": True}, train={"global_batch_size": 2, "micro_batch_size": 1}), 4, 4
    )
    assert "global_batch_size 2 is not a multiple of 4 data-parallel ranks" in text


def test_launchers_say_the_sizes():
    assert launched({}) is None
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert launched(torchrun) == (5, 8, 4)
    step = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
    assert launched(step) == (3, 8, 4)
    assert launched({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None  # a batch script, no step


def test_planned_sizes():
    assert planned_world(config({"actor_num_nodes": 2, "actor_num_gpus_per_node": 8})) == (17, 17)
    both = {"actor_num_nodes": 2, "actor_num_gpus_per_node": 8, "colocate": True}
    assert planned_world(config(both)) == (16, 8)
    assert planned_world(config({"colocate": True}), 4) == (4, 4)
    assert planned_world(config({"colocate": True}, {"tensor_model_parallel_size": 2})) == (2, 2)


def test_the_table_shows_every_node():
    cfg = config({"actor_num_gpus_per_node": 4, "rollout_num_gpus_per_engine": 2})
    table = describe(place(cfg, 16, 8), cfg)
    assert "16 ranks on 2 nodes, separate, device cpu" in table
    assert table.splitlines()[-2].split() == ["0", "0-7", "0-3", "#0", "4-5,", "#1", "6-7"]
    assert table.splitlines()[-1].split()[:3] == ["1", "8-15", "-"]


sizes = st.sampled_from([1, 2, 3, 4, 6, 8, 16])


@settings(max_examples=400, deadline=None)
@given(
    colocate=st.booleans(),
    nodes=st.integers(1, 4),
    per_node=st.sampled_from([1, 2, 4, 6, 8]),
    actor_nodes=st.integers(1, 3),
    actor=st.none() | sizes,
    rollout=st.none() | sizes,
    engine=sizes,
    tp=sizes,
    pp=st.sampled_from([1, 2]),
    sft=st.booleans(),
)
def test_a_placement_is_whole_or_a_sentence(
    colocate, nodes, per_node, actor_nodes, actor, rollout, engine, tp, pp, sft
):
    cfg = config(
        {
            "colocate": colocate,
            "actor_num_nodes": actor_nodes,
            "actor_num_gpus_per_node": actor,
            "rollout_num_gpus": rollout,
            "rollout_num_gpus_per_engine": engine,
        },
        {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp},
        algo={"loss_type": "sft_loss" if sft else "policy_loss"},
    )
    world = nodes * per_node
    try:
        p = place(cfg, world, per_node)
    except ConfigError as error:
        assert error.faults
        assert all("placement." in text or "megatron." in text for text in error.faults)
        return
    check_whole(p, cfg, world, per_node)
    assert len(describe(p, cfg).splitlines()) == 4 + nodes


def check_whole(p: Placement, cfg: Config, world: int, per_node: int) -> None:
    everyone = set(p.train_ranks) | set(p.rollout_ranks)
    assert everyone == set(range(world))
    assert 0 in p.train_ranks  # the controller trains
    assert len(p.train_ranks) == p.dp * p.tp * p.pp * p.cp
    assert not p.engines or p.colocate or not set(p.train_ranks) & set(p.rollout_ranks)
    used = [rank for e in p.engines for rank in e.ranks]
    assert used == list(p.rollout_ranks)
    assert [e.index for e in p.engines] == list(range(len(p.engines)))
    for e in p.engines:
        assert len(e.ranks) == cfg.placement.rollout_num_gpus_per_engine
        assert all(b == a + 1 for a, b in pairwise(e.ranks))
        shares = parts(e, per_node)
        assert len({len(part.ranks) for part in shares}) == 1
        assert e.host_rank == shares[0].host_rank == e.ranks[0] // per_node * per_node
        assert e.base_gpu_id == e.ranks[0] % per_node
        assert len(shares) == 1 or e.base_gpu_id == 0
