"""What the trainer computes in the engine's own order of rounding, so that log-probs agree."""

import torch
import torch.nn.functional as F

from spmd_rl.trainer import layers
from spmd_rl.trainer.attention import _rotate


def test_rms_norm_has_the_engines_bits():
    torch.manual_seed(0)
    x, weight = torch.randn(300, 128), torch.randn(128)
    engine = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight
    assert torch.equal(layers._RMSNorm.apply(x, weight, 1e-6), engine)


def test_swiglu_has_the_engines_bits():
    torch.manual_seed(0)
    x = torch.randn(300, 256)
    gate, up = x.chunk(2, -1)
    assert torch.equal(layers._SwiGLU.apply(x), F.silu(gate) * up)


def test_rotary_embedding_has_the_engines_bits():
    torch.manual_seed(0)
    x, angle = torch.randn(300, 4, 32), torch.randn(300, 1, 16)
    cos, sin = angle.cos(), angle.sin()
    x1, x2 = x.chunk(2, -1)
    engine = torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)
    assert torch.equal(_rotate(x, cos, sin, False, -1.0), engine)
