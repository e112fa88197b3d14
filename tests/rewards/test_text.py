"""`dapo`, `f1` and `gpqa`."""

import pytest

from spmd_rl.rewards.dapo import dapo
from spmd_rl.rewards.text import f1, gpqa


@pytest.mark.parametrize(
    ("response", "label", "prediction"),
    [
        ("so it is\nAnswer: 72", "72", "72"),
        ("Answer: 1\nAnswer: $72$.", "72.0", "72"),
        ("answer:  \\boxed{1,072} dollars", 1072, "1072"),
        ("Answer: x = 72", "72", "72"),
        (r"Answer: \frac12", r"\frac12", r"\frac{1}{2}"),
    ],
)
def test_dapo_right(response, label, prediction):
    assert dapo(response, label) == {"score": 1.0, "acc": True, "pred": prediction}


def test_dapo_wrong():
    assert dapo("72", "72") == {"score": -1.0, "acc": False, "pred": "[INVALID]"}
    assert dapo("Answer: 71", "72")["score"] == -1.0
    assert dapo("Answer: 72" + " " * 300, "72")["acc"] is False  # only the end is looked at


def test_f1():
    assert f1("The Eiffel Tower!", "eiffel tower") == 1.0
    assert f1("a tall tower in Paris", "Eiffel tower") == pytest.approx(1 / 3)  # 1/4 and 1/2
    assert f1("London", "Paris") == 0.0
    assert f1("yes it is", "yes") == 0.0
    assert f1("Yes.", "yes") == 1.0
    assert f1("", "Paris") == 0.0


CHOICES = {"choices": ["red", "green", "blue", "no colour"]}


@pytest.mark.parametrize(
    ("response", "label", "metadata", "reward"),
    [
        ("The answer is (B).", "B", {}, 1.0),
        ("<think>Answer: A</think> Answer: B", "B", {}, 1.0),
        (r"\boxed{C}", "C", {}, 1.0),
        (r"\boxed{\text{D}}", "D", {}, 1.0),
        ("The correct choice is **B**", "B", {}, 1.0),
        ("I think so.\nB", "B", {}, 1.0),
        ("The answer is A, I mean the answer is B", "B", {}, 1.0),
        ("The answer is A", "B", {}, 0.0),
        ("I do not know", "B", {}, 0.0),
        ("Answer: B", "green", CHOICES, 1.0),
        ("It must be\ngreen", "B", CHOICES, 1.0),
        ("Answer: Z", "B", CHOICES, 0.0),
        ("Answer: C", "x", CHOICES | {"correct_letter": "C"}, 1.0),
    ],
)
def test_gpqa(response, label, metadata, reward):
    assert gpqa(response, label, metadata) == reward
