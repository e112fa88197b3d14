"""What the training bench feeds both sides, and how it judges."""

import subprocess
import sys

from tests.models import ROOT
from tools.bench_train import GOALS, long_tailed, report


def test_lengths_have_a_long_tail():
    lengths = long_tailed(64).total_lengths
    assert lengths.max() > 3 * lengths.mean() and lengths.min() > 8


def test_ratios_are_of_the_same_turn():
    found = {"spmd_rl": [1.0, 4.0, 1.0], "megatron-core": [0.9, 3.6, 0.9]}
    table, ratios = report(found | {"transformers": [2.0, 8.0, 2.0]}, tokens=100)
    assert ratios == {"megatron-core": 0.9, "transformers": 2.0} and set(GOALS) == set(ratios)
    assert "0.90 (0.9)" in table


def test_it_runs():
    argv = [sys.executable, "tools/bench_train.py", "--samples", "4", "--rounds", "1"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    sides = [line.split("  ")[0] for line in done.stdout.splitlines()[2:-1]]
    assert sides == ["spmd_rl", "megatron-core", "transformers", "- one by one"], done.stderr
