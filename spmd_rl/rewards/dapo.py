"""rm_type `dapo`: the last `Answer: ...` line in Minerva's normal form; a score of 1 or -1."""

from __future__ import annotations

import re
from typing import Any

LOOKED_AT = 300  # characters at the end of the response
_ANSWER = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")
REPLACED = (
    ("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text"),
    (",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}"),
)  # fmt: skip
REMOVED = (
    "square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", "\\ldots",
    "sue", "points", "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds",
    "meters", "meals", "edges", "students", "childrentickets", "multiples", "\\text{s}",
    "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}", "\\text{}",
    "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots",
)  # fmt: skip
_PATTERNS = (
    (re.compile(r"(.*?)(\$)(.*?)(\$)(.*)"), r"$\3$"),
    (re.compile(r"(\\text\{)(.*?)(\})"), r"\2"),
    (re.compile(r"(\\textbf\{)(.*?)(\})"), r"\2"),
    (re.compile(r"(\\overline\{)(.*?)(\})"), r"\2"),
    (re.compile(r"(\\boxed\{)(.*)(\})"), r"\2"),
    (re.compile(r"(frac)([^{])(.)"), r"frac{\2}{\3}"),
    (re.compile(r"(sqrt)([^{])"), r"sqrt{\2}"),
)


def dapo(response: str, label: Any) -> dict[str, Any]:
    found = _ANSWER.findall(response[-LOOKED_AT:])
    prediction = normalize(found[-1]) if found else "[INVALID]"
    correct = prediction == _truth(label)
    return {"score": 1.0 if correct else -1.0, "acc": correct, "pred": prediction}


def normalize(answer: str) -> str:
    """Minerva's normal form of a final answer (Lewkowycz et al. 2022, appendix D)."""
    answer = answer.split("=")[-1]
    for before, after in REPLACED:
        answer = answer.replace(before, after)
    for expression in REMOVED:
        answer = answer.replace(expression, "")
    for pattern, form in _PATTERNS:
        answer = pattern.sub(form, answer)
    answer = answer.replace("$", "")
    digits = answer.replace(",", "")
    return (digits if digits.isdigit() else answer).strip()


def _truth(label: Any) -> str:
    try:
        return str(int(float(label)))
    except (ValueError, OverflowError):
        return normalize(str(label))
