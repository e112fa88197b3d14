"""Megatron's torch_dist checkpoints of one moment of training: weights, optimizer, schedule, random
state.

`fully_reshardable`: a checkpoint loads into another tp, pp or dp. The caller makes directories
appear atomically; nothing here knows of rollouts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from spmd_rl.trainer.parallel import Groups


def save(
    directory: str | Path,
    chunks: list[Any],
    optimizer: Any | None,
    schedule: Any,
    groups: Groups,
) -> None:
    """Collective over all train ranks. `optimizer` None: weights only."""
    from megatron.core import dist_checkpointing

    Path(directory).mkdir(parents=True, exist_ok=True)
    metadata = _metadata(groups)
    state = _state(chunks, optimizer, groups, metadata, loading=False)
    state["schedule"] = schedule.state_dict()
    state["layout"] = [groups.tp_size, groups.pp_size]
    state["random"] = _random_state(groups)
    content = {k: v for k, v in metadata.items() if k != "dp_cp_group"}
    dist_checkpointing.save(state, str(directory), _strategy(), content_metadata=content)


def load(
    directory: str | Path,
    chunks: list[Any],
    optimizer: Any | None,
    schedule: Any,
    groups: Groups,
) -> None:
    """Collective. With `optimizer` None, weights only (schedule and random state stay new)."""
    from megatron.core import dist_checkpointing

    common = dist_checkpointing.load_common_state_dict(str(directory))
    assert common is not None
    if optimizer is not None and "optimizer" not in common:
        raise ValueError(
            f"checkpoint.load: {directory} holds no optimizer state (saved with no_save_optim); "
            "set checkpoint.no_save_optim to start a new optimizer from its weights"
        )
    state = _state(chunks, optimizer, groups, _metadata(groups), loading=True)
    same_layout = common["layout"] == [groups.tp_size, groups.pp_size]
    if same_layout and optimizer is not None:
        state["random"] = _random_state(groups)
    loaded: Any = dist_checkpointing.load(state, str(directory))
    for key, chunk in _keyed(chunks):
        chunk.load_state_dict(loaded[key], strict=True)
    if optimizer is None:
        return
    optimizer.load_state_dict(loaded["optimizer"])
    schedule.load_state_dict(common["schedule"])
    if same_layout:
        _set_random_state(loaded["random"])


def _metadata(groups: Groups) -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": groups.dp_cp,
    }


def _keyed(chunks: list[Any]) -> list[tuple[str, Any]]:
    if len(chunks) == 1:
        return [("model", chunks[0])]
    return [(f"model{i}", chunk) for i, chunk in enumerate(chunks)]


def _state(
    chunks: list[Any], optimizer: Any, groups: Groups, metadata: dict[str, Any], loading: bool
) -> dict[str, Any]:
    state = {key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in _keyed(chunks)}
    if optimizer is not None:
        models = state["model"] if len(chunks) == 1 else dict(state)
        state["optimizer"] = optimizer.sharded_state_dict(
            models, is_loading=loading, metadata=metadata
        )
    return state


def _random_state(groups: Groups) -> Any:
    """Random state of each (pipeline stage, tensor rank); data-parallel peers hold the same."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    states = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": _tracker().get_states(),
    }
    replica = groups.dp_rank * groups.cp_size + groups.cp_rank
    return ShardedObject(
        "random",
        states,
        (groups.pp_size, groups.tp_size),
        (groups.pp_rank, groups.tp_rank),
        replica_id=replica,
    )


def _set_random_state(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    _tracker().set_states(states["tracker"])


def _tracker() -> Any:
    from megatron.core import tensor_parallel

    return tensor_parallel.get_cuda_rng_tracker()


def _strategy() -> Any:
    """torch_dist written by this process. Megatron's own strategy starts a manager process, which
    imports everything anew (3.5-6 s for the first save), and forks the trainer for each save.
    """
    from megatron.core.dist_checkpointing.strategies import torch as torch_dist
    from torch.distributed import checkpoint as dcp

    class InProcess(torch_dist.TorchDistSaveShardedStrategy):
        def save(self, sharded_state_dict, checkpoint_dir):
            renamed, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(
                sharded_state_dict, self.keep_only_main_replica
            )
            writer = dcp.FileSystemWriter(checkpoint_dir, thread_count=1, sync_files=True)
            planner = torch_dist.MCoreSavePlanner(
                dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False
            )
            tensors = torch_dist.mcore_to_pyt_state_dict(renamed, False)
            dcp.save(tensors, storage_writer=writer, planner=planner)

    return InProcess("torch_dist", 1)
