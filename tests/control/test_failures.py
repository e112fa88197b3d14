"""Whatever goes wrong on any rank: all gone in seconds, nothing left, the cause at the end."""

import re
from pathlib import Path

import pytest

from tests.control import jobs
from tests.ranks import Outcome, run_ranks

HEARTBEAT = 2.0  # seconds, in jobs.start
SECONDS = 5.0  # 0.2-1.0 when quiet; other tests may share the machine


def check(outcome: Outcome, cause: str, seconds: float = SECONDS) -> None:
    assert all(status for status in outcome.statuses), outcome.output  # ended, and not with 0
    assert re.search(cause, outcome.last()), outcome.output
    assert outcome.output.count("the job failed") == 1, outcome.output
    assert outcome.since("NOW") < seconds
    assert outcome.left == []


@pytest.mark.parametrize("launcher", ["agent", "plain"])
@pytest.mark.parametrize("culprit", [0, 2])
def test_exception(culprit: int, launcher: str) -> None:
    outcome = run_ranks(3, jobs.fail, str(culprit), "raise", launcher=launcher)
    check(outcome, rf"cause: rank {culprit} in barrier_but.*ValueError: bad batch")
    assert "Traceback" in outcome.last() and "line" in outcome.last()


@pytest.mark.parametrize(("launcher", "culprit"), [("agent", 0), ("agent", 2), ("plain", 0)])
def test_killed(culprit: int, launcher: str) -> None:
    outcome = run_ranks(3, jobs.fail, str(culprit), "kill", launcher=launcher)
    check(outcome, rf"cause: rank {culprit} \(process \d+\) (was killed|is gone)")


@pytest.mark.parametrize(("launcher", "culprit"), [("agent", 0), ("agent", 2), ("plain", 0)])
def test_frozen(culprit: int, launcher: str) -> None:
    outcome = run_ranks(3, jobs.fail, str(culprit), "stop", launcher=launcher)
    check(outcome, rf"cause: rank {culprit} \(process \d+\) is frozen", HEARTBEAT + SECONDS)
    assert outcome.statuses[culprit] == -9  # by a neighbour


def test_silent_exit() -> None:
    check(run_ranks(3, jobs.fail, "1", "exit"), "cause: rank 1 .* (status 7|is gone) ?")


def test_exception_in_the_loop() -> None:
    check(run_ranks(3, jobs.loop_error), "cause: rank 0 in the loop: KeyError: 'no such prompt'")


@pytest.mark.parametrize(
    ("what", "cause"), [("raise", "ValueError: bad batch"), ("kill", "rank 1 .* was killed")]
)
def test_torchrun_says_it_too(what: str, cause: str) -> None:
    """Its own summary, printed after ours, ends with the cause and names the rank."""
    outcome = run_ranks(2, jobs.fail, "1", what, launcher="torchrun")
    check(outcome, cause)
    assert re.search(r"rank +: 1 ", outcome.last())


def test_deadline_with_stacks(tmp_path: Path) -> None:
    outcome = run_ranks(3, jobs.deadline, env={"RUN_DIR": str(tmp_path)})
    check(outcome, "command hang_on missed its deadline of 1 s: no answer from rank 1;", 8.0)
    stacks = [(tmp_path / "logs" / f"stacks.rank{rank}").read_text() for rank in range(3)]
    assert "in _hang" in stacks[1] and "in _collect" in stacks[0] and "in _obey" in stacks[2]


def test_logs_keep_everything(tmp_path: Path) -> None:
    outcome = run_ranks(2, jobs.noisy, env={"RUN_DIR": str(tmp_path), "LOG": "1"})
    first, second = ((tmp_path / "logs" / f"rank{rank}.log").read_text() for rank in range(2))
    for text in ("python says 0", "a child says 0", "x" * 200_000, "RuntimeError: the end"):
        assert text in first and text in outcome.output
    assert "python says 1" in second and "a child says 1" in second
    assert "says 1" not in outcome.output
    assert outcome.last(1) == first.rstrip().splitlines()[-1]
    assert outcome.last(1) == "cause: rank 0 in the loop: RuntimeError: the end"
