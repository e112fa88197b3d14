"""rm_type `math` and `deepscaler`: 1 when the boxed answer equals the label, else 0.

Equality: the same text once spelling is out of the way, the same number, or the same by algebra
(math-verify, in a worker with a time limit). An integer must be given as one.
"""

from __future__ import annotations

from typing import Any

from spmd_rl.rewards import answers
from spmd_rl.rewards.pool import Pool


async def math(response: str, label: Any, pool: Pool) -> int:
    """The last box anywhere in the response; for GSM8K labels also the number after ####."""
    answer = answers.last_boxed(response)
    if answer is None and "####" in str(label):
        answer = answers.after_hashes(response)
    return await grade(answer, label, pool)


async def deepscaler(response: str, label: Any, pool: Pool) -> int:
    """The last box after the last </think> (or after ###Response); without either, 0."""
    solution = answers.after_thinking(response)
    return await grade(answers.last_boxed(solution) if solution else None, label, pool)


async def grade(answer: str | None, label: Any, pool: Pool) -> int:
    """1 when the answer equals the label, or one of a list of labels."""
    if answer is None:
        return 0
    for truth in label if isinstance(label, list) else [label]:
        text = answers.label_text(truth)
        equal = answers.same(answer, text)
        if equal is None:
            equal = await pool.equal(answer, text)
        if equal:
            return 1
    return 0
