"""The block-wise norm and MLP activation against torch's, with gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from spmd_rl.trainer import layers


@pytest.fixture(params=[1 << 17, 64])
def block(request, monkeypatch):
    monkeypatch.setattr(layers, "BLOCK", request.param)


def leaf(*shape, dtype=torch.float64):
    make = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=make, dtype=dtype, requires_grad=True)


def test_rms_norm(block):
    x, weight = leaf(7, 3, 16), leaf(16)
    out = layers._RMSNorm.apply(x, weight, 1e-5)
    assert torch.allclose(out, F.rms_norm(x, (16,), weight, 1e-5))
    assert torch.autograd.gradcheck(lambda a, b: layers._RMSNorm.apply(a, b, 1e-5), (x, weight))
    assert layers._RMSNorm.apply(x[:0], weight, 1e-5).shape == (0, 3, 16)


def test_rms_norm_of_strided_heads(block):
    x = leaf(5, 40).view(5, 2, 20)[..., 4:12]
    weight = leaf(8)
    assert torch.allclose(layers._RMSNorm.apply(x, weight, 1e-5), F.rms_norm(x, (8,), weight, 1e-5))


def test_swiglu(block):
    x = leaf(5, 2, 24)
    gate, up = x.chunk(2, -1)
    assert torch.allclose(layers._SwiGLU.apply(x), F.silu(gate) * up)
    assert torch.autograd.gradcheck(layers._SwiGLU.apply, (x,))
