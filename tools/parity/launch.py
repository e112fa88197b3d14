"""Starts ranks for tasks, and starts them again without a task that ended them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT = 1800.0


def run(
    module: str, world: int, cells: list[dict[str, Any]], folder: Path, **more: Any
) -> dict[str, str]:
    """Each of `cells` leaves `name`.`rank`.pt in the folder; why those failed that did not."""
    failed: dict[str, str] = {}
    left, fruitless = list(cells), 0
    while left and fruitless < 3:
        before = len(left)
        said = _start(module, world, {"cells": left, "folder": str(folder), **more}, folder)
        left = [
            cell
            for cell in left
            if not all((folder / f"{cell['name']}.{rank}.pt").is_file() for rank in range(world))
        ]
        fruitless = fruitless + 1 if len(left) == before else 0
        if left:  # they are run in order: the first that is missing ended the ranks
            failed[left.pop(0)["name"]] = _reason(said)
    return failed | dict.fromkeys((cell["name"] for cell in left), "not run: others had failed")


def _start(module: str, world: int, tasks: dict[str, Any], folder: Path) -> str:
    path = folder / f"tasks-{world}.json"
    path.write_text(json.dumps(tasks))
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    argv += ["--nproc-per-node", str(world), "-m", module, str(path)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    log = folder / f"ranks-{world}.log"
    with log.open("w") as out:  # no pipe: torch's helper processes would hold it open
        done = subprocess.run(
            argv, cwd=ROOT, env=env, stdout=out, stderr=out, check=False, timeout=LIMIT
        )
    return "" if done.returncode == 0 else log.read_text(errors="replace")


def _reason(said: str) -> str:
    """The exception that ended a rank, as one line."""
    lines = re.findall(r"^(?:\[rank\d+\]: )?(\w*(?:Error|Exception|Interrupt)\b.*)", said, re.M)
    return lines[0] if lines else said.strip()[-300:] or "the ranks left no result"
