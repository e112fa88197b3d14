"""The command line of launch/main.py: arguments in, a checked configuration and placement out.

Faults are printed once, by the rank that leads, as sentences without a traceback; the exit status
is 2. Must not import torch: --dry-run works on a login node.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
import time
from dataclasses import dataclass

from spmd_rl import planner
from spmd_rl.config import Config, ConfigError, dump, load
from spmd_rl.control import FAULTY, tell_script
from spmd_rl.layout import Launched, describe, launched
from spmd_rl.types import Placement

NAMED = re.compile(r"(--)?(logging\.)?name=")  # an override that says which run is meant
PATIENCE = 5.0  # seconds another rank leaves to rank 0, which prints the same faults and ends all

DESCRIPTION = """\
Run RL post-training as configured, on every rank the launcher started:

  torchrun --nproc-per-node 4 launch/main.py --config configs/quickstart.yaml
  srun python launch/main.py --config configs/quickstart.yaml num_rollout=10
  python launch/main.py --config configs/quickstart.yaml --dry-run --world 8
"""
EPILOG = """\
Overrides follow as section.key=value or key=value, the value written as YAML:
num_rollout=2 megatron.tensor_model_parallel_size=2 'rollout_stop=["</answer>"]'
docs/configuration.md lists the keys.
"""


@dataclass
class Args:
    cfg: Config
    placement: Placement
    dry_run: bool
    config: str
    gpu: str


def parse(argv: list[str]) -> Args:
    """What to run. Ends the process with status 2 when the configuration has faults."""
    options, overrides = _parser().parse_known_args(argv)
    overrides = options.overrides + overrides
    here = launched()
    try:
        if options.config is None:
            raise ConfigError(["--config is missing: give a YAML file, as in --config run.yaml"])
        world, per_node = _sizes(options, here)
        cfg, placement = load(options.config, overrides, world, per_node)
    except ConfigError as error:
        _report(error.faults, here.rank if here else 0)
        sys.exit(tell_script(FAULTY))
    if not any(NAMED.match(word) for word in overrides):
        cfg.logging.name = _own_name(str(cfg.logging.name))
    return Args(cfg, placement, options.dry_run, options.config, options.gpu)


def _own_name(name: str) -> str:
    """In a job of slurm/run.sbatch, a name that no other job has: two of one configuration must
    not meet in a folder. It stays when the job is requeued.
    """
    number = os.environ.get("SPMD_RL_JOB_ID")
    return f"{name}-{number}" if number else name


def print_plan(args: Args) -> None:
    """What --dry-run shows: the configuration as resolved (YAML), who is where and, for GPUs, what
    fits.
    """
    here = launched()
    if here is not None and here.rank:
        return
    table = describe(args.placement, args.cfg)
    if args.cfg.placement.device == "cuda" and args.placement.train_ranks:
        table += f"\n{_memory(args)}"
    commented = table.replace("\n", "\n# ")
    print(f"{dump(args.cfg)}\n# {commented}", flush=True)


def _memory(args: Args) -> str:
    try:
        model = planner.find_architecture(args.cfg, args.config)
        found = planner.plan(
            args.cfg,
            args.placement,
            model,
            planner.GPUS[args.gpu],
            teacher=planner.find_teacher(args.cfg),
        )
    except ValueError as error:
        return str(error)
    return planner.describe(found, args.placement.ranks_per_node)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/main.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="the configuration, a YAML file")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, print the resolved configuration and who is where, start nothing",
    )
    parser.add_argument(
        "--world", type=int, metavar="N", help="plan for N ranks (only with --dry-run)"
    )
    parser.add_argument(
        "--ranks-per-node", type=int, metavar="M", help="of them on each node (with --dry-run)"
    )
    parser.add_argument(
        "--gpu",
        choices=sorted(planner.GPUS),
        default="h100",
        help="plan memory for it (with --dry-run; tools/plan.py has more options)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, see below")
    return parser


def _sizes(options: argparse.Namespace, here: Launched | None) -> tuple[int | None, int | None]:
    """Ranks in all and on each node; (None, None): as the configuration asks."""
    if options.dry_run and (options.world or options.ranks_per_node):
        return options.world, options.ranks_per_node
    if options.world or options.ranks_per_node:
        raise ConfigError(
            ["--world and --ranks-per-node plan only: add --dry-run, or start ranks by torchrun"]
        )
    if here:
        return here.world, here.ranks_per_node
    return (None, None) if options.dry_run else (1, 1)


def _report(faults: list[str], rank: int) -> None:
    """Print the faults once in the job.

    Another rank finds the same ones nearly always; rank 0's exit then ends it during its patience.
    Otherwise (a file that only this node lacks) it prints its own.
    """
    prefix = ""
    if rank:
        time.sleep(PATIENCE)
        prefix = f"rank {rank} on {platform.node() or os.uname().nodename}: "
    print("\n".join(prefix + fault for fault in faults), file=sys.stderr, flush=True)
