"""A plan as a table to read, with what to change where it does not fit. Text only."""

from __future__ import annotations

from spmd_rl.planner import shape
from spmd_rl.planner.memory import ALLOWANCE, GiB, Plan, Stage

PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "critic",
    "teacher",
    "replay",
    "activations",
    "logits",
    "engine",
    "buckets",
)


def describe(plan: Plan, ranks_per_node: int, host_memory: int | None = None) -> str:
    """The table: a line for each kind of pipeline stage, then totals and advice."""
    arch, place = plan.architecture, plan.placement
    total, met = shape.whole(arch), shape.active(arch)
    lines = [
        f"model:     {arch.family}, {_count(total)} parameters"
        + (f" ({_count(met)} for a token)" if met != total else "")
        + f", {len(arch.expert_layers)} layers",
        f"layout:    {len(place.train_ranks)} train ranks = dp {place.dp} x tp {place.tp} x pp "
        f"{place.pp} x cp {place.cp}, ep {plan.split.ep} x etp {plan.split.etp} for experts"
        if any(arch.expert_layers)
        else f"layout:    {len(place.train_ranks)} train ranks = dp {place.dp} x tp {place.tp} x "
        f"pp {place.pp} x cp {place.cp}",
        f"memory of a rank in GiB, on {plan.gpu.name} ({plan.gpu.memory / GiB:.0f} GiB); "
        f"phases include {ALLOWANCE / GiB:.0f} for CUDA and NCCL",
        _row("stage", "layers", *PARTS, "host", *plan.stages[0].phases, "fits"),
    ]
    for first, last, stage in _runs(plan.stages):
        name = str(first) if first == last else f"{first}-{last}"
        sizes = [_gib(getattr(stage, part)) for part in (*PARTS, "host")]
        phases = [_gib(size) for size in stage.phases.values()]
        fits = "yes" if stage.peak <= plan.gpu.memory else "NO"
        lines.append(_row(name, str(stage.layers), *sizes, *phases, fits))
    node = max(stage.host for stage in plan.stages) * ranks_per_node
    short = host_memory is not None and node > host_memory
    lines.append(
        f"host:      up to {node / GiB:.0f} GiB on a node of {ranks_per_node} ranks"
        + (", more than it has" if short else "")
    )
    if plan.cache_tokens:
        lines.append(
            f"engines:   {len(place.engines)}, weights {_gib(plan.engine_weights)} GiB a rank, "
            f"room for {plan.cache_tokens:,} tokens each"
        )
    lines += [_compute(plan), verdict(plan, short)]
    return "\n".join(lines)


def verdict(plan: Plan, host_too_small: bool = False) -> str:
    """Whether it fits and, where not, the keys to change, the most useful first."""
    over = [stage for stage in plan.stages if stage.peak > plan.gpu.memory]
    if over:
        worst = max(over, key=lambda stage: stage.peak)
        phase = max(worst.phases, key=lambda name: worst.phases[name])
        missing = _gib(worst.peak - plan.gpu.memory)
        return f"does not fit: {phase} lacks {missing} GiB; {_advice(plan, worst, phase)}"
    if host_too_small:
        return (
            "does not fit: the host lacks memory; train on more nodes, or set "
            "placement.offload_train: false or megatron.optimizer_cpu_offload: false"
        )
    free = plan.gpu.memory - max(stage.peak for stage in plan.stages)
    return f"fits: at least {_gib(free)} GiB of every GPU stay free"


def _advice(plan: Plan, stage: Stage, phase: str) -> str:
    if phase == "save":  # both models at once
        return "start more ranks, raise the parallel sizes, or leave out checkpoint.save_interval"
    if phase != "train":
        if stage.engine > plan.gpu.memory - ALLOWANCE or plan.cache_tokens == 0:
            return "raise placement.rollout_num_gpus_per_engine"
        return "lower sglang.mem_fraction_static, or set placement.offload_train: true"
    largest = max(PARTS[:8], key=lambda part: getattr(stage, part))
    if largest == "critic":
        return "set placement.offload_train: true, start more ranks, or raise the parallel sizes"
    if largest == "teacher":
        return "set algo.opd_type: sglang, start more ranks, or raise the parallel sizes"
    if largest == "replay":
        return "lower rollout.rollout_batch_size, or start more ranks"
    if largest == "activations":
        return (
            "lower train.max_tokens_per_gpu, set megatron.recompute_granularity: full with "
            "recompute_method: uniform and recompute_num_layers: 1, or raise "
            "megatron.context_parallel_size"
        )
    if largest == "logits":
        return "set train.log_probs_chunk_size: 1024, or lower train.max_tokens_per_gpu"
    if largest == "optimizer":
        return (
            "set megatron.optimizer_cpu_offload: true, start more ranks, or raise "
            "megatron.expert_model_parallel_size"
            if stage.parameters.experts
            else "set megatron.optimizer_cpu_offload: true, or start more ranks"
        )
    if stage.parameters.experts > stage.parameters.dense:
        return (
            "raise megatron.expert_model_parallel_size or pipeline_model_parallel_size, or start "
            "more ranks"
        )
    return "raise megatron.tensor_model_parallel_size or pipeline_model_parallel_size"


def _compute(plan: Plan) -> str:
    ranks = len(plan.placement.train_ranks)
    factors = " x ".join(f"{name} {value:.2f}" for name, value in plan.efficiency.items())
    seconds = plan.step_flops / (ranks * plan.gpu.flops * plan.mfu)
    return (
        f"compute:   {plan.step_flops:.2e} operations a step at a mean length of "
        f"{plan.mean_length} (a guess: --mean-length), {plan.micro_batches} micro-batches a rank;\n"
        f"           expected MFU {100 * plan.mfu:.0f} % = {factors} (kernels are a guess), "
        f"{seconds:.1f} s a step"
    )


def _runs(stages: list[Stage]) -> list[tuple[int, int, Stage]]:
    """Neighbouring stages that need the same are one line."""
    found: list[tuple[int, int, Stage]] = []
    for index, stage in enumerate(stages):
        if found and found[-1][2] == stage:
            found[-1] = (found[-1][0], index, stage)
        else:
            found.append((index, index, stage))
    return found


def _row(*cells: str) -> str:
    return f"{cells[0]:<7}" + "".join(f"{cell:>12}" for cell in cells[1:])


def _gib(size: float) -> str:
    return f"{size / GiB:.2f}" if size < 10 * GiB else f"{size / GiB:.1f}"


def _count(number: int) -> str:
    return f"{number / 1e9:.1f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"
