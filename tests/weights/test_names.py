"""The name map: every family's tensors there and back under any tensor-parallel split."""

from __future__ import annotations

import pytest
import torch

from spmd_rl.architecture import parse
from spmd_rl.weights.names import FAMILIES, NameMap, global_name

HF = dict(
    hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=2, head_dim=4, vocab_size=101,
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_shared_experts=1,
    q_lora_rank=16, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4,
)  # fmt: skip
HEADS, GROUPS, HEAD_DIM, HIDDEN, FFN, VOCAB = 8, 2, 4, 48, 64, 101
SHAPES = {
    "embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN),
    "q_proj.weight": (HEADS * HEAD_DIM, HIDDEN), "q_proj.bias": (HEADS * HEAD_DIM,),
    "k_proj.weight": (GROUPS * HEAD_DIM, HIDDEN), "k_proj.bias": (GROUPS * HEAD_DIM,),
    "v_proj.weight": (GROUPS * HEAD_DIM, HIDDEN), "v_proj.bias": (GROUPS * HEAD_DIM,),
    "o_proj.weight": (HIDDEN, HEADS * HEAD_DIM), "gate_proj.weight": (FFN, HIDDEN),
    "gate_up_proj.weight": (2 * FFN, HIDDEN),
    "up_proj.weight": (FFN, HIDDEN), "down_proj.weight": (HIDDEN, FFN),
    "q_norm.weight": (HEAD_DIM,), "k_norm.weight": (HEAD_DIM,),
    "q_a_proj.weight": (16, HIDDEN), "q_a_layernorm.weight": (16,),
    "q_b_proj.weight": (HEADS * 8, 16), "kv_a_proj_with_mqa.weight": (12, HIDDEN),
    "kv_a_layernorm.weight": (8,), "kv_b_proj.weight": (HEADS * 8, 8),
    "gate.weight": (4, HIDDEN), "gate.e_score_correction_bias": (4,),
}  # fmt: skip
COUNTS = {
    "llama": 18, "qwen2": 24, "qwen3": 22, "qwen3_moe": 22 + 2 + 24, "glm4": 2 * 13,
    "glm4_moe": 28 + 4 + 24 + 6, "deepseek_v3": 2 * 15 + 4 + 24 + 2, "kimi_k2": 60,
}  # fmt: skip


def names_of(family: str, tied: bool = False) -> NameMap:
    return NameMap(parse(HF | {"model_type": family, "tie_word_embeddings": tied}))


def megatron_names(family: str) -> list[str]:
    """Of two layers and four experts, with what only some layers or checkpoints have."""
    named = (
        n.format(layer=i, expert=e) for n in FAMILIES[family] for i in (0, 1) for e in range(4)
    )
    return list(dict.fromkeys(named))


def hf_tensor(name: str) -> torch.Tensor:
    shape = next((s for end, s in SHAPES.items() if name.endswith(end)), (HIDDEN,))
    seed = sum(map(ord, name))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def local_shape(names: NameMap, name: str, tp: int) -> torch.Size:
    entry = names.sources(name)
    parts = [hf_tensor(hf).shape for hf in entry.hf_names]
    if entry.kind == "whole":
        return parts[0]
    if entry.kind == "columns":
        return torch.Size((parts[0][0], parts[0][1] // tp))
    return torch.Size((-(-sum(p[0] for p in parts) // tp), *parts[0][1:]))


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(family, tp):
    names = names_of(family)
    seen = set()
    for name in megatron_names(family):
        shape = local_shape(names, name, tp)
        shards = [names.shard(name, hf_tensor, shape, rank, tp) for rank in range(tp)]
        assert all(shard.shape == shape for shard in shards)
        for hf, tensor in names.to_hf(name, names.join(name, shards)):
            assert torch.equal(tensor, hf_tensor(hf)), hf
            seen.add(hf)
    assert {"lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"} <= seen
    assert len(seen) == 3 + COUNTS[family]


def test_query_groups_are_interleaved():
    names = names_of("llama")
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    whole = names.shard(name, hf_tensor, torch.Size((48, HIDDEN)), 0, 1)
    q, k, v = (hf_tensor(f"model.layers.1.self_attn.{x}_proj.weight") for x in "qkv")
    second = torch.cat([q[16:32], k[4:8], v[4:8]])
    assert torch.equal(whole[24:], second)
    assert torch.equal(names.shard(name, hf_tensor, torch.Size((24, HIDDEN)), 1, 2), second)


def test_tied_embeddings_are_one_tensor():
    names = names_of("llama", tied=True)
    shape = torch.Size((51, HIDDEN))
    output = names.shard("output_layer.weight", hf_tensor, shape, 1, 2)
    assert torch.equal(output[:50], hf_tensor("model.embed_tokens.weight")[51:])
    assert (output[50:] == 0).all()
    assert names.to_hf("output_layer.weight", output) == []


def test_transformer_engine_names_mean_the_same():
    names = names_of("qwen2")
    fused = names.entry("decoder.layers.3.self_attention.linear_qkv.layer_norm_weight")
    assert fused == names.entry("decoder.layers.3.input_layernorm.weight")
    assert fused.hf_names == ("model.layers.3.input_layernorm.weight",)
    fused = names.entry("decoder.layers.3.mlp.linear_fc1.layer_norm_weight")
    assert fused.hf_names == ("model.layers.3.post_attention_layernorm.weight",)

    latent = names_of("deepseek_v3")
    fused = latent.entry("decoder.layers.3.self_attention.linear_kv_up_proj.layer_norm_weight")
    assert fused.hf_names == ("model.layers.3.self_attn.kv_a_layernorm.weight",)
    expert = latent.entry("decoder.layers.3.mlp.experts.linear_fc2.weight7")
    assert expert == latent.entry("decoder.layers.3.mlp.experts.local_experts.7.linear_fc2.weight")
    assert expert.expert and expert.hf_names == ("model.layers.3.mlp.experts.7.down_proj.weight",)


def test_layers_and_experts_are_counted_over_ranks_and_unknown_names_refused():
    assert global_name("decoder.layers.1.mlp.linear_fc2.weight", 4).startswith("decoder.layers.5.")
    assert global_name("decoder.final_layernorm.weight", 4) == "decoder.final_layernorm.weight"
    local = "decoder.layers.1.mlp.experts.linear_fc1.weight2"
    assert global_name(local, 4, 8) == (
        "decoder.layers.5.mlp.experts.local_experts.10.linear_fc1.weight"
    )
    with pytest.raises(KeyError, match="decoder.layers.0.mamba"):
        names_of("llama").entry("decoder.layers.0.mamba")
