"""Per-token estimates of the KL divergence from a reference model, from log-probs of the sampled
tokens.

In and out: flat [R] float32 tensors. Source: http://joschu.net/blog/kl-approx.html and slime's
`compute_approx_kl`.
"""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("k1", "k2", "k3", "low_var_kl")


def kl(
    log_probs: Tensor, ref_log_probs: Tensor, kind: str, old_log_probs: Tensor | None = None
) -> Tensor:
    """[R] KL estimate; `low_var_kl` is k3 clamped to [-10, 10].

    `old_log_probs` (`use_unbiased_kl`): multiplies by exp(logp - logp_old) before the clamp, with
    its gradient.
    """
    difference = log_probs.float() - ref_log_probs.float()
    if kind == "k1":
        estimate = difference
    elif kind == "k2":
        estimate = difference.square() / 2
    elif kind in ("k3", "low_var_kl"):
        estimate = torch.exp(-difference) - 1 + difference
    else:
        raise ValueError(f"algo.kl_loss_type '{kind}' is unknown; use one of {', '.join(KINDS)}")
    if old_log_probs is not None:
        estimate = torch.exp(log_probs.float() - old_log_probs.float()) * estimate
    return estimate.clamp(-10, 10) if kind == "low_var_kl" else estimate
