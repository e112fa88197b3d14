"""The experts that an engine chose for each token, as it tells them.

Comes in: base64 of an answer's int32 numbers, for all of the model's layers. Goes out: an array of
the layers that have experts, in the smallest type. Knows no requests.
"""

from __future__ import annotations

import base64
from typing import Any, NamedTuple

import numpy as np

from spmd_rl import architecture
from spmd_rl.config.schema import Config
from spmd_rl.rollout import engine_args

ROUTED = "return_routed_experts"  # in the body of a request


class Routes(NamedTuple):
    """How a model routes: what is needed to read an answer."""

    expert_layers: tuple[bool, ...]  # of all layers
    topk: int  # experts of a token
    experts: int

    def request(self, known: int) -> dict[str, Any]:
        """What a request adds to be told the experts of all tokens but the first `known`."""
        return {ROUTED: True, "routed_experts_start_len": known}

    def read(self, told: Any, tokens: int) -> np.ndarray:
        """[k, layers with experts, topk] of the last k tokens but one (the last is not routed);
        ValueError for what no sound engine says of `tokens` prompt and new tokens."""
        flat = np.frombuffer(base64.b64decode(told), dtype=np.int32)
        width = len(self.expert_layers) * self.topk
        if len(flat) % width or len(flat) // width >= tokens:
            raise ValueError(f"{len(flat)} experts for {tokens} tokens and {width} of each")
        found = flat.reshape(-1, len(self.expert_layers), self.topk)[:, list(self.expert_layers)]
        if found.size and not 0 <= found.min() <= found.max() < self.experts:
            raise ValueError(f"experts {found.min()} to {found.max()}, where {self.experts} are")
        return np.ascontiguousarray(found, np.uint8 if self.experts <= 256 else np.int16)


def routes(cfg: Config) -> Routes | None:
    """Of the engines' model; None where nobody replays what engines chose."""
    if not cfg.algo.use_rollout_routing_replay:
        return None
    found = architecture.read_shape(engine_args.model_path(cfg))
    sizes = found.transformer
    return Routes(found.expert_layers, sizes["moe_router_topk"], sizes["num_moe_experts"])


def joined(known: np.ndarray | None, told: np.ndarray, tokens: int) -> np.ndarray:
    """What is known of a sample of `tokens` tokens, after an answer told those of its last tokens
    but one. What was known before stays: with it the earlier tokens were made."""
    first = tokens - 1 - len(told)
    before = 0 if known is None else len(known)
    if first > before:
        raise ValueError(f"the experts of tokens {before} to {first - 1} are not known")
    return told if known is None else np.concatenate([known, told[before - first :]])
