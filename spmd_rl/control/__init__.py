"""The job: who is in it, commands to the ranks, and a quick, explained end when anything fails.

Imports no torch until a job is joined. Knows nothing of training, engines or configuration.
"""

from spmd_rl.control.channel import Workers, command, follow
from spmd_rl.control.children import Child, clean_env, spawn
from spmd_rl.control.job import REQUEUE, Job, join
from spmd_rl.control.logs import log_only, log_to, terminal
from spmd_rl.control.memory import PeakMemory, tree_memory
from spmd_rl.control.signals import stop_requested

__all__ = [
    "REQUEUE",
    "Child",
    "Job",
    "PeakMemory",
    "Workers",
    "clean_env",
    "command",
    "follow",
    "join",
    "log_only",
    "log_to",
    "spawn",
    "stop_requested",
    "terminal",
    "tree_memory",
]
