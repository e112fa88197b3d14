"""rm_type `format`: 1.0 for `<think>thoughts</think><answer>answer</answer>` and nothing else.

DeepSeek-R1's form. The opening tag may be missing where the chat template wrote it into the prompt.
"""

from __future__ import annotations

import re

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_FORM = re.compile(r"<think>(.*)</think>\s*<answer>(.*)</answer>", re.DOTALL)


def form(response: str, prompt: object = "") -> float:
    """Each tag once, in order, around text that is not empty; only spaces outside."""
    text = response.strip()
    if isinstance(prompt, str) and prompt.rstrip().endswith(TAGS[0]):
        text = TAGS[0] + text
    match = _FORM.fullmatch(text) if all(text.count(tag) == 1 for tag in TAGS) else None
    return float(bool(match and match[1].strip() and match[2].strip()))
