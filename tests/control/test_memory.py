"""Memory of a process tree, shared pages counted once."""

import os
import subprocess
import sys

from spmd_rl.control.memory import PeakMemory, process_memory, tree_memory

CHILD = "data = bytearray(b'x') * (64 << 20); print(1, flush=True); input()"


def test_tree_counts_children_and_the_peak_stays() -> None:
    peak = PeakMemory(interval=600)
    before = tree_memory([os.getpid()])
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.readline()
    assert tree_memory([os.getpid()]) - before > 60 << 20
    high = peak.look()
    child.communicate(b"\n")
    assert peak.peak() >= high > peak.look()
    peak.close()


def test_a_process_that_is_gone_has_none() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    assert process_memory(child.pid) == 0 == tree_memory([child.pid])
