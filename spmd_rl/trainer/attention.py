"""Core attention in plain torch that stands in for Transformer Engine's where it is not installed.

In: Megatron's query, key and value of a packed micro-batch. They are rotated, and each sequence
attends within itself; under context parallelism keys and values are gathered. Knows nothing of
losses, optimizers or names.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from spmd_rl.attend import attend, suits
from spmd_rl.trainer.packing import Packing

varlen_attn: Any = None
with contextlib.suppress(ImportError):  # torch < 2.10 has none
    from torch.nn.attention.varlen import varlen_attn


class TorchAttention(MegatronModule):
    """Causal attention within each sequence of a packed micro-batch, with grouped queries."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        inv_freq: Tensor | None = None,
        interleaved: bool = False,
        **_: Any,
    ):
        super().__init__(config=config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
        self.cp_group = groups.cp
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.inv_freq = inv_freq  # on the host; None: queries and keys arrive rotated
        self.interleaved = interleaved

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Packing | None = None,
    ) -> Tensor:
        """[t, heads, d] each -> [t, heads x d]."""
        assert isinstance(packed_seq_params, Packing), "sequences are always packed"
        if self.inv_freq is not None:
            cos, sin = packed_seq_params.rotary(self.inv_freq, query)
            query = _Rotate.apply(query, cos, sin, self.interleaved)
            key = _Rotate.apply(key, cos, sin, self.interleaved)
        if packed_seq_params.cp_size > 1:
            out = self._attend_gathered(query, key, value, packed_seq_params)
        elif query.is_cuda and varlen_attn is not None and query.dtype != torch.float32:
            out = self._attend_varlen(query, key, value, packed_seq_params)
        else:
            out = self._attend_buckets(query, key, value, packed_seq_params)
        return out.reshape(out.size(0), -1)

    def _attend_buckets(self, query: Tensor, key: Tensor, value: Tensor, packing: Packing):
        buckets, undo = packing.buckets(query.device)
        outs = []
        for count, length, rows in buckets:
            q, k, v = (
                (x if rows is None else x.index_select(0, rows))
                .view(count, length, x.size(1), x.size(2))
                .transpose(1, 2)
                for x in (query, key, value)
            )
            if suits(q, length):
                out = attend(q, k, v, packing.causal(length), self.scale)
            else:
                out = F.scaled_dot_product_attention(
                    q, k, v, is_causal=True, scale=self.scale, enable_gqa=q.size(1) != k.size(1)
                )
            outs.append(out.transpose(1, 2).reshape(count * length, q.size(1), v.size(3)))
        joined = outs[0] if len(outs) == 1 else torch.cat(outs)
        return joined if undo is None else joined.index_select(0, undo)

    def _attend_varlen(self, query: Tensor, key: Tensor, value: Tensor, packing: Packing):
        repeats = query.size(1) // key.size(1)
        if repeats > 1:
            key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        ends, longest = packing.cu_seqlens_q, packing.max_seqlen_q
        known = inspect.signature(varlen_attn).parameters
        causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
        scale = {"scale": self.scale} if "scale" in known else {}
        return varlen_attn(
            query.contiguous(), key.contiguous(), value.contiguous(),
            ends, ends, longest, longest, **causal, **scale,
        )  # fmt: skip

    def _attend_gathered(self, query: Tensor, key: Tensor, value: Tensor, packing: Packing):
        """Keys and values of all cp ranks; backward reduces their gradients to the owners."""
        key, value = (
            gather_from_sequence_parallel_region(x.contiguous(), group=self.cp_group)
            for x in (key, value)
        )
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=packing.visible(query.device), scale=self.scale,
            enable_gqa=q.size(1) != k.size(1),
        )  # fmt: skip
        return out.squeeze(0).transpose(0, 1)


class _Rotate(torch.autograd.Function):
    """Rotary embedding in four passes over half the data each; backward rotates the other way."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotate(x, cos, sin, interleaved, -1.0)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, ctx.interleaved, 1.0), None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, sign: float) -> Tensor:
    half = cos.size(-1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if interleaved:
        pairs = (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    else:
        pairs = (slice(0, half), slice(half, 2 * half))
    (x1, x2), (y1, y2) = ((t[..., pairs[0]], t[..., pairs[1]]) for t in (x, out))
    # Products are rounded before they are added, as in the engine: addcmul_ would not.
    torch.mul(x1, cos, out=y1).add_(x2 * sin, alpha=sign)
    torch.mul(x2, cos, out=y2).add_(x1 * sin, alpha=-sign)
    if 2 * half < x.size(-1):
        out[..., 2 * half :] = x[..., 2 * half :]
    return out
