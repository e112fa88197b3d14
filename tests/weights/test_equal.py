"""The layout of engine tensors, worked out from Hugging Face tensors."""

from __future__ import annotations

import pytest
import torch

from spmd_rl.weights.equal import Layout, difference, expected_checksums, sha256_checksum

CONFIG = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}


def feed(layout, tensors):
    return {name: shards for t in tensors for name, shards in layout.feed(*t)}


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_query_key_value_are_fused_by_rank_and_keys_repeated(tp):
    q, k, v = torch.arange(8)[:, None], torch.arange(10, 14)[:, None], torch.arange(20, 24)[:, None]
    prefix = "model.layers.0.self_attn."
    layout = Layout(CONFIG, tp)
    tensors = [(prefix + f"{n}_proj.weight", t) for n, t in (("q", q), ("k", k), ("v", v))]
    shards = feed(layout, tensors)[prefix + "qkv_proj.weight"]
    expected = {
        1: [[*range(8), *range(10, 14), *range(20, 24)]],
        2: [[0, 1, 2, 3, 10, 11, 20, 21], [4, 5, 6, 7, 12, 13, 22, 23]],
        4: [[0, 1, 10, 11, 20, 21], [2, 3, 10, 11, 20, 21], [4, 5, 12, 13, 22, 23]]
        + [[6, 7, 12, 13, 22, 23]],
    }
    assert [s.flatten().tolist() for s in shards] == expected[tp]


def test_a_fused_tensor_waits_for_its_parts_in_any_order():
    layout = Layout(CONFIG, 2)
    gate, up = torch.arange(4)[:, None], torch.arange(10, 14)[:, None]
    assert not list(layout.feed("model.layers.0.mlp.up_proj.weight", up))
    [(name, shards)] = layout.feed("model.layers.0.mlp.gate_proj.weight", gate)
    assert name == "model.layers.0.mlp.gate_up_proj.weight"
    assert [s.flatten().tolist() for s in shards] == [[0, 1, 10, 11], [2, 3, 12, 13]]


def test_rows_columns_vocabulary_and_norms():
    layout = Layout(CONFIG, 2)
    weight = torch.arange(8).view(2, 4)
    [(_, shards)] = layout.feed("model.layers.0.mlp.down_proj.weight", weight)
    assert [s.tolist() for s in shards] == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    [(_, shards)] = layout.feed("model.embed_tokens.weight", torch.ones(70, 3))
    assert [s.shape[0] for s in shards] == [64, 64] and shards[1][6:].sum() == 0
    [(_, shards)] = layout.feed("model.norm.weight", torch.ones(5))
    assert len(shards) == 2 and shards[0] is shards[1]
    assert not list(layout.feed("lm_head.weight", torch.ones(70, 3)))  # tied: not in the engine


def test_cpu_engines_pad_an_mlp_whose_width_is_no_multiple():
    layout = Layout(CONFIG, 2, ffn_multiple=4)
    prefix = "model.layers.0.mlp."
    gate, up = torch.arange(1, 11)[:, None], torch.arange(11, 21)[:, None]
    tensors = [(prefix + "gate_proj.weight", gate), (prefix + "up_proj.weight", up)]
    shards = feed(layout, tensors)[prefix + "gate_up_proj.weight"]
    padded = [9, 10, *[0] * 6, 19, 20, *[0] * 6]
    assert [s.flatten().tolist() for s in shards] == [[*range(1, 9), *range(11, 19)], padded]
    [(_, shards)] = layout.feed(prefix + "down_proj.weight", gate.T)
    assert [s.flatten().tolist() for s in shards] == [[*range(1, 9)], padded[:8]]


EXPERTS = CONFIG | {"num_experts": 2, "model_type": "glm4_moe"}


@pytest.mark.parametrize("ep", [1, 2])
def test_experts_of_a_layer_are_two_tensors_split_by_width_or_by_expert(ep):
    layout = Layout(EXPERTS, 2, dtype=torch.bfloat16, ep=ep)
    parts = {"gate": torch.tensor([[1], [2]]), "up": torch.tensor([[3], [4]])}
    parts["down"] = torch.tensor([[5, 6]])
    prefix = "model.layers.0.mlp.experts."
    tensors = [
        (f"{prefix}{i}.{n}_proj.weight", t + 10 * i) for i in (1, 0) for n, t in parts.items()
    ]
    found = feed(layout, tensors)
    w13, w2 = found[prefix + "w13_weight"], found[prefix + "w2_weight"]
    if ep == 1:
        assert [s[..., 0].tolist() for s in w13] == [[[1, 3], [11, 13]], [[2, 4], [12, 14]]]
        assert [s[:, 0].tolist() for s in w2] == [[[5], [15]], [[6], [16]]]
    else:
        assert [s[..., 0].tolist() for s in w13] == [[[1, 2, 3, 4]], [[11, 12, 13, 14]]]
        assert [s[:, 0].tolist() for s in w2] == [[[5, 6]], [[15, 16]]]
    [(_, [router, _])] = layout.feed("model.layers.0.mlp.gate.weight", torch.ones(2, 1))
    assert w13[0].dtype == torch.bfloat16 and router.dtype == torch.float32


def test_one_changed_element_a_missing_and_an_unknown_tensor_are_named():
    tensors = {"model.norm.weight": torch.ones(5), "a.weight": torch.ones(5)}
    [want] = expected_checksums(tensors.items(), {1: Layout(CONFIG, 1)})[1]
    assert difference(want, dict(want)) is None
    tensors["a.weight"][3] += 1e-6
    have = {name: sha256_checksum(tensor) for name, tensor in tensors.items()}
    assert difference(want, have) == "1 of 2 tensors differ from the trainer's (a.weight)"
    have["b.weight"] = have.pop("a.weight")
    assert difference(want, have) == (
        "1 of 2 tensors are missing in the engine (a.weight); "
        "1 of 2 tensors are unknown to the trainer (b.weight)"
    )
