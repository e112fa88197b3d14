"""A reward for GSM8K's own rows, whose label is a worked answer.

Used by `custom_rm_path: examples.gsm8k.reward.score`. The result follows `####` in the
label. In a response it follows `####` or stands in `\\boxed{}`; a response with neither is judged
by its last number.
"""

from __future__ import annotations

import re
from typing import Any

from spmd_rl.types import Sample

NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
MARKED = re.compile(r"(?:####\s*|\\boxed\{)\s*(-?\$?\d[\d,]*(?:\.\d+)?)")


async def score(args: Any, sample: Sample, **kwargs: Any) -> float:
    """1 when the response's result equals the label's, else 0."""
    truth, found = result(str(sample.label)), result(sample.response)
    return float(truth is not None and truth == found)


def result(text: str) -> float | None:
    """The number a text ends with: the last marked one, else the last one."""
    numbers = MARKED.findall(text) or NUMBER.findall(text)
    return float(numbers[-1].replace(",", "").replace("$", "")) if numbers else None
