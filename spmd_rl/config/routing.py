"""Checks of routing replay: what it needs of the model and of the other keys."""

from __future__ import annotations

from collections.abc import Iterator

from spmd_rl.architecture import Architecture
from spmd_rl.config.errors import Fault
from spmd_rl.config.schema import Config

KEYS = ("use_routing_replay", "use_rollout_routing_replay")


def check(cfg: Config, architecture: Architecture) -> Iterator[Fault]:
    key = next((f"algo.{key}" for key in KEYS if getattr(cfg.algo, key)), None)
    if key is None:
        return
    if not any(architecture.expert_layers):
        yield Fault(
            (key, "model.hf_checkpoint"),
            f"{key} needs a mixture of experts, and the {architecture.family} of "
            "model.hf_checkpoint has no router: leave it out",
        )
    if cfg.algo.loss_type == "sft_loss":
        yield Fault(
            (key, "algo.loss_type"),
            f"{key} has no effect with algo.loss_type sft_loss, which trains in one pass: leave "
            "it out",
        )
    if cfg.megatron.get("moe_router_fusion"):
        yield Fault(
            (key, "megatron.moe_router_fusion"),
            f"{key} cannot reach the router of megatron.moe_router_fusion: leave one out",
        )
