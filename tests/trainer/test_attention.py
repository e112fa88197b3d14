"""Packed attention and rotary tables against the plain formulas, for short and long sequences."""

from __future__ import annotations

import math

import pytest
import torch

from spmd_rl.architecture import Rope, parse
from spmd_rl.trainer.attention import _Rotate
from spmd_rl.trainer.packing import LONG, MAX_PADDING, _buckets, packing


def packed(lengths):
    positions = torch.cat([torch.arange(n) for n in lengths])
    return packing(lengths, positions, torch.tensor([0, *lengths]).cumsum(0).int())


@pytest.mark.parametrize(
    "lengths", [[5], [7, 7, 7], [3, 1, 300, 12, 11, 10, 1, 257, 256, 40], list(range(1, 60))]
)
def test_buckets_hold_every_token_once_and_waste_little(lengths):
    buckets, undo = _buckets(tuple(lengths), torch.device("cpu"))
    tokens = torch.arange(sum(lengths))
    slots = torch.cat([tokens if b.rows is None else b.rows for b in buckets])
    assert torch.equal(tokens if undo is None else slots[undo], tokens)
    assert sum(b.count for b in buckets) == len(lengths)
    padded = sum(b.count * b.length for b in buckets)
    assert padded <= MAX_PADDING * sum(lengths)
    assert all(b.count == 1 for b in buckets if b.length >= LONG and b.rows is not None)


def attention(lengths, heads, groups, head_dim):
    """TorchAttention without the rest of Megatron, and the same by hand."""
    from spmd_rl.trainer.attention import TorchAttention

    module = TorchAttention.__new__(TorchAttention)
    torch.nn.Module.__init__(module)
    module.scale, module.interleaved = 1 / math.sqrt(head_dim), False
    module.inv_freq = Rope(10000.0, head_dim).inv_freq()
    make = torch.Generator().manual_seed(1)
    total = sum(lengths)
    leaves = [
        torch.randn(total, n, head_dim, generator=make, requires_grad=True)
        for n in (heads, groups, groups)
    ]
    return module, leaves, packed(lengths)


def by_hand(leaves, lengths, inv_freq):
    outs, start = [], 0
    for n in lengths:
        q, k, v = (x[start : start + n].double() for x in leaves)
        angles = torch.outer(torch.arange(n).double(), inv_freq.double())
        cos, sin = (torch.cat([f(angles)] * 2, -1)[:, None] for f in (torch.cos, torch.sin))
        half = q.size(-1) // 2

        def rotate(x, cos=cos, sin=sin, half=half):
            return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

        q, k = rotate(q), rotate(k)
        k, v = (x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.size(-1))
        mask = torch.ones(n, n, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(mask, float("-inf")).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        start += n
    return torch.cat(outs)


@pytest.mark.parametrize("heads,groups", [(4, 4), (4, 2), (4, 1)])
def test_attention_within_each_sequence(heads, groups):
    lengths = [3, 1, 260, 12, 11, 10, 1, 300]
    module, leaves, info = attention(lengths, heads, groups, 8)
    out = module(*leaves, packed_seq_params=info)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    got = torch.autograd.grad((out * weight).sum(), leaves)
    want_out = by_hand(leaves, lengths, module.inv_freq)
    want = torch.autograd.grad((want_out * weight).sum(), leaves)
    assert torch.allclose(out.double(), want_out, atol=1e-5)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("turned", [8, 4])
def test_rotation_and_its_gradient(interleaved, turned):
    x = torch.randn(5, 2, 8, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(5, 1, turned // 2, dtype=torch.float64)
    apply = _Rotate.apply
    assert torch.autograd.gradcheck(lambda t: apply(t, angles.cos(), angles.sin(), interleaved), x)
    out = apply(x, angles.cos(), angles.sin(), interleaved)
    assert torch.equal(out[..., turned:], x[..., turned:])
    assert torch.allclose(out.norm(dim=-1), x.norm(dim=-1))


HF = dict(
    model_type="llama", hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, vocab_size=100,
)  # fmt: skip


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500000.0, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}},
        {"rope_parameters": {
            "rope_theta": 10000.0, "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
        {"rope_theta": 20000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {},
    ],
)  # fmt: skip
def test_rotary_frequencies_are_those_of_transformers(rope):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    want = LlamaRotaryEmbedding(LlamaConfig(**HF, **rope)).inv_freq
    assert torch.allclose(parse(HF | rope).rope.inv_freq(), want, rtol=1e-6)
