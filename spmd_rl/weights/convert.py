"""What converters share: an output directory that appears whole or not at all, progress, a model
without an optimizer.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
EVERY = 5.0  # seconds between lines of progress


@contextlib.contextmanager
def whole_or_nothing(target: str | Path, key: str) -> Iterator[Path]:
    """A directory beside `target` to write to; it becomes `target` when the block ends well."""
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{key} {target} exists already: remove it, or give another directory")
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        if target.exists():
            target.rmdir()
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def progress(items: Iterable[T], total: int, what: str = "tensors") -> Iterator[T]:
    """The items, with a line on stderr every few seconds."""
    said = time.monotonic()
    done = 0
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - said > EVERY:
            said = time.monotonic()
            print(f"{done} of {total} {what}", file=sys.stderr, flush=True)
    print(f"{done} {what}", file=sys.stderr, flush=True)


def launched_environment() -> tuple[int, int]:
    """Rank and world size from torchrun or Slurm; alone without either. Sets what torch reads."""
    env = os.environ
    slurm = "SLURM_STEP_ID" in env and "SLURM_PROCID" in env
    env.setdefault("RANK", env["SLURM_PROCID"] if slurm else "0")
    env.setdefault("WORLD_SIZE", env["SLURM_NTASKS"] if slurm else "1")
    env.setdefault("LOCAL_RANK", env.get("SLURM_LOCALID", "0") if slurm else "0")
    env.setdefault("MASTER_ADDR", env.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"))
    env.setdefault("MASTER_PORT", "29511")
    return int(env["RANK"]), int(env["WORLD_SIZE"])
