"""Trainers built inside ranks, one after another, in any layout: what parity is measured on.

Comes in: a configuration and parallel sizes; goes out: trainers over torch.distributed, which the
launcher (torchrun, or the tests' own) has described in the environment.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from spmd_rl.config.schema import Config
from spmd_rl.types import Batch, Placement, Shard

VOCAB = 100  # tokens used; the models have more


def config(model: str | Path, **sections: dict[str, Any]) -> Config:
    """A configuration for one step over 12 samples; sections are merged in."""
    base: dict[str, dict[str, Any]] = {
        "model": {"hf_checkpoint": str(model)},
        "placement": {"device": "cpu"},
        "rollout": {"rollout_batch_size": 6, "n_samples_per_prompt": 2, "num_rollout": 4},
        "train": {"lr": 0.0, "clip_grad": 1e9, "use_dynamic_batch_size": True},
    }
    base["train"] |= {"max_tokens_per_gpu": 64}
    for name, values in sections.items():
        base[name] = base.get(name, {}) | values
    return Config.model_validate(base)


def ragged_batch(seed: int = 0, siblings: bool = True, count: int = 12, longest: int = 40) -> Batch:
    """Samples of different lengths; some tokens masked, one sample wholly, two siblings."""
    rng = np.random.default_rng(seed)
    responses = rng.integers(1, longest, count).astype(np.int32)
    responses[1] = longest
    totals = (responses + rng.integers(1, 12, count)).astype(np.int32)
    mask = (rng.random(responses.sum()) < 0.8).astype(np.uint8)
    mask[: responses[0]] = 0
    ids = np.arange(count)
    if siblings:
        ids[3] = ids[2]
    return Batch(
        # not token 0: transformers gives the padding token's embedding no gradient
        tokens=rng.integers(1, VOCAB, totals.sum()).astype(np.int32),
        total_lengths=totals,
        response_lengths=responses,
        loss_mask=mask,
        rewards=rng.standard_normal(count).astype(np.float32),
        raw_rewards=rng.random(count).astype(np.float32),
        rollout_ids=ids,
        rollout_log_probs=(-4 - rng.random(responses.sum())).astype(np.float32),
        truncated=(rng.random(count) < 0.5).astype(np.uint8),
    )


def placement(world: int, tp: int = 1, pp: int = 1, cp: int = 1, ep: int = 1) -> Placement:
    return Placement(
        world, world, tuple(range(world)), (), (), True, tp=tp, pp=pp, cp=cp, ep=ep,
        dp=world // (tp * pp * cp),
    )  # fmt: skip


def shard_of(batch: Batch, cfg: Config, where: Placement, dp_rank: int) -> Shard:
    from spmd_rl.batch.plan import make_shard, plan_batch

    return make_shard(batch, plan_batch(batch, cfg, where), dp_rank)


class Ranks:
    """Inside a rank: trainers of different layouts, one after another. A context: groups end in
    order, because a rank that just exits may be terminated by a thread of gloo.
    """

    def __init__(self) -> None:
        import torch.distributed as dist

        warnings.simplefilter("ignore")
        dist.init_process_group("gloo")
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.groups_of: Any = None  # what the present process groups were made for

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        import torch.distributed as dist

        if kind is not None:
            return
        dist.barrier()
        self._forget_groups()
        dist.destroy_process_group()

    def _forget_groups(self) -> None:
        from megatron.core import parallel_state

        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()

    def trainer(self, cfg: Config, num_steps: int = 10, **sizes: int) -> Any:
        from spmd_rl.trainer.actor import Trainer

        wanted = (sizes, *(cfg.megatron.get(key) for key in SPLIT))
        if wanted != self.groups_of:
            self._forget_groups()
        self.groups_of = wanted
        where = placement(self.world, **sizes)
        return Trainer(cfg, where, self.rank, num_steps)

    def train(self, trainer: Any, batch: Batch, rollout: int = 0) -> dict[str, Any]:
        shard = shard_of(batch, trainer.cfg, trainer.placement, trainer.groups.dp_rank)
        trainer.load(shard)
        return trainer.train(rollout)

    def gradients(self, trainer: Any, critic: bool = False) -> dict[str, Any]:
        """Of the last step, as whole HF tensors."""
        from spmd_rl.weights.export import hf_tensors

        of = trainer.critic if critic else trainer.actor
        found = hf_tensors(of.chunks, of.names, trainer.groups, of=lambda p: p.main_grad)
        return {name: value.clone() for name, value in found}

    def keep(self, folder: str, name: str, values: Any) -> None:
        import torch

        if self.rank == 0:
            torch.save(values, os.path.join(folder, f"{name}.pt"))


SPLIT = ("virtual_pipeline_model_parallel_size", "expert_tensor_parallel_size")
