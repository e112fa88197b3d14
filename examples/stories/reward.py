"""A reward without labels: `custom_rm_path: examples.stories.reward.score`."""

from __future__ import annotations

from typing import Any

from spmd_rl.types import Sample


def score(args: Any, sample: Sample, **kwargs: Any) -> float:
    """The share of words that are new: 1 for a story that never repeats a word, 0 for none."""
    words = sample.response.lower().split()
    return len(set(words)) / len(words) if words else 0.0
