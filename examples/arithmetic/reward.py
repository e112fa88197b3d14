"""The quickstart's reward, and a pattern for your own.

Used by `custom_rm_path: examples.arithmetic.reward.score`.

Comes in: the resolved configuration and one sample (`spmd_rl.types.Sample`); goes out: a number.
May be a plain or an async function. It runs in the collector process, never in the trainer.
"""

from __future__ import annotations

import re
from typing import Any

from spmd_rl.types import Sample, Status

FORMAT = re.compile(r"<think>[^<]*</think>\s*(-?\d+)\s*")


async def score(args: Any, sample: Sample, **kwargs: Any) -> float:
    """1 when the model stopped by itself, kept to the format, and the number is right.

    Expects `rollout_skip_special_tokens: true`: the end-of-turn token is no part of the text.
    """
    match = FORMAT.fullmatch(sample.response)
    finished = sample.status == Status.COMPLETED
    return float(finished and match is not None and match.group(1) == str(sample.label))
