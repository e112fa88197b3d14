"""tools/check_rewards.py and bench_rewards.py on a few rows of our own."""

import asyncio
import json
import subprocess
import sys

from tests.models import ROOT
from tools.check_rewards import WRONG_CODE, compare_code, compare_math

LABELS = ["204", "27.0", r"\frac{14}{3}", r"2\sqrt{5}", r"\left( 3, \frac{\pi}{2} \right)", "52_8"]


def write(folder, rows):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_ours_errs_no_more_than_math_verify(tmp_path):
    found = asyncio.run(compare_math(write(tmp_path, [{"label": a} for a in LABELS]), False, 1))
    ours, theirs = found["rows"]["ours"], found["rows"]["math-verify"]
    assert ours["equal"] > len(LABELS) and ours["wrong"] > 3 * len(LABELS)
    assert ours["false accept"] <= theirs["false accept"]
    assert ours["false reject"] == 0 and ours["false accept"] == 0


def test_solutions_are_accepted_and_nothing_else(tmp_path):
    row = {
        "task_id": "T/0",
        "prompt": 'def double(x):\n    """Twice x."""\n',
        "canonical_solution": "    return 2 * x\n",
        "entry_point": "double",
        "test": "def check(c):\n    assert c(2) == 4\n    assert c(0) == 0\n",
    }
    found = asyncio.run(compare_code(write(tmp_path, [row]), False, 2, timeout=1.0))
    assert found.pop("solution") == found.pop("solution alone") == {"accepted": 1}
    assert found == {kind: {"rejected": 1} for kind in WRONG_CODE}


def test_the_bench_tells_its_speed(tmp_path):
    command = [sys.executable, "-m", "tools.bench_rewards", "speed"]
    command += [str(write(tmp_path, [{"label": a} for a in LABELS])), "--workers", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "x workers x one process" in done.stdout, done.stderr
