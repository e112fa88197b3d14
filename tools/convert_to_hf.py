#!/usr/bin/env python3
"""Turn one of our own checkpoints into a Hugging Face directory by the way weights are pushed.

  torchrun --nproc-per-node 2 tools/convert_to_hf.py --config run.yaml \
      --input-dir runs/x/checkpoints/rollout_99 --output-dir out [key=value ...]

Every process started is a train rank in the layout of the configuration, which need not be the one
that saved. tools/convert_torch_dist_to_hf.py does the same in one process, without Megatron.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def convert(config: Path, overrides: list[str], source: Path, target: Path) -> None:
    """Collective over the processes started."""
    import torch
    import torch.distributed as dist

    from spmd_rl import architecture
    from spmd_rl.config import load
    from spmd_rl.trainer import checkpoint, cpu_compat, model, parallel
    from spmd_rl.weights import export, hf
    from spmd_rl.weights.convert import launched_environment, whole_or_nothing
    from spmd_rl.weights.names import NameMap

    rank, world = launched_environment()
    # No engines; who would sample without them is of no matter here.
    nobody = "rollout.rollout_function_path=spmd_rl.rollout.user:generate_rollout"
    words = [*overrides, "debug.debug_train_only=true", nobody]
    cfg, place = load(config, words, world, check_files=False)
    device = torch.device("cpu")
    dist.init_process_group("gloo")
    cpu_compat.enable(device)
    shape = architecture.read_shape(cfg.model.ref_load or cfg.model.hf_checkpoint)
    groups = parallel.initialise(place, cfg.megatron, seed=0)
    made = model.transformer_config(shape, cfg.megatron, groups, device)
    chunks = model.build(shape, made, device)
    inside = source / "model"
    held = {"actor": checkpoint.Model(chunks, None, None)}
    checkpoint.load(inside if inside.is_dir() else source, held, groups)
    tensors = export.hf_tensors(chunks, NameMap(shape), groups)
    output = whole_or_nothing(target, "--output-dir") if rank == 0 else contextlib.nullcontext()
    with output as aside:
        if aside is None:
            for _ in tensors:
                pass
        else:
            hf.save(aside, tensors, cfg.model.hf_checkpoint, made.params_dtype)
        dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--input-dir", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options, more = parser.parse_known_args()
    from spmd_rl.config import ConfigError

    try:
        words = [*options.overrides, *more]
        convert(options.config, words, options.input_dir, options.output_dir)
    except ConfigError as error:
        sys.exit("\n".join(error.faults))
    except ValueError as error:
        sys.exit(str(error))
    print(f"wrote {options.output_dir}")


if __name__ == "__main__":
    main()
