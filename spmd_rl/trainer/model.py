"""Builds the Megatron model of an architecture, on this rank's part of the layout.

In: the architecture, `megatron:` options, the groups and the device. Out: model chunks (one per
virtual pipeline stage) with uninitialised weights. Layers are Transformer Engine's when it is
installed, else plain torch's.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from spmd_rl.architecture import Architecture, contradictions
from spmd_rl.trainer.parallel import Groups
from spmd_rl.trainer.specs import block_spec
from spmd_rl.weights import hf
from spmd_rl.weights.names import NameMap


def use_bf16(megatron: dict[str, Any], device: torch.device) -> bool:
    """`megatron.bf16`; unset it is on for GPUs and off for CPUs."""
    return bool(megatron.get("bf16", device.type == "cuda"))


def have_te(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("transformer_engine") is not None


def transformer_config(
    architecture: Architecture, megatron: dict[str, Any], groups: Groups, device: torch.device
) -> Any:
    """Megatron's TransformerConfig: the checkpoint's architecture, our defaults, the user's
    options.
    """
    from megatron.core.transformer import transformer_config as configs

    faults = contradictions(architecture, megatron)
    if faults:
        raise ValueError("\n".join(faults))
    latent = architecture.latent
    cls = configs.MLATransformerConfig if latent else configs.TransformerConfig
    dtype = torch.bfloat16 if use_bf16(megatron, device) else torch.float32
    on_gpu = device.type == "cuda"
    defaults = dict(
        architecture.transformer,
        activation_func=F.silu,
        rotary_interleaved=architecture.rope.interleaved and not latent,  # MLA knows by itself
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        perform_initialization=False,  # every weight is loaded
        use_cpu_initialization=not on_gpu,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # variable_seq_lengths wants it, dense models too
        calculate_per_token_loss=True,  # gradients are summed; loss.py has scaled them already
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        bias_dropout_fusion=on_gpu,
        bias_activation_fusion=on_gpu,
        apply_rope_fusion=have_te(device)
        and (not latent or architecture.transformer["rope_type"] == "yarn"),
        masked_softmax_fusion=False,
        transformer_impl="transformer_engine" if have_te(device) else "local",
        sequence_parallel=sequence_parallel(architecture, megatron, groups.tp_size),
        # batched, two virtual stages on two ranks silently take each other's tensors
        overlap_p2p_comm=bool(megatron.get("virtual_pipeline_model_parallel_size")),
        batch_p2p_comm=not megatron.get("virtual_pipeline_model_parallel_size"),
        moe_grouped_gemm=have_te(device),
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_router_bias_update_rate=0.0,  # the bias stays the checkpoint's
    )
    sizes = dict(
        tensor_model_parallel_size=groups.tp_size,
        pipeline_model_parallel_size=groups.pp_size,
        context_parallel_size=groups.cp_size,
        expert_model_parallel_size=groups.ep_size,
        expert_tensor_parallel_size=groups.etp_size,
    )
    names = {f.name for f in dataclasses.fields(cls)}
    user = {k: v for k, v in megatron.items() if k in names and k != "sequence_parallel"}
    values = defaults | user | sizes
    return cls(**{k: v for k, v in values.items() if k in names})


def sequence_parallel(architecture: Architecture, megatron: dict[str, Any], tp_size: int) -> bool:
    """`megatron.sequence_parallel`; unset it is on for mixtures of experts, which need it."""
    experts = "num_moe_experts" in architecture.transformer
    return bool(megatron.get("sequence_parallel", experts)) and tp_size > 1


def padded_vocab(vocab_size: int, tp_size: int) -> int:
    """Rows of the embedding: divisible over tensor-parallel ranks."""
    return -(-vocab_size // tp_size) * tp_size


def build(
    architecture: Architecture,
    config: Any,
    device: torch.device,
    value_seed: int | None = None,
) -> list[torch.nn.Module]:
    """This rank's model chunks; weights are allocated, not set. With `value_seed` a value layer,
    drawn from that seed, stands in place of the output layer.
    """
    from megatron.core import parallel_state as mpu

    stages = config.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(stages) if stages else [None]:
        at: dict[str, Any] = dict(ignore_virtual=False, vp_stage=stage)
        chunks.append(
            _build_chunk(
                architecture,
                config,
                device,
                value_seed,
                pre_process=mpu.is_pipeline_first_stage(**at),
                post_process=mpu.is_pipeline_last_stage(**at),
                vp_stage=stage,
            )
        )
    return chunks


def _build_chunk(
    architecture: Architecture,
    config: Any,
    device: torch.device,
    value_seed: int | None,
    **stage: Any,
) -> torch.nn.Module:
    from megatron.core.models.gpt import GPTModel

    te = config.transformer_impl == "transformer_engine"
    rope = te and not architecture.latent
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = GPTModel(
            config=config,
            transformer_layer_spec=block_spec(architecture, config, te, stage["vp_stage"]),
            vocab_size=padded_vocab(architecture.vocab_size, config.tensor_model_parallel_size),
            max_sequence_length=architecture.max_positions,
            share_embeddings_and_output_weights=architecture.tied and value_seed is None,
            position_embedding_type="rope" if rope else "none",  # else attention turns by itself
            rotary_percent=architecture.rope.dimensions / config.kv_channels if rope else 1.0,
            rotary_base=architecture.rope.theta,  # type: ignore[arg-type]
            **stage,
        )
    if rope:
        model.rotary_pos_emb.inv_freq = architecture.rope.inv_freq().to(device)
    model.vp_stage = stage["vp_stage"]
    if stage["post_process"] and value_seed is not None:
        model.output_layer = ValueLayer(config, value_seed, model.output_layer.tp_group)
    if stage["post_process"]:
        _OutputRows(model.output_layer, config)
    return model.to(device)


def mark_split(parameters: Iterable[tuple[str, torch.nn.Parameter]], names: NameMap) -> None:
    """Say which parameters are split over tensor-parallel ranks, and which are experts'.

    megatron-core says the first while initialising weights, which is skipped here; without it the
    norm of the gradients would count only rank 0's parts. The second it says only when experts are
    spread over ranks; without it their gradients are not added up where
    expert_tensor_parallel_size is below tensor_model_parallel_size.
    """
    from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes

    for name, parameter in parameters:
        if names.entry(name).expert:
            parameter.allreduce = False  # type: ignore[attr-defined]
        kind = names.sources(name).kind
        if kind != "whole" and not hasattr(parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(parameter, True, int(kind == "columns"), 1)


class ValueLayer(torch.nn.Module):
    """One number for each row, in float32: hidden · weight + bias. Whole on every tensor-parallel
    rank, and the same under any layout.
    """

    def __init__(self, config: Any, seed: int, tp_group: Any):
        super().__init__()
        size, dtype = config.hidden_size, config.params_dtype
        drawn = torch.randn(1, size, generator=torch.Generator("cpu").manual_seed(seed))
        # Values start near 0, where the first advantages are the rewards themselves.
        self.weight = torch.nn.Parameter((drawn / (size + 1)).to(dtype))
        self.bias = torch.nn.Parameter(torch.zeros(1, dtype=dtype))
        self.tp_group = tp_group

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        """[rows, 1, hidden] -> [rows, 1, 1]; called as Megatron calls its output layer."""
        weight, bias = self.weight.float(), self.bias.float()
        return F.linear(hidden.float(), weight, bias), None


class _OutputRows:
    """Lets the output (or value) layer work only on the rows that predict something.

    Prompt tokens need none, and logits are the largest activation of all. Set `output_layer.rows`
    to the token indices of a micro-batch before its forward pass; None makes all.
    """

    def __init__(self, output_layer: torch.nn.Module, config: Any):
        layer: Any = output_layer
        layer.rows = None
        self.group = layer.tp_group if config.sequence_parallel else None
        if self.group is not None:  # the rows are chosen from the gathered sequence
            layer.sequence_parallel = False
            layer.allreduce_dgrad = True
        layer.register_forward_pre_hook(self)

    def __call__(self, layer: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        hidden = args[0]
        if self.group is not None:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.group
            )
        if layer.rows is not None:
            hidden = hidden.index_select(0, layer.rows)
        return (hidden, *args[1:])


def read_weights(
    directory: str | Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    names: NameMap,
    groups: Groups,
) -> None:
    """Fill this rank's `tensors` (by global Megatron name) from a Hugging Face directory."""
    split, experts = (groups.tp_rank, groups.tp_size), (groups.etp_rank, groups.etp_size)
    hf.load(directory, tensors, names, split, experts)
