"""config.json of the families, and what is refused in one sentence."""

from __future__ import annotations

import pytest

from spmd_rl.architecture import contradictions, parse, read

HF = dict(
    model_type="qwen3", hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=24, vocab_size=100, rms_norm_eps=1e-6,
    rope_theta=1e6, tie_word_embeddings=True,
)  # fmt: skip


def test_what_a_config_fixes():
    qwen3 = parse(HF)
    assert qwen3.tied and qwen3.rope.theta == 1e6 and qwen3.rope.dimensions == 24
    shape = qwen3.transformer
    assert shape["kv_channels"] == 24 and shape["num_query_groups"] == 2
    assert shape["qk_layernorm"] and not shape["add_qkv_bias"]
    qwen2 = parse(HF | {"model_type": "qwen2", "head_dim": None})
    assert qwen2.transformer["add_qkv_bias"] and qwen2.transformer["kv_channels"] == 16
    llama = {k: v for k, v in HF.items() if k not in ("num_key_value_heads", "tie_word_embeddings")}
    llama = parse(llama | {"model_type": "llama"})
    assert llama.transformer["num_query_groups"] == 4 and not llama.tied


@pytest.mark.parametrize(
    "change,words",
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; supported are llama"),
        ({"hidden_act": "gelu"}, "hidden_act other than silu"),
        ({"use_sliding_window": True}, "sliding-window attention"),
        ({"attention_bias": True}, "attention_bias is not supported"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "rope scaling 'dynamic'"),
    ],
)
def test_what_is_not_supported_is_said(change, words):
    with pytest.raises(ValueError, match=f"model.hf_checkpoint: .*{words}"):
        parse(HF | change)


def test_a_megatron_key_that_contradicts_the_checkpoint():
    assert not contradictions(parse(HF), {"hidden_size": 64, "num_layers": 2, "bf16": True})
    (fault,) = contradictions(parse(HF), {"num_layers": 3})
    assert fault.startswith("megatron.num_layers is 3, but the checkpoint's config.json says 2")


def test_a_missing_directory(tmp_path):
    with pytest.raises(ValueError, match="config.json does not exist"):
        read(tmp_path)
