"""Which modules a pipeline stage's layers are made of: Megatron's layer specifications, with plain
torch in place of Transformer Engine where that is not installed.

In: the architecture and Megatron's configuration. Out: a block specification. Builds nothing.
"""

from __future__ import annotations

from typing import Any

from spmd_rl.architecture import Architecture


def block_spec(architecture: Architecture, config: Any, te: bool, vp_stage: int | None) -> Any:
    """Layers of this rank's stage `vp_stage`, dense or with experts as the checkpoint has them."""
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    norm = _norm(te)
    kinds = set(architecture.expert_layers)
    made = {experts: _layer(architecture, config, te, experts) for experts in kinds}
    layers = [made[architecture.expert_layers[i]] for i in _layers_here(config, vp_stage)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def _layers_here(config: Any, vp_stage: int | None) -> list[int]:
    """Indices, from 0, of this stage's layers."""
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        return layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    return list(range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage)))


def _norm(te: bool) -> Any:
    if te:
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    from spmd_rl.trainer.layers import TorchRMSNorm

    return TorchRMSNorm


def _layer(architecture: Architecture, config: Any, te: bool, experts: bool) -> Any:
    from megatron.core.models.gpt import gpt_layer_specs as specs

    from spmd_rl.trainer.layers import PostNormLayer

    options: dict[str, Any] = dict(
        num_experts=config.num_moe_experts if experts else None,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=architecture.latent,
    )
    if te:
        layer = specs.get_gpt_layer_with_transformer_engine_spec(**options)
    else:
        layer = specs.get_gpt_layer_local_spec(normalization="RMSNorm", **options)
        _use_torch(architecture, layer.submodules, experts)
    if architecture.post_norms:
        layer.module = PostNormLayer
        layer.params = {"norm": _norm(te)}
    return layer


def _mend_latent_attention(attention: Any) -> None:
    """megatron-core (0.15, 0.16) without Transformer Engine: MLA takes a stand-in for its class and
    fails in isinstance; and with column-parallel down projections, the default, the gradient of
    the keys' rotary part lacks the other tensor-parallel ranks' heads.
    """
    from megatron.core.post_training.modelopt.layers import Linear
    from megatron.core.transformer import multi_latent_attention

    if not isinstance(multi_latent_attention.TELinear, type):
        multi_latent_attention.HAVE_TE = False
    attention.linear_q_down_proj = attention.linear_kv_down_proj = Linear  # whole on every rank


def _use_torch(architecture: Architecture, parts: Any, experts: bool) -> None:
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.spec_utils import ModuleSpec

    from spmd_rl.trainer.attention import TorchAttention
    from spmd_rl.trainer.layers import TorchMLP, TorchRMSNorm

    attention = parts.self_attention.submodules
    rope: dict[str, Any] = {}
    if architecture.latent:  # turns queries and keys itself
        _mend_latent_attention(attention)
    else:
        rope["inv_freq"] = architecture.rope.inv_freq()
        rope["interleaved"] = architecture.rope.interleaved
    attention.core_attention = ModuleSpec(module=TorchAttention, params=rope)
    parts.input_layernorm = parts.pre_mlp_layernorm = TorchRMSNorm
    for name in ("q_layernorm", "k_layernorm", "kv_layernorm"):
        if getattr(attention, name, IdentityOp) is not IdentityOp:
            setattr(attention, name, TorchRMSNorm)
    if not experts:
        parts.mlp.module = TorchMLP
