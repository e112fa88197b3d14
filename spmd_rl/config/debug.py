"""The `debug:` keys: what one implies, and what does not go together.

Comes in: a `Config`; goes out: the keys filled in, and faults.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from spmd_rl.config import evaluation
from spmd_rl.config.errors import Fault
from spmd_rl.config.schema import Config

DETAILS = {  # key -> file below dump_details, as in slime
    "save_debug_rollout_data": "rollout_data/{rollout_id}.pt",
    "save_debug_train_data": "train_data/{rollout_id}_{rank}.pt",
}
LOAD = "debug.load_debug_rollout_data"


def fill(cfg: Config) -> None:
    debug = cfg.debug
    if debug.load_debug_rollout_data:
        debug.debug_train_only = True
    for key, below in DETAILS.items():
        if debug.dump_details and getattr(debug, key) is None:
            setattr(debug, key, f"{debug.dump_details}/{below}")
    if debug.debug_rollout_only:  # nothing shares the engines' GPUs, and nothing changes
        cfg.placement.offload_train = cfg.placement.offload_rollout = False
        cfg.checkpoint.save_interval, cfg.checkpoint.save_hf = None, False


def check(cfg: Config) -> Iterator[Fault]:
    debug, supervised = cfg.debug, cfg.algo.loss_type == "sft_loss"
    both = ("debug.debug_rollout_only", "debug.debug_train_only")
    if debug.debug_rollout_only and debug.debug_train_only:
        why = f" (which {LOAD} implies)" if debug.load_debug_rollout_data else ""
        yield Fault(
            (*both, LOAD),
            f"debug.debug_rollout_only and debug.debug_train_only{why} exclude each other: keep "
            "one",
        )
    elif debug.debug_rollout_only and supervised:
        yield Fault(
            (both[0], "algo.loss_type"),
            "debug.debug_rollout_only has nothing to generate with algo.loss_type sft_loss: leave "
            "it out",
        )
    elif debug.debug_rollout_only and cfg.rollout.use_fault_tolerance:
        yield Fault(
            (both[0], "rollout.use_fault_tolerance"),
            "debug.debug_rollout_only has no trainer to mend engines from: set "
            "rollout.use_fault_tolerance: false",
        )
    made = debug.load_debug_rollout_data or cfg.rollout.rollout_function_path
    if debug.debug_train_only and not (supervised or made):
        yield Fault(
            (both[1], LOAD),
            f"debug.debug_train_only starts no engines, so nothing makes samples: give {LOAD}, or "
            "a rollout.rollout_function_path that needs no engine",
        )
    if debug.load_debug_rollout_data_subsample is not None and not debug.load_debug_rollout_data:
        yield Fault(
            (f"{LOAD}_subsample", LOAD),
            f"{LOAD}_subsample has no effect without {LOAD}: give it, or leave this out",
        )
    yield from _names(cfg)


def _names(cfg: Config) -> Iterator[Fault]:
    """Whether file names can be made of the keys."""
    rollouts = [0, "eval_0"] if evaluation.evaluates(cfg) else [0]
    for key in (*DETAILS, "load_debug_rollout_data"):
        path = getattr(cfg.debug, key)
        numbers = rollouts if key == "save_debug_rollout_data" else [0]
        for number in numbers if path else ():
            try:
                path.format(rollout_id=number, rank=0)
            except (IndexError, KeyError, ValueError) as error:
                yield Fault(
                    (f"debug.{key}",),
                    f"debug.{key} '{path}' makes no file name of rollout {number} ({error!r}): "
                    "write {rollout_id} where its number goes",
                )
                break


def check_files(cfg: Config) -> Iterator[Fault]:
    path = cfg.debug.load_debug_rollout_data
    if path and not list(_names(cfg)):
        first = Path(path.format(rollout_id=cfg.rollout.start_rollout_id or 0))
        if not first.is_file():
            yield Fault(
                (LOAD,),
                f"{LOAD}: {first} does not exist: give what debug.save_debug_rollout_data was, as "
                "dump/{rollout_id}.pt",
            )
