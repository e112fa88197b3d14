"""Megatron's parallel groups over the train ranks, and where each rank stands in them.

In: the placement (sizes) with torch.distributed already initialised over the train ranks only.
Out: groups and this rank's coordinates. Knows nothing of models or batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from spmd_rl.config import Config
from spmd_rl.types import Placement


def backend(cfg: Config) -> str:
    """Of the training ranks' process groups: tensors on the host travel over gloo everywhere."""
    return "gloo" if cfg.placement.device == "cpu" else "cpu:gloo,cuda:nccl"


@dataclass(frozen=True, slots=True)
class Groups:
    """Process groups and this rank's coordinates in them."""

    tp: Any
    cp: Any
    pp: Any
    dp: Any
    dp_cp: Any
    ep: Any
    etp: Any
    tp_rank: int
    cp_rank: int
    pp_rank: int
    dp_rank: int
    ep_rank: int
    etp_rank: int
    tp_size: int
    cp_size: int
    pp_size: int
    dp_size: int
    ep_size: int
    etp_size: int

    def tensor_parallel(self, expert: bool) -> tuple[Any, int, int]:
        """(group, rank, size) that an expert's parameter, or another one, is split over."""
        if expert:
            return self.etp, self.etp_rank, self.etp_size
        return self.tp, self.tp_rank, self.tp_size

    @property
    def first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1


def initialise(placement: Placement, megatron: dict[str, Any], seed: int) -> Groups:
    """Build the groups once a process, seed every generator, and say where this rank is."""
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=placement.tp,
            pipeline_model_parallel_size=placement.pp,
            virtual_pipeline_model_parallel_size=megatron.get(
                "virtual_pipeline_model_parallel_size"
            ),
            context_parallel_size=placement.cp,
            expert_model_parallel_size=placement.ep,
            expert_tensor_parallel_size=megatron.get("expert_tensor_parallel_size"),
            # gloo twins serve the optimizer's checkpoint on GPU; over gloo they would be copies
            create_gloo_process_groups=torch.cuda.is_available(),
        )
    seed_everything(seed)
    return current()


def seed_everything(seed: int) -> None:
    """Megatron's rule: stages differ, data-parallel peers agree."""
    from megatron.core import parallel_state, tensor_parallel

    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed)


def current() -> Groups:
    from megatron.core import parallel_state as mpu

    return Groups(
        tp=mpu.get_tensor_model_parallel_group(),
        cp=mpu.get_context_parallel_group(),
        pp=mpu.get_pipeline_model_parallel_group(),
        dp=mpu.get_data_parallel_group(),
        dp_cp=mpu.get_data_parallel_group(with_context_parallel=True),
        ep=mpu.get_expert_model_parallel_group(),
        etp=mpu.get_expert_tensor_parallel_group(),
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        cp_rank=mpu.get_context_parallel_rank(),
        pp_rank=mpu.get_pipeline_model_parallel_rank(),
        dp_rank=mpu.get_data_parallel_rank(),
        ep_rank=mpu.get_expert_model_parallel_rank(),
        etp_rank=mpu.get_expert_tensor_parallel_rank() or 0,
        tp_size=mpu.get_tensor_model_parallel_world_size(),
        cp_size=mpu.get_context_parallel_world_size(),
        pp_size=mpu.get_pipeline_model_parallel_world_size(),
        dp_size=mpu.get_data_parallel_world_size(),
        ep_size=mpu.get_expert_model_parallel_world_size(),
        etp_size=mpu.get_expert_tensor_parallel_world_size() or 1,
    )
