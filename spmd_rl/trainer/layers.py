"""Norm and MLP in plain torch for hosts without Transformer Engine, and GLM-4's layer.

On a CPU in float32 both pass over a block of rows that stays in cache and keep little for
backward, where torch's own make about twice as many passes over all of memory (5 % of a small
model's step). Elsewhere torch's are used. Nothing here knows of losses, optimizers or names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

BLOCK = 1 << 17  # numbers of one tensor handled at once: half a MiB


class TorchRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with what Megatron's layers expect of a norm, sequence parallel or not."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        if _blockwise(x):
            return _RMSNorm.apply(x, self.weight, self.eps)
        return super().forward(x)


class TorchMLP(MLP):
    """Megatron's gated MLP with SiLU and without biases."""

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any):
        if per_token_scale is not None or not _blockwise(hidden_states):
            return super().forward(hidden_states, per_token_scale, **kwargs)
        gate_and_up, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(_SwiGLU.apply(gate_and_up))


class PostNormLayer(TransformerLayer):
    """A layer that also norms what attention and MLP give, before it joins the residual stream."""

    def __init__(self, config: Any, submodules: Any, *args: Any, norm: Any, **kwargs: Any):
        super().__init__(config, submodules, *args, **kwargs)
        shape = dict(hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        self.post_self_attn_layernorm = norm(config=config, **shape)
        self.post_mlp_layernorm = norm(config=config, **shape)
        self.self_attn_bda = _after(self.post_self_attn_layernorm)
        self.mlp_bda = _after(self.post_mlp_layernorm)


def _after(norm: torch.nn.Module) -> Any:
    """Megatron's bias-dropout-add, of the normed output."""

    def bias_dropout_add(training: bool, fused: bool) -> Any:
        add = get_bias_dropout_add(training, fused)
        return lambda output, residual, dropout: add(
            (norm(output[0]), output[1]), residual, dropout
        )

    return bias_dropout_add


def _blockwise(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32


def _blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(BLOCK // width, 1)
    return (slice(start, start + step) for start in range(0, rows, step))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        flat = x.reshape(-1, x.size(-1))
        rows, width = flat.shape
        out, scale = torch.empty_like(flat), flat.new_empty(rows, 1)
        for at in _blocks(rows, width):
            # In the engine's order: vector_norm is quicker, but rounds once more, and log-probs
            # of trainer and engine would differ by up to 2e-5 instead of 3e-6.
            scale[at] = flat[at].square().mean(1, keepdim=True).add_(eps).rsqrt_()
            torch.mul(flat[at], scale[at], out=out[at]).mul_(weight)
        ctx.save_for_backward(flat, weight, scale)
        return out.view_as(x)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        flat, weight, scale = ctx.saved_tensors
        grad = grads[0].reshape(flat.shape)
        rows, width = flat.shape
        out, of_weight = torch.empty_like(flat), torch.zeros_like(weight)
        for at in _blocks(rows, width):
            normed = flat[at] * scale[at]
            product = grad[at] * normed
            of_weight += product.sum(0)
            mean = torch.mv(product, weight).div_(width).unsqueeze(1)
            torch.mul(grad[at], weight, out=out[at])
            out[at].sub_(normed.mul_(mean)).mul_(scale[at])
        return out.view_as(grads[0]), of_weight, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up of [..., gate and up]."""

    @staticmethod
    def forward(ctx, gate_and_up: Tensor) -> Tensor:
        flat = gate_and_up.reshape(-1, gate_and_up.size(-1))
        half = flat.size(1) // 2
        out = flat.new_empty(len(flat), half)
        for at in _blocks(len(flat), half):
            torch.mul(F.silu(flat[at, :half]), flat[at, half:], out=out[at])
        ctx.save_for_backward(flat)
        return out.view(*gate_and_up.shape[:-1], half)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (flat,) = ctx.saved_tensors
        half = flat.size(1) // 2
        grad, out = grads[0].reshape(-1, half), torch.empty_like(flat)
        for at in _blocks(len(flat), half):
            gate, up = flat[at, :half], flat[at, half:]
            torch.mul(grad[at], F.silu(gate), out=out[at, half:])
            of_silu = grad[at] * up
            torch.ops.aten.silu_backward(of_silu, gate, grad_input=out[at, :half])
        return out.view(*grads[0].shape[:-1], 2 * half)
