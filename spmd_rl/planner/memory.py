"""Bytes of each kind on each pipeline stage's ranks in each phase of a rollout, against a GPU's
memory.

In: a configuration, a placement, an architecture. Out: a `Plan`. Weights, gradients and optimizer
state are exact (up to padding of buffers); activations are an estimate of the fullest moment;
ALLOWANCE stands for what neither counts. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from spmd_rl.architecture import Architecture, same_shape
from spmd_rl.architecture import stages as stages_of
from spmd_rl.config.schema import Config
from spmd_rl.planner import shape
from spmd_rl.planner.shape import Count, Split
from spmd_rl.types import Placement

GiB = 1024**3
ALLOWANCE = 4 * GiB  # CUDA context, NCCL buffers, fragmentation
RESIDUE = 4 * GiB  # what a sleeping engine keeps: contexts, NCCL, graphs' pools
CHUNK_BYTES = 256 * 1024**2  # of fp32 logits at once, where train.log_probs_chunk_size is -1
STATIC = 0.88  # SGLang's mem_fraction_static where the configuration says none


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU: memory, dense bfloat16 operations a second."""

    name: str
    memory: int
    flops: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 80 * GiB, 312e12),
        Gpu("h20", 96 * GiB, 148e12),
        Gpu("h100", 80 * GiB, 989e12),
        Gpu("h200", 141 * GiB, 989e12),
        Gpu("b200", 180 * GiB, 2250e12),
    )
}


@dataclass(frozen=True)
class Stage:
    """One rank of a pipeline stage; all its ranks hold as much. Bytes, unless said otherwise."""

    layers: int
    parameters: Count  # numbers
    weights: int
    gradients: int
    optimizer: int
    critic: int  # weights, gradients and optimizer of ppo's critic; 0 without one
    teacher: int  # weights of a distillation's that has not the policy's shape
    replay: int  # a rollout's experts, for routing replay
    activations: int
    logits: int
    engine: int  # weights and cache of the engine's part on this rank
    buckets: int
    host: int
    phases: dict[str, int] = field(default_factory=dict)  # bytes on the GPU in each phase

    @property
    def peak(self) -> int:
        return max(self.phases.values())


@dataclass(frozen=True)
class Plan:
    architecture: Architecture
    placement: Placement
    gpu: Gpu
    split: Split
    stages: list[Stage]
    engine_weights: int  # of one rank
    cache_tokens: int  # of one engine
    micro_batches: int  # of a step on each data-parallel rank
    mean_length: int
    step_flops: float  # of an optimizer step, on all ranks
    efficiency: dict[str, float]  # what expected MFU is the product of

    @property
    def fits(self) -> bool:
        return all(stage.peak <= self.gpu.memory for stage in self.stages)

    @property
    def mfu(self) -> float:
        product = 1.0
        for factor in self.efficiency.values():
            product *= factor
        return product


