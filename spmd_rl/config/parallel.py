"""Parallel layouts that the model cannot have, or that would compute something else than one rank.

Comes in: a `Config` and the architecture of its checkpoint; goes out: faults. Sizes that do not
divide the ranks are in layout.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from spmd_rl.architecture import Architecture, stages
from spmd_rl.config.errors import Fault
from spmd_rl.config.schema import Config

TE_ONLY = {"layernorm", "moe_act", "mla_up_proj"}
VPP = "virtual_pipeline_model_parallel_size"


def check(cfg: Config, architecture: Architecture) -> Iterator[Fault]:
    yield from _pipeline(cfg, architecture)
    yield from _splits(cfg, architecture)
    if any(architecture.expert_layers):
        yield from _experts(cfg, architecture)
    yield from _recompute(cfg, architecture)
    if cfg.megatron.get("optimizer_cpu_offload") and cfg.placement.device == "cpu":
        yield _fault(
            "optimizer_cpu_offload",
            "has no effect on a CPU and fails in megatron-core: leave it out",
        )


def _fault(key: str, rest: str) -> Fault:
    return Fault((f"megatron.{key}",), f"megatron.{key} {rest}")


def _number(cfg: Config, key: str) -> int:
    """A number of `megatron:`, 1 by default; what is no positive number is reported by others."""
    value = cfg.megatron.get(key)
    return value if isinstance(value, int) and value > 0 else 1


def _pipeline(cfg: Config, architecture: Architecture) -> Iterator[Fault]:
    megatron = cfg.megatron
    pp = megatron.get("pipeline_model_parallel_size") or 1
    try:
        stages(architecture, megatron, pp)
    except ValueError as error:
        yield Fault(("megatron.pipeline_model_parallel_size",), str(error))
    if not megatron.get(VPP):
        return
    if pp == 1:
        yield _fault(
            VPP, "needs megatron.pipeline_model_parallel_size above 1: raise it or leave it out"
        )
    if megatron.get("batch_p2p_comm") or megatron.get("overlap_p2p_comm") is False:
        yield _fault(
            VPP,
            "with batch_p2p_comm, or without overlap_p2p_comm, gives wrong results at two stages "
            "(seen with megatron-core 0.16): leave both keys out",
        )


def _splits(cfg: Config, architecture: Architecture) -> Iterator[Fault]:
    """What tensor and expert parallelism split must divide."""
    tp, ep = "tensor_model_parallel_size", "expert_model_parallel_size"
    ways, shape = _number(cfg, tp), architecture.transformer
    heads, groups = shape["num_attention_heads"], shape["num_query_groups"]
    if heads % ways:
        yield _fault(
            tp, f"{ways} does not divide the model's {heads} attention heads: choose a divisor"
        )
    elif groups % ways and ways % groups:
        yield _fault(
            tp,
            f"{ways} neither divides the model's {groups} key-value heads nor is a multiple of "
            "them: choose one that does",
        )
    elif shape["ffn_hidden_size"] % ways:
        yield _fault(
            tp,
            f"{ways} does not divide the model's intermediate_size {shape['ffn_hidden_size']}: "
            "choose a divisor",
        )
    ways, experts = _number(cfg, ep), shape.get("num_moe_experts") or 0
    if ways > 1 and not experts:
        yield _fault(ep, f"{ways}: the model has no experts, leave the key out")
    elif experts % ways:
        yield _fault(ep, f"{ways} does not divide the model's {experts} experts: choose a divisor")


def _experts(cfg: Config, architecture: Architecture) -> Iterator[Fault]:
    megatron = cfg.megatron
    tp = megatron.get("tensor_model_parallel_size") or 1
    etp = megatron.get("expert_tensor_parallel_size") or tp
    width = architecture.transformer["moe_ffn_hidden_size"]
    if tp > 1 and megatron.get("sequence_parallel") is False:
        yield _fault(
            "sequence_parallel",
            "false: a mixture of experts with tensor parallelism needs it: leave the key out",
        )
    if etp > 1 and cfg.placement.device == "cpu":
        yield _fault(
            "expert_tensor_parallel_size",
            f"{etp} (unset it is the tensor-parallel size) cannot run on a CPU, whose gloo gathers "
            "no uneven shares: set it to 1",
        )
    elif width % etp:
        yield _fault(
            "expert_tensor_parallel_size",
            f"{etp} does not divide the experts' width {width}: choose a divisor",
        )
    for key in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
        if megatron.get(key):
            yield _fault(key, "is not supported: the loss is the policy's alone, leave it out")


def _recompute(cfg: Config, architecture: Architecture) -> Iterator[Fault]:
    megatron = cfg.megatron
    how, method = megatron.get("recompute_granularity"), megatron.get("recompute_method")
    if how == "full" and (method is None or megatron.get("recompute_num_layers") is None):
        yield _fault(
            "recompute_granularity",
            "full needs recompute_method (uniform or block) and recompute_num_layers: give them",
        )
    elif how == "full" and method == "uniform":
        yield from _uniform(cfg, architecture)
    needing_te = sorted(TE_ONLY & set(megatron.get("recompute_modules") or ()))
    if how == "selective" and needing_te and cfg.placement.device == "cpu":
        yield _fault(
            "recompute_modules",
            f"{', '.join(needing_te)} cannot be recomputed without Transformer Engine, which a CPU "
            "has not: leave them out",
        )
    if how == "selective" and method is not None:
        yield _fault(
            "recompute_method", "is for recompute_granularity: full; with selective leave it out"
        )


def _uniform(cfg: Config, architecture: Architecture) -> Iterator[Fault]:
    """megatron-core (0.16) runs past the last layer where the number does not divide."""
    number, chunks = _number(cfg, "recompute_num_layers"), _number(cfg, VPP)
    pp = _number(cfg, "pipeline_model_parallel_size")
    try:
        sizes = [len(stage) for stage in stages(architecture, cfg.megatron, pp)]
    except ValueError:
        return  # said already
    for size in sizes:
        if size // chunks % number:
            yield _fault(
                "recompute_num_layers",
                f"{number} does not divide the {size // chunks} layers of a pipeline stage, as "
                "recompute_method: uniform needs: choose a divisor, 1 always is",
            )
            return
