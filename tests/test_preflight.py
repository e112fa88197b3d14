"""tools/preflight.py under plain torchrun, and its comparison of nodes."""

from __future__ import annotations

from pathlib import Path

from tests.ranks import run_ranks
from tools import preflight


def program(*argv: str) -> None:
    import sys

    sys.argv[1:] = argv
    preflight.main()


def test_this_machine_is_healthy(tmp_path: Path) -> None:
    outcome = run_ranks(2, program, "--run-dir", str(tmp_path), launcher="torchrun")
    assert outcome.statuses == [0], outcome.output
    assert "all-reduce of 32 MiB over 2 ranks on 1 node, gloo" in outcome.output
    assert "no fault" in outcome.output and list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_and_gpus_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = ("--run-dir", str(tmp_path / "file" / "runs"), "--gpus", "8")
    outcome = run_ranks(1, program, *words, launcher="agent", env={"PATH": "/nowhere"})
    assert outcome.statuses == [1]
    assert len(outcome.lines("FAULT: ")) == 2, outcome.output
    assert "cannot write to" in outcome.output and "was to have 8 GPUs" in outcome.output


SAME = dict.fromkeys(preflight.SAME, "1")


def test_what_differs_is_named_with_the_nodes_and_the_fix() -> None:
    rows = {"a": SAME, "b": SAME | {"torch": "2"}, "c": SAME | {"driver": "3"}, "d": SAME}
    torch, driver = preflight.differences(rows)
    assert torch == "torch differs: 1 on a, c, d, but 2 on b: use one environment on all nodes"
    assert driver.endswith("but 3 on c: leave the odd nodes out with --exclude")
    assert preflight.differences({"a": SAME, "b": SAME}) == []


def test_many_nodes_are_shown_in_blocks() -> None:
    rows = {f"node{i}": {"python": f"3.{i}"} for i in range(8)}
    text = preflight.table(rows)
    assert text.count("python") == 2 and max(map(len, text.splitlines())) < 60
