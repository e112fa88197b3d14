"""One job in a run folder at a time.

A POSIX lock, since it ends with its process however that ends, and works over NFS; where the disk
has no locks there is none. Imports no torch.
"""

from __future__ import annotations

import fcntl
import os
import platform
import time
from pathlib import Path
from typing import BinaryIO

NAME = ".lock"
PATIENCE = 15.0  # seconds for a job that is about to end

_held: list[BinaryIO] = []  # closing the file would give the lock up


def hold(run_dir: Path) -> str:
    """Make the folder this process's own until it ends; who has it instead, or the empty string."""
    path = run_dir / NAME
    number = os.environ.get("SLURM_JOB_ID")
    job = f"Slurm job {number}, " if number else ""
    file = open(path, "a+b")  # noqa: SIM115
    end = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            owner = path.read_text(errors="replace") or "another job"
            if job and owner.startswith(job):
                return ""  # an earlier turn of ours, whose node died before it could give it up
            if time.monotonic() > end:
                return owner
            time.sleep(0.2)
        except OSError:  # no locks on this disk
            return ""
    file.truncate(0)
    file.write(f"{job}process {os.getpid()} on {platform.node()}".encode())
    file.flush()
    _held.append(file)
    return ""
