#!/usr/bin/env python3
"""Say whether a run fits, before anything is started: memory of every rank in every phase, compute.

  python tools/plan.py configs/deepseek-r1.yaml
  python tools/plan.py configs/qwen3-4b.yaml --world 8 --gpu h200 train.max_tokens_per_gpu=16384

Needs no GPU and no weights. The architecture is config.json's in model.hf_checkpoint; where that is
not downloaded yet, configs/models/<name of the configuration>/config.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from spmd_rl.config import ConfigError, load
from spmd_rl.planner import GPUS, describe, find_architecture, find_teacher, plan

GiB = 1024**3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="the configuration, a YAML file")
    parser.add_argument("--world", type=int, help="ranks; default: as the configuration asks")
    parser.add_argument("--ranks-per-node", type=int, help="default: 8, or all of a smaller world")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100")
    parser.add_argument("--gpu-memory", type=float, metavar="GiB", help="default: the GPU's")
    parser.add_argument("--host-memory", type=float, metavar="GiB", help="of a node")
    parser.add_argument(
        "--mean-length", type=int, help="tokens of a sample; default: half the most"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="section.key=value")
    options, more = parser.parse_known_args()
    try:
        cfg, placement = load(
            options.config,
            [*options.overrides, *more, "placement.device=cuda"],
            options.world,
            options.ranks_per_node,
            check_files=False,
        )
        gpu = GPUS[options.gpu]
        if options.gpu_memory:
            gpu = dataclasses.replace(gpu, memory=int(options.gpu_memory * GiB))
        architecture = find_architecture(cfg, options.config)
        found = plan(cfg, placement, architecture, gpu, options.mean_length, find_teacher(cfg))
    except ConfigError as error:
        sys.exit("\n".join(error.faults))
    except ValueError as error:
        sys.exit(str(error))
    host = options.host_memory and int(options.host_memory * GiB)
    print(describe(found, placement.ranks_per_node, host))
    sys.exit(0 if found.fits else 1)


if __name__ == "__main__":
    main()
