"""Commands reach all ranks in order and their answers come back by rank; disagreement ends the
job.
"""

import pickle

import numpy as np
import pytest

from spmd_rl.control.channel import pack, unpack
from spmd_rl.control.secret import SIGNATURE, Secret
from spmd_rl.types import Placement, Sample, Status
from tests.control import jobs
from tests.ranks import run_ranks

NONE = Secret()


@pytest.mark.parametrize(("launcher", "ranks"), [("agent", 4), ("srun", 2), ("alone", 1)])
def test_answers_by_rank(launcher: str, ranks: int) -> None:
    outcome = run_ranks(ranks, jobs.commands, launcher=launcher)
    assert outcome.statuses == [0] * ranks, outcome.output
    assert int(outcome.lines("KEYS")[0]) < ranks  # small answers wait for the next command
    assert outcome.left == []


def test_tensors_are_refused_with_a_reason() -> None:
    outcome = run_ranks(2, jobs.misuse)
    assert all(outcome.statuses)
    assert "no method 'start_over' marked @command" in outcome.output
    assert "send tensors through a process group" in outcome.last()


def test_a_rank_out_of_step_ends_the_job() -> None:
    outcome = run_ranks(3, jobs.disagree)
    assert all(outcome.statuses)
    assert "the ranks disagree: rank 2 waits for command 3, rank 0 is at 1" in outcome.last()
    assert outcome.since("NOW") < 6.0


@pytest.mark.parametrize(
    "value",
    [
        (1, 2.5, None, "x", b"y", True),
        {"a": [1, (2, {3})]},
        Placement(2, 2, (0,), (1,), (), False),
        Sample(tokens=[1, 2], status=Status.COMPLETED),
    ],
)
def test_plain_values_survive(value: object) -> None:
    assert unpack(NONE, pack(NONE, 7, "name", value)) == (7, "name", value)


def test_arrays_survive() -> None:
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    back = unpack(NONE, pack(NONE, array, array.T, np.float32(1.5)))
    assert np.array_equal(back[0], array) and np.array_equal(back[1], array.T) and back[2] == 1.5


def test_nothing_from_the_store_can_run_code() -> None:
    class Evil:
        def __reduce__(self):
            return print, ("gotcha",)

    with pytest.raises(TypeError, match=r"not builtins\.print"):
        unpack(NONE, pack(NONE, Evil()))
    assert pickle.loads(pack(NONE, 1)[SIGNATURE:]) == (1,)  # a signature, then an ordinary pickle


def test_what_another_writes_is_refused_unread() -> None:
    ours, theirs = Secret(b"ours"), Secret(b"theirs")
    assert unpack(ours, pack(ours, 1)) == (1,)
    for data in (pack(theirs, 1), pack(ours, 1)[:-1] + b"x", b""):
        with pytest.raises(RuntimeError, match="without this job's signature"):
            unpack(ours, data)