def plan(
    cfg: Config,
    placement: Placement,
    architecture: Architecture,
    gpu: Gpu,
    mean_length: int | None = None,
    teacher: Architecture | None = None,
) -> Plan:
    """What the run needs. ValueError in a sentence where layers do not divide over stages.
    `teacher`: of a distillation in the trainer, where it is known."""
    megatron = cfg.megatron
    split = _split(cfg, placement, architecture)
    tokens = _micro_batch_tokens(cfg, architecture)
    mean_length = mean_length or _mean_length(cfg, architecture)
    step = cfg.train.global_batch_size or 1
    per_rank = -(-step // placement.dp)
    if cfg.train.use_dynamic_batch_size:
        micro_batches = max(-(-per_rank * mean_length // (tokens * placement.cp)), 1)
    else:
        micro_batches = -(-per_rank // cfg.train.micro_batch_size)
    engine_weights, engine, cache_tokens = _engine(cfg, placement, architecture, gpu)
    if teacher is not None and same_shape(teacher, architecture):
        teacher = None
    stages = [
        _stage(
            cfg, placement, architecture, split, index, kinds, tokens, micro_batches,
            engine, engine_weights, teacher, mean_length,
        )
        for index, kinds in enumerate(stages_of(architecture, megatron, placement.pp))
    ]  # fmt: skip
    return Plan(
        architecture=architecture,
        placement=placement,
        gpu=gpu,
        split=split,
        stages=stages,
        engine_weights=engine_weights,
        cache_tokens=cache_tokens,
        micro_batches=micro_batches,
        mean_length=mean_length,
        # a critic costs as much again, but for its logits
        step_flops=3.0
        * step
        * shape.forward_flops(architecture, mean_length)
        * (2 if cfg.use_critic else 1),
        efficiency=_efficiency(cfg, placement, architecture, micro_batches),
    )


def _split(cfg: Config, placement: Placement, architecture: Architecture) -> Split:
    etp = int(cfg.megatron.get("expert_tensor_parallel_size") or placement.tp)
    experts = any(architecture.expert_layers)
    sequence = cfg.megatron.get("sequence_parallel", experts)
    return Split(placement.tp, placement.ep if experts else 1, etp, placement.tp if sequence else 1)


def _micro_batch_tokens(cfg: Config, architecture: Architecture) -> int:
    """Tokens of a micro-batch on one rank, at most."""
    train, longest = cfg.train, _longest(cfg, architecture)
    if train.use_dynamic_batch_size and train.max_tokens_per_gpu:
        return train.max_tokens_per_gpu
    cp = cfg.megatron.get("context_parallel_size", 1)
    return -(-train.micro_batch_size * longest // cp)


def _longest(cfg: Config, architecture: Architecture) -> int:
    """Tokens of a sample, at most."""
    rollout = cfg.rollout
    if rollout.rollout_max_context_len:
        return rollout.rollout_max_context_len
    prompt = cfg.data.rollout_max_prompt_len or 1024
    return min(prompt + rollout.rollout_max_response_len, architecture.max_positions)


def _mean_length(cfg: Config, architecture: Architecture) -> int:
    """A guess, half the longest, where nobody says better."""
    return max(_longest(cfg, architecture) // 2, 1)


def _stage(
    cfg: Config,
    placement: Placement,
    architecture: Architecture,
    split: Split,
    index: int,
    kinds: list[bool],
    tokens: int,
    micro_batches: int,
    engine: int,
    engine_weights: int,
    teacher: Architecture | None,
    mean_length: int,
) -> Stage:
    megatron, pp = cfg.megatron, placement.pp
    item = 2 if megatron.get("bf16") or megatron.get("fp16") else 4
    parameters = count(architecture, split, index, kinds, pp)
    weights, gradients, optimizer, on_host = _learner(cfg, placement, split, parameters, item)
    critic = 0
    if cfg.use_critic:
        theirs = count(architecture, split, index, kinds, pp, values=True)
        *on_device, hosted = _learner(cfg, placement, split, theirs, item)
        critic, on_host = sum(on_device), on_host + hosted
    second = 0
    if teacher is not None:
        theirs = stages_of(teacher, megatron, pp)[index]
        second = item * count(teacher, _split(cfg, placement, teacher), index, theirs, pp).total
    replay, told = _replay(cfg, placement, architecture, kinds, mean_length)
    last = index == pp - 1
    held = _in_flight(megatron, pp, index, micro_batches)
    activations = int(_activations(cfg, architecture, split, kinds, item, held) * tokens)
    if last:  # the final norm's input, and what logits are made from
        activations += 2 * tokens * architecture.transformer["hidden_size"] * item
    logits = _logits(cfg, architecture, placement.tp, tokens, item) if last else 0
    bucket = 0
    if placement.engines:
        gathered = shape.largest(architecture, split) * item
        bucket = 2 * cfg.debug.update_weight_buffer_size + gathered
    training = weights + gradients + optimizer
    place, phases = cfg.placement, {}
    asleep = bool(place.offload_train)
    if not placement.colocate:
        engine = engine_weights = 0
    resting = 0 if asleep else training + critic + second
    actor, beside = training + second + replay + activations + logits, ALLOWANCE
    if placement.engines and placement.colocate:
        beside += RESIDUE if place.offload_rollout else engine
    # actor and critic take turns, but are saved together
    phases["train"] = (max(actor, critic + activations) if asleep else actor + critic) + beside
    if critic and asleep and cfg.checkpoint.save_interval:
        phases["save"] = training + second + critic + beside
    if placement.engines and placement.colocate:
        phases["push"] = weights + (0 if asleep else gradients + optimizer + critic) + bucket
        phases["push"] += second
        phases["push"] += engine_weights if place.offload_rollout else engine
        phases["push"] += ALLOWANCE
        phases["generate"] = resting + engine + ALLOWANCE
    elif placement.engines:
        phases["push"] = training + second + (0 if asleep else critic) + bucket + ALLOWANCE
    host = on_host + (training + critic + second if asleep else 0) + told
    algo = cfg.algo
    held = int(algo.loss_type == "policy_loss" and bool(algo.use_kl_loss or algo.kl_coef))
    held += int(algo.use_opd and algo.opd_type == "megatron" and teacher is None)
    if held:  # the reference's, a teacher's, and the model's own while they are swapped
        host += (held + 1) * weights
    return Stage(
        len(kinds), parameters, weights, gradients, optimizer, critic, second, replay,
        activations, logits, engine, bucket, host, phases,
    )  # fmt: skip


def _replay(
    cfg: Config, placement: Placement, architecture: Architecture, kinds: list[bool], length: int
) -> tuple[int, int]:
    """Experts of a rollout's tokens that routing replay keeps: on the device those of the stage's
    layers, on the host those that engines told of all.
    """
    algo, experts = cfg.algo, architecture.transformer.get("num_moe_experts") or 0
    if not experts or not (algo.use_routing_replay or algo.use_rollout_routing_replay):
        return 0, 0
    samples = cfg.rollout.rollout_batch_size * cfg.rollout.n_samples_per_prompt
    tokens = -(-samples // placement.dp) * length
    layer = architecture.transformer["moe_router_topk"] * (1 if experts <= 256 else 2)
    told = tokens * sum(architecture.expert_layers) * layer
    known = 1  # a byte says of which tokens they are known
    return tokens * (sum(kinds) * layer + known), told * algo.use_rollout_routing_replay


def count(
    architecture: Architecture,
    split: Split,
    index: int,
    kinds: list[bool],
    pp: int,
    values: bool = False,
) -> Count:
    """Parameters of a rank of pipeline stage `index`; `values`: of a critic, which has a value
    layer in place of the output layer.
    """
    total = Count()
    for experts in kinds:
        total += shape.layer(architecture, experts, split)
    first, last, hidden = index == 0, index == pp - 1, architecture.transformer["hidden_size"]
    ends = first + last
    if values or (architecture.tied and pp == 1):
        ends = first
    rest = hidden * last + (hidden + 1) * (last and values)
    return total + Count(ends * shape.embedding(architecture, split.tp) + rest)


def _learner(
    cfg: Config, placement: Placement, split: Split, parameters: Count, item: int
) -> tuple[int, int, int, int]:
    """Weights, gradients and optimizer of a model that learns, and what of it is on the host."""
    megatron = cfg.megatron
    reduced = 4 if megatron.get("grad_reduce_in_fp32", True) else item
    optimizer = _optimizer(megatron, placement, split, parameters, item)
    on_host = 0
    if megatron.get("optimizer_cpu_offload"):
        on_host = int(optimizer * megatron.get("optimizer_offload_fraction", 1.0))
    return parameters.total * item, parameters.total * reduced, optimizer - on_host, on_host


def _optimizer(
    megatron: dict[str, Any], placement: Placement, split: Split, parameters: Count, item: int
) -> int:
    """Adam's two moments, and the fp32 copy of low-precision weights, on one rank."""
    each = 8 + (4 if item == 2 else 0)
    if not megatron.get("use_distributed_optimizer", True):
        return each * parameters.total
    copies = placement.dp * placement.cp
    ranks = len(placement.train_ranks) // (split.etp * split.ep * placement.pp)
    return each * (-(-parameters.dense // copies) + -(-parameters.experts // max(ranks, 1)))


def _in_flight(megatron: dict[str, Any], pp: int, index: int, micro_batches: int) -> float:
    """Micro-batches whose activations a stage holds at once, in units of all its layers."""
    chunks = megatron.get("virtual_pipeline_model_parallel_size") or 1
    if chunks == 1:
        return min(pp - index, micro_batches)
    held = (pp - index - 1) * 2 + (chunks - 1) * pp + 1
    return min(held, micro_batches * chunks) / chunks


def _activations(
    cfg: Config,
    architecture: Architecture,
    split: Split,
    kinds: list[bool],
    item: int,
    held: float,
) -> float:
    """Bytes for each token of a micro-batch at the fullest moment of a stage."""
    megatron = cfg.megatron
    how, method = megatron.get("recompute_granularity"), megatron.get("recompute_method")
    modules: set[str] = set()
    if how == "selective":
        modules = set(megatron.get("recompute_modules") or ["core_attn"])
    plain = cfg.placement.device == "cpu"
    sizes = [shape.activations(architecture, kind, split, modules, item, plain) for kind in kinds]
    if how != "full" or not sizes:
        return held * sum(sizes)
    inputs = architecture.transformer["hidden_size"] / split.sequence * item
    number = megatron.get("recompute_num_layers") or 1
    if method == "block":  # only so many layers, from the first, are recomputed
        kept = sum(sizes[number:])
        return held * (kept + inputs * min(number, len(sizes))) + max(sizes[:number], default=0.0)
    checkpoints = -(-len(sizes) // number)
    return held * checkpoints * inputs + max(sizes) * min(number, len(sizes))


def _logits(cfg: Config, architecture: Architecture, tp: int, tokens: int, item: int) -> int:
    """Logits of a micro-batch, their gradient, and the fp32 rows worked on at once."""
    columns = -(-architecture.vocab_size // tp)
    chunk = cfg.train.log_probs_chunk_size
    space = 4 * columns * min(chunk, 2 * tokens) if chunk > 0 else CHUNK_BYTES
    return 2 * tokens * columns * item + space


def _engine(
    cfg: Config, placement: Placement, architecture: Architecture, gpu: Gpu
) -> tuple[int, int, int]:
    """Bytes of weights and of everything on a rank of an engine, and the tokens it can hold."""
    if not placement.engines:
        return 0, 0, 0
    tp = cfg.placement.rollout_num_gpus_per_engine
    quantised = architecture.hf.get("quantization_config") is not None
    weights = int(shape.whole(architecture) * (1.0 if quantised else 2.0) / tp)
    fraction = cfg.sglang.get("mem_fraction_static") or STATIC
    everything = int(gpu.memory * fraction)
    ways = cfg.sglang.get("dp_size") or 1
    per_token = shape.cache_bytes(architecture, max(tp // ways, 1))
    return weights, max(everything, weights), max(everything - weights, 0) // per_token * ways


def _efficiency(
    cfg: Config, placement: Placement, architecture: Architecture, micro_batches: int
) -> dict[str, float]:
    """Pipeline bubble and recomputation follow from the configuration; kernels are a guess."""
    chunks = cfg.megatron.get("virtual_pipeline_model_parallel_size") or 1
    found = {"kernels": 0.25 if any(architecture.expert_layers) else 0.45}
    if placement.pp > 1:
        found["bubble"] = micro_batches / (micro_batches + (placement.pp - 1) / chunks)
    if cfg.megatron.get("recompute_granularity") == "full":
        found["recompute"] = 0.75
    return found
