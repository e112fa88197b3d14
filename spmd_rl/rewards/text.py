"""rm_type `f1` (words in common, as in SQuAD) and `gpqa` (which choice was named)."""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
CLOSED = ("yes", "no", "noanswer")  # answers that are right as a whole or not at all


def f1(response: str, label: Any) -> float:
    """Harmonic mean of precision and recall of words."""
    given, wanted = words(response), words(str(label))
    if (given in CLOSED or wanted in CLOSED) and given != wanted:
        return 0.0
    ours, theirs = given.split(), wanted.split()
    common = sum((Counter(ours) & Counter(theirs)).values())
    if not common:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def words(text: str) -> str:
    """Lower case, without punctuation and articles, one space between words."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


_NAMED = (
    re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*\(?([A-Za-z])\)?\s*\}"),
    re.compile(r"(?i)\b(?:answer|choice|option)\b[^\nA-Za-z]{0,8}(?:is|:)?[^\nA-Za-z]{0,8}"
               r"\(?([A-Z])\)?(?![A-Za-z])"),
    re.compile(r"^\s*[*(]*([A-Za-z])[).*]*\s*$", re.MULTILINE),
)  # fmt: skip


def gpqa(response: str, label: Any, metadata: dict[str, Any]) -> float:
    """1.0 when the response names the right choice, by its letter or by its text."""
    choices = _choices(metadata)
    truth = str(metadata.get("correct_letter") or label).strip()
    if truth.upper() not in choices and truth not in string.ascii_letters:
        truth = next((k for k, text in choices.items() if words(text) == words(truth)), truth)
    text = response.rsplit("</think>", 1)[-1]
    letter = _letter(text, metadata.get("valid_letters") or list(choices) or None)
    if letter is None:
        given = words(text.strip().rsplit("\n", 1)[-1])
        letter = next((key for key, choice in choices.items() if words(choice) == given), None)
    return float(letter is not None and letter.upper() == truth.upper())


def _choices(metadata: dict[str, Any]) -> dict[str, str]:
    choices = metadata.get("choices") or {}
    if isinstance(choices, dict):
        return {str(key).upper(): str(text) for key, text in choices.items()}
    return dict(zip(string.ascii_uppercase, map(str, choices), strict=False))


def _letter(text: str, valid: list[str] | None) -> str | None:
    allowed = {str(letter).upper() for letter in valid or string.ascii_uppercase}
    for pattern in _NAMED:
        found = [letter.upper() for letter in pattern.findall(text) if letter.upper() in allowed]
        if found:
            return found[-1]
    return None
