"""The job: who is in it, commands to the ranks, and a quick, explained end when anything fails.

Imports no torch until a job is joined. Knows nothing of training, engines or configuration.
"""

from spmd_rl.control.channel import Workers, command, follow
from spmd_rl.control.children import Child, clean_env, spawn
from spmd_rl.control.job import Job, join
from spmd_rl.control.lock import hold
from spmd_rl.control.logs import log_only, log_to, terminal
from spmd_rl.control.memory import PeakMemory, give_back, tree_memory
from spmd_rl.control.notices import Notices
from spmd_rl.control.report import Explained
from spmd_rl.control.signals import stop_requested, unheard
from spmd_rl.control.status import FAULTY, REQUEUE, tell_script

__all__ = [
    "FAULTY",
    "REQUEUE",
    "Child",
    "Explained",
    "Job",
    "Notices",
    "PeakMemory",
    "Workers",
    "clean_env",
    "command",
    "follow",
    "give_back",
    "hold",
    "join",
    "log_only",
    "log_to",
    "spawn",
    "stop_requested",
    "tell_script",
    "terminal",
    "tree_memory",
    "unheard",
]
