"""Routing replay: experts that were chosen before serve a later pass of the same tokens.

In: a shard's tokens with the engine's choice (R3, `use_rollout_routing_replay`), or none and a pass
that records the trainer's own (R2, `use_routing_replay`). Out: routers that follow. A router still
weighs the experts itself and learns; only which ones is given. Tokens of which nothing is known
(the last of a sample, padding) go where the router would send them.

Megatron's routers ask an object for their experts (`router_replay`, megatron-core 0.16). Its own
one must be told when a pass computes layers again in backward; ours finds that out: a layer says
which micro-batch it begins, and a router that is asked without its layer having begun is one that
is computed again, in the order of the forward passes.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spmd_rl.architecture import Architecture
from spmd_rl.config.schema import AlgoConfig
from spmd_rl.trainer.data import RolloutData
from spmd_rl.trainer.packing import Packing
from spmd_rl.trainer.parallel import Groups

OWN, RECORD, FOLLOW = "own", "record", "follow"


class NoReplay:
    """Every pass chooses by itself."""

    def load(self, data: RolloutData) -> None:
        """Take a rollout's data, before its passes."""

    def choosing(self) -> contextlib.AbstractContextManager[None]:
        """Around the log-prob pass: it follows the engine, or what it chooses is kept."""
        return contextlib.nullcontext()

    def following(self) -> contextlib.AbstractContextManager[None]:
        """Around passes that take the experts known by now."""
        return contextlib.nullcontext()

    def metrics(self) -> dict[str, float]:
        """What following changed in this rollout. Collective over the train ranks."""
        return {}


def of(
    algo: AlgoConfig, chunks: list[Any], architecture: Architecture, groups: Groups
) -> NoReplay | Replay:
    """What the configuration asks for."""
    if algo.use_rollout_routing_replay:
        return Replay(chunks, architecture, groups, told=True)
    if algo.use_routing_replay:
        return Replay(chunks, architecture, groups, told=False)
    return NoReplay()


class Replay(NoReplay):
    """All routers of this rank's model chunks, and the experts of the rollout at hand."""

    def __init__(self, chunks: list[Any], architecture: Architecture, groups: Groups, told: bool):
        self.told, self.groups, self.mode = told, groups, OWN
        self.routers: list[_Router] = []
        self.columns: list[int] = []  # of the model's layers with experts, those of this rank
        for chunk in chunks:
            for layer in chunk.decoder.layers:
                module = getattr(layer.mlp, "router", None)
                if module is None:
                    continue
                if not hasattr(module, "router_replay"):
                    raise ValueError(
                        "algo.use_routing_replay and algo.use_rollout_routing_replay need "
                        "megatron-core 0.16: install it, or leave them out"
                    )
                module.router_replay = router = _Router(self, len(self.routers))
                layer.register_forward_pre_hook(router.begin, with_kwargs=True)
                self.routers.append(router)
                self.columns.append(sum(architecture.expert_layers[: layer.layer_number - 1]))
        self.layers = sum(architecture.expert_layers)
        self.topk = architecture.transformer["moe_router_topk"]
        self.experts = architecture.transformer["num_moe_experts"]
        self.parts = groups.tp_size if chunks[0].config.sequence_parallel else 1

    def load(self, data: RolloutData) -> None:
        tokens, here = data.num_tokens, len(self.columns)
        dtype = torch.uint8 if self.experts <= 256 else torch.int16
        self.known = torch.zeros(tokens, dtype=torch.uint8, device=data.device)
        self.chosen = torch.zeros(tokens, here, self.topk, dtype=dtype, device=data.device)
        self.changed = torch.zeros(2, dtype=torch.float64, device=data.device)
        if self.told:
            self._take(data)

    def _take(self, data: RolloutData) -> None:
        """The engine's experts, of this rank's layers."""
        batch = data.shard.batch
        assert batch.routed_experts is not None and batch.routed_lengths is not None
        told = torch.from_numpy(batch.routed_experts).view(-1, self.layers, self.topk)
        sizes = torch.from_numpy(batch.routed_lengths).long()
        totals = torch.from_numpy(batch.total_lengths).long()
        shift = (totals.cumsum(0) - totals) - (sizes.cumsum(0) - sizes)
        places = (torch.arange(len(told)) + shift.repeat_interleave(sizes)).to(data.device)
        self.chosen[places] = told[:, self.columns].to(self.chosen)
        self.known[places] = 1

    def choosing(self) -> contextlib.AbstractContextManager[None]:
        return self.following() if self.told else self._recording()

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        with self._set(FOLLOW):
            yield

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        with self._set(RECORD):
            yield
        if self.parts > 1:  # each had a part of every micro-batch's tokens
            for tensor in (self.chosen.view(torch.uint8), self.known):
                dist.all_reduce(tensor, group=self.groups.tp)

    @contextlib.contextmanager
    def _set(self, mode: str) -> Iterator[None]:
        self.mode = mode
        try:
            yield
        finally:
            self.mode = OWN
            for router in self.routers:
                router.begun = None
                router.passed.clear()

    def places(self, packing: Packing) -> Tensor:
        """[rows] of the tokens that a router sees: under sequence parallelism a part."""
        assert packing.places is not None
        if self.parts == 1:
            return packing.places
        return packing.places.view(self.parts, -1)[self.groups.tp_rank]

    def keep(self, packing: Packing, layer: int, chosen: Tensor) -> None:
        """Record what a router chose, [rows, topk]."""
        places = self.places(packing)
        real = places >= 0
        self.chosen[places[real], layer] = chosen[real].to(self.chosen.dtype)
        self.known[places[real]] = 1

    def follow(self, packing: Packing, layer: int, own: Tensor) -> Tensor:
        """[rows, topk] the experts to use, where the router would choose `own`."""
        cut = packing.cache.get("experts")
        if cut is None:  # the same for all layers and passes of the micro-batch
            places = self.places(packing)
            held = places.clamp_min(0)
            known = (self.known[held] > 0) & (places >= 0)
            cut = packing.cache["experts"] = self.chosen[held], known.unsqueeze(1)
        chosen, known = cut
        used = torch.where(known, chosen[:, layer].long(), own)
        other = (used.unsqueeze(2) != own.unsqueeze(1)).all(2)
        self.changed += torch.stack([other.sum(), known.sum() * self.topk])
        return used

    def metrics(self) -> dict[str, float]:
        dist.all_reduce(self.changed)
        changed, followed = self.changed.tolist()
        return {"train/routing_replay_changed": changed / max(followed, 1)}


class _Router:
    """What Megatron's router of one layer asks for its experts."""

    def __init__(self, replay: Replay, layer: int):
        self.replay, self.layer = replay, layer
        self.begun: Packing | None = None  # the micro-batch that the layer is at
        self.passed: deque[Packing] = deque()  # those whose backward pass is to come

    def begin(self, layer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the layer's forward pass."""
        self.begun = kwargs["packed_seq_params"]

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores [rows, experts] -> those of the experts to use, [rows, topk], and which."""
        assert default_compute_topk is not None
        values, own = default_compute_topk(
            scores, topk, num_groups=num_groups, group_topk=group_topk
        )
        replay = self.replay
        if replay.mode == OWN:
            return values, own
        packing = self._micro_batch()
        if replay.mode == RECORD:
            replay.keep(packing, self.layer, own)
            return values, own
        used = replay.follow(packing, self.layer, own)
        return scores.gather(1, used), used

    def _micro_batch(self) -> Packing:
        if self.begun is None:
            return self.passed.popleft()
        packing, self.begun = self.begun, None
        self.passed.append(packing)
        return packing
