#!/usr/bin/env python3
"""Turn a Hugging Face directory into a torch_dist checkpoint, as Megatron and slime read it.

  python tools/convert_hf_to_torch_dist.py --hf-checkpoint models/Qwen3-4B --save out
  torchrun --nproc-per-node 4 tools/convert_hf_to_torch_dist.py --hf-checkpoint ... --save out
  srun python tools/convert_hf_to_torch_dist.py --hf-checkpoint ... --save out

Each process holds one pipeline stage on its CPU. Training here needs no such step: it loads Hugging
Face directories itself.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def convert(source: Path, target: Path, dtype: str) -> None:
    """Collective over the processes started."""
    import torch
    import torch.distributed as dist

    from spmd_rl import architecture
    from spmd_rl.trainer import checkpoint, cpu_compat, model, parallel
    from spmd_rl.types import Placement
    from spmd_rl.weights import export, hf
    from spmd_rl.weights.convert import launched_environment, whole_or_nothing
    from spmd_rl.weights.names import NameMap

    device = torch.device("cpu")
    rank, world = launched_environment()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    dist.init_process_group("gloo")
    cpu_compat.enable(device)
    shape = architecture.read(source)
    megatron = {"bf16": dtype == "bfloat16", **_stages(len(shape.expert_layers), world)}
    place = Placement(world, world, tuple(range(world)), (), (), False, tp=1, pp=world, cp=1, dp=1)
    groups = parallel.initialise(place, megatron, seed=0)
    chunks = model.build(shape, model.transformer_config(shape, megatron, groups, device), device)
    hf.load(source, export.named_tensors(chunks), NameMap(shape))
    nothing = SimpleNamespace(state_dict=dict)
    # rank 0 makes the directory and lets it appear; the others only write into it
    output = whole_or_nothing(target, "--save") if rank == 0 else contextlib.nullcontext()
    with output as aside:
        where = [str(aside)]
        dist.broadcast_object_list(where)
        checkpoint.save(Path(where[0]) / "release", chunks, None, nothing, groups)
        if aside is not None:
            (aside / "latest_checkpointed_iteration.txt").write_text("release")
        dist.barrier()
    dist.barrier()
    dist.destroy_process_group()


def _stages(layers: int, world: int) -> dict[str, int]:
    """Equally many layers on every rank, fewer on the last where they do not divide."""
    each = -(-layers // world)
    if layers % world == 0:
        return {}
    if layers <= each * (world - 1):
        raise ValueError(f"{layers} layers leave some of {world} processes empty: start fewer")
    return {"num_layers_in_last_pipeline_stage": layers - each * (world - 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf-checkpoint", type=Path, required=True)
    parser.add_argument("--save", type=Path, required=True, help="directory to make")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    options = parser.parse_args()
    try:
        convert(options.hf_checkpoint, options.save, options.dtype)
    except ValueError as error:
        sys.exit(str(error))
    print(f"wrote {options.save}")


if __name__ == "__main__":
    main()
