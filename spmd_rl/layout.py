"""Who is where: which ranks train, which GPUs each engine has, and which rank starts it.

Comes in: a configuration, the number of ranks and how many of them share a node; goes out: a
`Placement`, or sentences on what does not fit. Pure: it asks no launcher, device or file, except in
`has_nvidia_driver`. On a CPU host a "GPU" is the slot of one rank. Must not import torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from spmd_rl.config import evaluation
from spmd_rl.config.check import check_steps
from spmd_rl.config.errors import ConfigError, Fault
from spmd_rl.config.schema import Config
from spmd_rl.types import EngineSpec, Placement

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
CP, EP, ETP = "context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"


class Launched(NamedTuple):
    """What the launcher says of this process."""

    rank: int
    world: int
    ranks_per_node: int


def launched(env: Mapping[str, str] = os.environ) -> Launched | None:
    """Rank and sizes from torchrun's or srun's environment; None when started by hand."""
    if "RANK" in env and "WORLD_SIZE" in env:
        world = int(env["WORLD_SIZE"])
        return Launched(int(env["RANK"]), world, int(env.get("LOCAL_WORLD_SIZE", world)))
    # Slurm sets SLURM_PROCID in a batch script too; only a step has SLURM_STEP_TASKS_PER_NODE.
    if "SLURM_PROCID" in env and "SLURM_STEP_TASKS_PER_NODE" in env:
        world = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))
        per_node = int(env["SLURM_STEP_TASKS_PER_NODE"].split("(")[0].split(",")[0])
        return Launched(int(env["SLURM_PROCID"]), world, per_node)
    return None


def has_nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()


def needs_engines(cfg: Config) -> bool:
    """Whether anything is generated in this run."""
    if cfg.debug.debug_train_only:
        return False
    return cfg.algo.loss_type != "sft_loss" or evaluation.evaluates(cfg)


def starts_teacher(cfg: Config) -> bool:
    """Whether an engine of the job is the teacher of on-policy distillation."""
    algo = cfg.algo
    wanted = algo.use_opd and algo.opd_type == "sglang" and algo.opd_teacher_load is not None
    return wanted and needs_engines(cfg)


def _on_gpus(cfg: Config) -> bool:
    device = cfg.placement.device
    return device == "cuda" or (device == "auto" and has_nvidia_driver())


def planned_world(cfg: Config, world: int | None = None) -> tuple[int, int]:
    """The ranks, and ranks of a node, to plan for when no launcher says them.

    What neither `world` nor the configuration says is taken as small as possible, on one node.
    """
    place, model = cfg.placement, _model_parallel(cfg)
    nodes, per_node = place.actor_num_nodes, place.actor_num_gpus_per_node
    if cfg.debug.debug_rollout_only:
        planned = place.rollout_num_gpus or place.rollout_num_gpus_per_engine
    elif _all_train(cfg):
        engine = place.rollout_num_gpus_per_engine if needs_engines(cfg) else 1
        planned = nodes * (per_node or math.lcm(model, engine))
    else:
        planned = nodes * (per_node or model)
        planned += place.rollout_num_gpus or place.rollout_num_gpus_per_engine
    world = world or planned
    if nodes == 1:
        return world, world
    if not per_node and _all_train(cfg):
        per_node = world // nodes
    return world, per_node if per_node and world % per_node == 0 else world


def place(cfg: Config, world: int, ranks_per_node: int) -> Placement:
    """The placement on `world` ranks; ConfigError with all misfits when there is none."""
    faults = [fault.text for fault in misfits(cfg, world, ranks_per_node)]
    if faults:
        raise ConfigError(faults)
    train = _num_train(cfg, world, ranks_per_node)
    train_ranks = tuple(range(train))
    rollout_ranks = tuple(_rollout_range(cfg, train, world))
    tp, pp, cp, ep = (_size(cfg, key) for key in (TP, PP, CP, EP))
    engines = tuple(_engines(cfg, rollout_ranks, ranks_per_node))
    return Placement(
        world=world,
        ranks_per_node=ranks_per_node,
        train_ranks=train_ranks,
        rollout_ranks=rollout_ranks,
        engines=engines,
        colocate=cfg.placement.colocate,
        tp=tp,
        pp=pp,
        cp=cp,
        ep=ep,
        dp=max(train // (tp * pp * cp), 1),
        teacher=_teacher(engines) if starts_teacher(cfg) else None,
    )


class EnginePart(NamedTuple):
    """The share of one engine that lies on one node."""

    node_rank: int  # 0 has the HTTP server
    host_rank: int
    base_gpu_id: int
    ranks: tuple[int, ...]


def parts(engine: EngineSpec, ranks_per_node: int) -> list[EnginePart]:
    """An engine's parts, node by node: one, unless it is bigger than a node."""
    found: list[EnginePart] = []
    for node in sorted({rank // ranks_per_node for rank in engine.ranks}):
        ranks = tuple(rank for rank in engine.ranks if rank // ranks_per_node == node)
        first = node * ranks_per_node
        found.append(EnginePart(len(found), first, ranks[0] - first, ranks))
    return found


def misfits(cfg: Config, world: int, ranks_per_node: int) -> Iterator[Fault]:
    """Everything that does not fit, each as a sentence."""
    if world < 1 or ranks_per_node < 1 or world % ranks_per_node:
        text = f"{world} ranks cannot be {ranks_per_node} on every node: start as many on each node"
        yield Fault((), text)
        return
    if cfg.debug.debug_rollout_only:
        yield from _engine_misfits(cfg, 0, world, ranks_per_node)
        return
    yield from _colocated(cfg, world) if _all_train(cfg) else _separate(cfg, world, ranks_per_node)
    train = _num_train(cfg, world, ranks_per_node)
    if 0 < train <= world:
        yield from _parallel(cfg, train)
        if starts_teacher(cfg) and _on_gpus(cfg):
            yield Fault(
                ("algo.opd_teacher_load", "algo.opd_type"),
                "algo.opd_type sglang starts no teacher of its own on GPUs: serve "
                f"algo.opd_teacher_load {cfg.algo.opd_teacher_load} by `python -m "
                "sglang.launch_server` elsewhere and give its address as reward.rm_url, or set "
                "algo.opd_type: megatron",
            )
        if needs_engines(cfg):
            yield from _engine_misfits(cfg, train, world, ranks_per_node)


def _all_train(cfg: Config) -> bool:
    return cfg.placement.colocate or not needs_engines(cfg)


def _colocated(cfg: Config, world: int) -> Iterator[Fault]:
    # All ranks train; the numbers of train ranks, kept for colocate: false, are then a minimum.
    per_node = cfg.placement.actor_num_gpus_per_node
    asked = cfg.placement.actor_num_nodes * (per_node or 1)
    if asked > world:
        yield Fault(
            ("placement.actor_num_gpus_per_node", "placement.actor_num_nodes"),
            f"placement.actor_num_nodes x actor_num_gpus_per_node asks for {asked} ranks that "
            f"train, but there are {_count(world, 'rank')}: start {asked}, or lower "
            "placement.actor_num_gpus_per_node",
        )


def _separate(cfg: Config, world: int, ranks_per_node: int) -> Iterator[Fault]:
    place = cfg.placement
    if place.actor_num_gpus_per_node is None and place.rollout_num_gpus is None:
        if world <= place.actor_num_nodes * ranks_per_node:
            yield Fault(
                ("placement.actor_num_gpus_per_node", "placement.colocate"),
                f"no rank is left for engines: all {world} would train. Give "
                "placement.actor_num_gpus_per_node (ranks that train, on each node) or "
                "placement.rollout_num_gpus, or set placement.colocate: true",
            )
        return
    train = _num_train(cfg, world, ranks_per_node)
    engines = place.rollout_num_gpus or world - train
    key = "actor_num_gpus_per_node" if place.actor_num_gpus_per_node else "rollout_num_gpus"
    if train < 1 or engines < 1 or train + engines != world:
        least = max(train, 1) + max(engines, 1)
        yield Fault(
            (f"placement.{key}", "placement.rollout_num_gpus", "placement.actor_num_nodes"),
            f"placement: {max(train, 0)} ranks that train (actor_num_nodes x "
            f"actor_num_gpus_per_node) and {max(engines, 0)} of engines (rollout_num_gpus) do not "
            f"make the {world} started: start {least}, or change placement.{key}",
        )


def _parallel(cfg: Config, train: int) -> Iterator[Fault]:
    """Whether tp, pp, cp and ep divide the train ranks."""
    tp, pp, cp, ep = (_size(cfg, key) for key in (TP, PP, CP, EP))
    etp = _size(cfg, ETP, tp)
    given = [key for key in (TP, PP, CP) if _size(cfg, key) > 1] or [TP]
    names = tuple(f"megatron.{key}" for key in given)
    if train % (tp * pp * cp):
        product = " x ".join(f"megatron.{key} {_size(cfg, key)}" for key in given)
        fits = [n for n in range(1, train + 1) if train % n == 0]
        fix = (
            f"start a multiple of {tp * pp * cp} train ranks, or choose "
            f"{'a size' if len(given) == 1 else 'sizes whose product is'} among "
            f"{', '.join(map(str, fits))}"
        )
        yield Fault(names, f"{product} does not divide the {train} train ranks: {fix}")
    elif train % (etp * ep * pp):
        yield Fault(
            (f"megatron.{EP}", f"megatron.{ETP}", *names),
            f"megatron.{EP} {ep} x {ETP} {etp} x pp {pp} does not divide the {train} train ranks: "
            f"lower megatron.{EP} or set megatron.{ETP}: 1",
        )
    else:
        yield from check_steps(cfg, train // (tp * pp * cp))


def _engine_misfits(cfg: Config, train: int, world: int, ranks_per_node: int) -> Iterator[Fault]:
    size = cfg.placement.rollout_num_gpus_per_engine
    ranks = _rollout_range(cfg, train, world)
    keys = ("placement.rollout_num_gpus_per_engine", "placement.rollout_num_gpus")
    if not ranks:
        return
    if len(ranks) % size:
        yield Fault(
            keys,
            f"placement.rollout_num_gpus_per_engine {size} does not divide the {len(ranks)} GPUs "
            "of the engines: choose a divisor of it, or start more ranks",
        )
        return
    for first in range(ranks[0], world, size):
        on_node = min(size, ranks_per_node)
        if first % ranks_per_node + on_node > ranks_per_node or size % on_node:
            yield Fault(
                keys,
                f"placement.rollout_num_gpus_per_engine {size}: an engine on ranks {first}-"
                f"{first + size - 1} would lie unevenly over nodes of {ranks_per_node} ranks: "
                f"use a size that divides {ranks_per_node} (or a multiple of it), and train "
                "ranks that fill whole nodes or leave room for whole engines",
            )
            return


def _num_train(cfg: Config, world: int, ranks_per_node: int) -> int:
    place = cfg.placement
    if cfg.debug.debug_rollout_only:
        return 0
    if _all_train(cfg):
        return world
    if place.actor_num_gpus_per_node is not None:
        return place.actor_num_nodes * place.actor_num_gpus_per_node
    if place.rollout_num_gpus is not None:
        return world - place.rollout_num_gpus
    return place.actor_num_nodes * ranks_per_node


def _rollout_range(cfg: Config, train: int, world: int) -> range:
    if not needs_engines(cfg):
        return range(0)
    return range(world) if cfg.placement.colocate and train else range(train, world)


def _engines(
    cfg: Config, rollout_ranks: tuple[int, ...], ranks_per_node: int
) -> Iterator[EngineSpec]:
    size = cfg.placement.rollout_num_gpus_per_engine
    for index in range(len(rollout_ranks) // size):
        ranks = rollout_ranks[index * size : (index + 1) * size]
        host = ranks[0] - ranks[0] % ranks_per_node
        yield EngineSpec(index, ranks, host, ranks[0] - host)


def _teacher(engines: tuple[EngineSpec, ...]) -> EngineSpec:
    """Beside the first engine, on its first slot."""
    first = engines[0]
    return EngineSpec(
        len(engines), first.ranks[:1], first.host_rank, first.base_gpu_id, teacher=True
    )


def _model_parallel(cfg: Config) -> int:
    tp, pp, cp, ep = (_size(cfg, key) for key in (TP, PP, CP, EP))
    return math.lcm(tp * pp * cp, _size(cfg, ETP, tp) * ep * pp)


def _size(cfg: Config, key: str, default: int = 1) -> int:
    """A parallel size of `megatron:`; what is no positive number is reported by others."""
    value = cfg.megatron.get(key)
    return value if isinstance(value, int) and value > 0 else default


def describe(placement: Placement, cfg: Config) -> str:
    """The placement as a table, one line a node."""
    p, per_node = placement, placement.ranks_per_node
    how = "colocated" if p.colocate else "separate"
    steps = f"{cfg.train.global_batch_size} samples a step"
    size = cfg.placement.rollout_num_gpus_per_engine
    lines = [
        f"placement: {_count(p.world, 'rank')} on {_count(p.world // per_node, 'node')}, {how}, "
        f"device {cfg.placement.device}",
        f"train:     {_count(len(p.train_ranks), 'rank')} = dp {p.dp} x tp {p.tp} x "
        f"pp {p.pp} x cp {p.cp}" + (f" (ep {p.ep})" if p.ep > 1 else "") + f", {steps}"
        if p.train_ranks
        else "train:     none",
        f"engines:   {len(p.engines)} of {_count(size, 'GPU')} each"
        + (f", and a teacher beside the first: {cfg.algo.opd_teacher_load}" if p.teacher else "")
        if p.engines
        else "engines:   none",
        f"{'node':<6}{'ranks':<12}{'train':<12}engines (GPUs of the node)",
    ]
    for node in range(p.world // per_node):
        first, last = node * per_node, (node + 1) * per_node - 1
        train = [rank for rank in p.train_ranks if first <= rank <= last]
        here = [
            f"#{engine.index} {_span([rank - first for rank in part.ranks])}"
            for engine in p.engines
            for part in parts(engine, per_node)
            if part.host_rank == first
        ]
        lines.append(
            f"{node:<6}{_span([first, last]):<12}{_span(train):<12}{', '.join(here) or '-'}"
        )
    return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _span(numbers: list[int]) -> str:
    if not numbers:
        return "-"
    return str(numbers[0]) if numbers[0] == numbers[-1] else f"{numbers[0]}-{numbers[-1]}"
