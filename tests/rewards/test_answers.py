"""Where answers stand, and which are equal on sight."""

import time

import pytest

from spmd_rl.rewards.answers import after_thinking, label_text, last_boxed, normalize, same


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{72}.", "72"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {3}", "3"),
        (r"\boxed 5 $ and", "5"),
        (r"\fbox{9}", "9"),
        (r"\boxed{}", ""),
        (r"\boxed{1", None),
        (r"\boxed", None),
        ("nothing", None),
        (r"\boxed{a{b}c}d}", "a{b}c"),
    ],
)
def test_last_boxed(text, answer):
    assert last_boxed(text) == answer


def test_labels():
    assert label_text("5 and 7 make 12.\n#### 12") == "12"
    assert label_text(r"$\boxed{4}$") == "4"
    assert label_text(3.5) == "3.5"


def test_after_thinking():
    assert after_thinking("a</think>b</think>c") == "c"
    assert after_thinking("x###Responsey") == "y"
    assert after_thinking("no end of thought") is None


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("72", "72"),
        ("72.0", "72"),
        ("$72", "72"),
        ("1,072", "1072"),
        ("1,234,567", "1234567"),
        (" 72 ", "72."),
        (r"\text{C}", "C"),
        (r"\frac12", r"\frac{1}{2}"),
        (r"\dfrac{1}{2}", r"\tfrac{1}{2}"),
        (r"\left( 3, 4 \right)", "(3,4)"),
        ("x = 5", "5"),
        ("x=5", "x = 5"),
        (".5", "0.5"),
        (r"50\%", "50"),
        (r"90^\circ", "90"),
        (r"12\text{ cm}", "12"),
        ("3/4", r"\frac{3}{4}"),
        ("0.75", "3/4"),
        (r"\sqrt2", r"\sqrt{2}"),
        ("52_8", "52_{8}"),
        ("-1./3", r"-\frac{1}{3}"),
        ("-3", "-3.00"),
    ],
)
def test_equal_on_sight(answer, truth):
    assert same(answer, truth) is True


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("71", "72"),
        ("24+48", "72"),  # an integer must be given as one
        ("144/2", "72"),
        ("72 or 73", "72"),
        ("", "72"),
        ("6/8", "3/4"),  # a fraction reduced otherwise
        ("0.3", "1/3"),
        ("1/0", "3/4"),
        ("-72", "72"),
        ("7" * 5000, "72"),
        ("x", ""),
        ("52_8", "52_9"),
        ("-1./3", "-1./4"),
        ("9^{9^{9}}", r"\sqrt{17}"),  # and other answers that would take their whole time
        ("x^{10000}", "x^2"),
        ("1000!", r"\sqrt{17}"),
        (r"\int_0^1 x dx", r"\sqrt{17}"),
        (r"\binom{10000}{50}", r"\sqrt{17}"),
        ("(" * 20 + "x" + ")" * 20, "x + 1"),
        ("x+" * 200 + "1", "x + 1"),
    ],
)
def test_different_on_sight(answer, truth):
    assert not same(answer, truth)


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        (r"2\sqrt{2}", r"\sqrt{8}"),
        ("(x+1)^2", "x^2+2x+1"),
        (r"\pi/2", r"\frac{\pi}{2}"),
        ("2^{2020}", "4^{1010}"),
        ("10^{12}", "x"),
        (r"\sum_{k=1}^n k", r"\sum_{j=1}^n j"),
    ],
)
def test_undecided_on_sight(answer, truth):
    assert same(answer, truth) is None


@pytest.mark.parametrize("piece", ["{", "}", "\\boxed{", "\\frac", "=", ",1", "$", "\\text{", " "])
def test_a_long_text_takes_little_time(piece):
    text = piece * (1_000_000 // len(piece))
    start = time.monotonic()
    last_boxed(text)
    normalize(text)
    same(text, "72")
    assert time.monotonic() - start < 5  # 0.1 s on a quiet machine; a square would take hours
