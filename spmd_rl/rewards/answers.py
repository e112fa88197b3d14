"""Where the answer stands in a text, and when two answers are equal on sight.

Comes in: responses, labels, answers as text; goes out: text, or True / False / None for "needs
algebra". Every function takes time linear in its input: responses may be hostile.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

LONGEST = 1000  # characters; a longer answer is only compared as text
BOXES = ("\\boxed", "\\fbox")


def label_text(label: Any) -> str:
    """The result a label names: itself, what follows `####` (GSM8K), or what its box holds."""
    text = str(label)
    if "####" in text:
        return text.rsplit("####", 1)[1].strip()
    boxed = last_boxed(text)
    return text if boxed is None else boxed


def after_thinking(response: str) -> str | None:
    """What follows the last </think>, or ###Response; None when the answer was never begun."""
    if "</think>" in response:
        return response.rsplit("</think>", 1)[1]
    if "###Response" in response:
        return response.split("###Response", 1)[1]
    return None


def last_boxed(text: str) -> str | None:
    """What the last \\boxed{...} (or \\fbox, or `\\boxed x`) holds."""
    start = max(text.rfind(box) for box in BOXES)
    if start < 0:
        return None
    rest = text[start + (6 if text.startswith("\\boxed", start) else 5) :]
    if rest.startswith(" ") and not rest.lstrip().startswith("{"):
        return rest.split("$", 1)[0].split("\n", 1)[0].strip() or None
    rest = rest.lstrip()
    depth = 0
    for position, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:position] if character == "}" else None
    return None  # never closed


def after_hashes(response: str) -> str | None:
    """GSM8K's own way to end a solution: the number after the last ####."""
    if "####" not in response:
        return None
    return response.rsplit("####", 1)[1].strip().split("\n", 1)[0].strip() or None


def same(answer: str, truth: str) -> bool | None:
    """Whether two answers are equal, where their text or numbers tell; None: it takes algebra."""
    plain, wanted = normalize(answer), normalize(truth)
    if plain == wanted:
        return bool(wanted)
    if not plain or not wanted or len(plain) > LONGEST or len(wanted) > LONGEST:
        return False
    number, target = as_number(plain), as_number(wanted)
    if target is not None and target.denominator == 1 and _is_literal(wanted):
        # An integer must be given as one: 24+48 shows no result.
        return number == target and _is_literal(plain)
    if number is not None and target is not None:
        if not _is_literal(plain) and not _is_literal(wanted):  # both fractions: reduced alike
            return _digits(plain) == _digits(wanted)
        return number == target
    bases = _BASED.fullmatch(plain), _BASED.fullmatch(wanted)
    if bases[0] and bases[1]:  # math-verify sees no base: 52_8 would be 52_9
        return bases[0].groups() == bases[1].groups()
    return False if _hopeless(plain, wanted) else None


DEEPEST = 15  # brackets in each other
LENGTHENED = 300  # characters more than the right answer has


def _hopeless(answer: str, truth: str) -> bool:
    """Whether algebra would cost its whole time limit: hostile answers do so by towers of powers,
    factorials, sums or depth, where the right answer has nothing of the kind.
    """
    if len(answer) > len(truth) + LENGTHENED or _depth(answer) > max(DEEPEST, _depth(truth)):
        return True
    if any(answer.count(mark) > truth.count(mark) + 6 for mark in "=|<>!"):
        return True
    return any(kind.search(answer) and not kind.search(truth) for kind in _COSTLY)


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


_BASED = re.compile(r"(\d+)_\{?(\d+)\}?")
_COSTLY = tuple(
    map(
        re.compile,
        (
            r"\^\{?-?\d{4}",  # a power with a long exponent
            r"\^\{?[^{}^]{0,9}\^",  # a power of a power
            r"(\d{3}|!|\))!",
            r"\\(int|sum|prod|lim|iint|oint)(?![a-z])",
            r"\\[dt]?binom\{?\d{4}",
        ),
    )
)
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)")
_FRACTION = re.compile(r"(-?)\\frac\{(-?\d+)\}\{(-?\d+)\}|(-?\d+)/(-?\d+)")
_POINT = re.compile(r"(?<=\d)\.(?=/)")  # 1./3
_THOUSANDS = re.compile(r"(\d),(?=\d\d\d(\D|$))")
_SHORT_FRACTION = re.compile(r"\\frac(\d)(\d)")
_HALF_FRACTION = re.compile(r"\\frac(\d)\{")
_SHORT_ROOT = re.compile(r"\\sqrt(\w)")
_DROPPED = (
    "\n", "\\!", "\\,", "\\;", "\\left", "\\right", "^{\\circ}", "^\\circ", "\\$", "$", "\\%", "%",
)  # fmt: skip


def normalize(text: str) -> str:
    """Text without what does not change an answer: spaces, units, ways to write a fraction."""
    text = text.strip()
    whole = _TEXT.fullmatch(text)
    if whole:
        text = whole[1].strip()
    for mark in _DROPPED:
        text = text.replace(mark, "")
    text = text.replace("\\\\", "\\").replace("tfrac", "frac").replace("dfrac", "frac")
    unit = text.find("\\text{ ")
    if unit > 0:
        text = text[:unit]
    name, equals, value = text.partition("=")
    if equals and len(name.strip()) <= 2 and "=" not in value:
        text = value  # x = 3
    text = _POINT.sub("", text.replace(" ", "").rstrip("."))
    if text.startswith("."):
        text = f"0{text}"
    text = text.replace("{.", "{0.")
    text = _SHORT_ROOT.sub(r"\\sqrt{\1}", text)
    text = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text)
    text = _HALF_FRACTION.sub(r"\\frac{\1}{", text)
    return _THOUSANDS.sub(r"\1", text)


def as_number(text: str) -> Fraction | None:
    """The number a normalised text writes out, as digits or as a fraction of integers."""
    if _NUMBER.fullmatch(text):
        return Fraction(text.rstrip("."))
    match = _FRACTION.fullmatch(text)
    if not match:
        return None
    sign, top, bottom, plain_top, plain_bottom = match.groups()
    numerator, denominator = int(top or plain_top), int(bottom or plain_bottom)
    if not denominator:
        return None
    return Fraction(-numerator if sign else numerator, denominator)


def _digits(text: str) -> list[str]:
    return re.findall(r"-|\d+", text)


def _is_literal(text: str) -> bool:
    return _NUMBER.fullmatch(text) is not None
