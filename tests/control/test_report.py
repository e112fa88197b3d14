"""Which report is the first cause, and what is printed."""

import json

import pytest

from spmd_rl.control.report import (
    INTERRUPTED,
    Report,
    block,
    describe,
    first_cause,
    is_symptom,
    launcher_error,
)

SYMPTOM = Report(1, "train(3)", "RuntimeError: Connection closed by peer", symptom=True)
CAUSE = Report(2, "train(3)", "Traceback\n  deep\nValueError: bad batch", time=100.0)


def test_causes_before_symptoms_then_the_first() -> None:
    later = Report(0, "train(3)", "KeyError: 1")
    assert first_cause([SYMPTOM, CAUSE, later]) is CAUSE
    assert first_cause([SYMPTOM]) is SYMPTOM


def test_the_cause_comes_last() -> None:
    text = block([SYMPTOM, CAUSE])
    assert text.index("closed by peer") < text.index("Traceback")
    assert text.endswith("cause: rank 2 in train(3): ValueError: bad batch\n")


def test_an_interrupt_is_one_line() -> None:
    text = block([Report(0, "the loop", "interrupted (SIGINT)", status=INTERRUPTED), CAUSE])
    assert text == "\ninterrupted (SIGINT) (the loop)\n"


def test_reports_survive_the_store() -> None:
    assert Report.decode(CAUSE.encode()) == CAUSE


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer"), True),
        (ConnectionResetError(), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_symptoms(error: BaseException, expected: bool) -> None:
    assert is_symptom(error) is expected


def test_own_frames_are_left_out() -> None:
    def ours() -> None:
        theirs()

    def theirs() -> None:
        raise ValueError("x")

    try:
        ours()
    except ValueError as error:
        text = describe(error, skip=2)
    assert "in theirs" in text and "in ours" not in text


def test_torchrun_takes_the_guilty_rank_for_the_root_cause() -> None:
    def when(rank: int) -> int:
        return int(json.loads(launcher_error(CAUSE, rank))["message"]["extraInfo"]["timestamp"])

    assert when(2) < when(0) == when(1)
