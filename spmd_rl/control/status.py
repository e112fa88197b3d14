"""Exit statuses, and how a job script learns them: torchrun makes 1 of every status but 0.

The table is in docs/slurm.md. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

FAULTY = 2  # the configuration has faults: trying again cannot help
REQUEUE = 85  # stopped on request with everything saved: start me again
INTERRUPTED = 130  # by SIGINT, SIGHUP or a second SIGTERM

FILE = "SPMD_RL_STATUS_FILE"  # names the file to leave a status in; set by slurm/run.sbatch


def tell_script(status: int) -> int:
    """Leave `status` for the job script, if there is one; the exit status to end with.

    REQUEUE becomes 0 then: any other status makes torchrun count a failure, and start all again
    where --max-restarts allows it.
    """
    name = os.environ.get(FILE)
    if not name:
        return status
    with contextlib.suppress(OSError):  # the folder is gone: then the launcher's status must do
        Path(name).write_text(f"{status}\n")
    return 0 if status == REQUEUE else status
