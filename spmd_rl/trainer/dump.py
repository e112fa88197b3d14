"""What a rank trained on, as a file for eyes (`save_debug_train_data`).

Comes in: a rollout's columns after its steps; goes out: `{rollout_id, rank, rollout_data}` as slime
writes it with torch.save (it loads with weights_only): lists of one entry a sample.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spmd_rl import disk
from spmd_rl.config.schema import Config
from spmd_rl.trainer import custom
from spmd_rl.trainer.data import RolloutData


def save(cfg: Config, rollout: int, rank: int, data: RolloutData) -> None:
    """Write this rank's file, whole or not at all; nothing where none is asked for."""
    path = cfg.debug.save_debug_train_data
    if path is None:
        return
    target = Path(path.format(rollout_id=rollout, rank=rank))
    target.parent.mkdir(parents=True, exist_ok=True)
    columns = custom.by_sample(data, advantages=data.groups.last_stage)
    found = {"rollout_id": rollout, "rank": rank, "rollout_data": _on_host(columns)}
    with disk.replacing(target) as file:
        torch.save(found, file)


def _on_host(value: Any) -> Any:
    """Tensors of their own: a part of a bigger one would be saved with all of it."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {name: _on_host(one) for name, one in value.items()}
    return [_on_host(one) for one in value] if isinstance(value, list) else value
