"""Dynamic sampling filters: which groups are worth training on.

A filter is `f(args, samples, **kwargs) -> bool | DynamicFilterOutput`; these are the shipped ones.
"""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from spmd_rl.config.schema import Config
from spmd_rl.rollout.columns import reward_of
from spmd_rl.types import Sample


class DynamicFilterOutput(NamedTuple):
    keep: bool
    reason: str | None = None  # counted as rollout/dynamic_filter/drop_<reason>


def check_reward_nonzero_std(args: Config, samples: list[Sample], **kwargs: Any):
    """Keep a group whose rewards differ: from any other, grpo learns nothing."""
    rewards = [reward_of(sample, args.reward.reward_key) for sample in samples]
    keep = len(rewards) > 1 and statistics.stdev(rewards) > 1e-6
    return DynamicFilterOutput(keep, None if keep else f"zero_std_{round(rewards[0], 1)}")


def verdict(answer: Any) -> str | None:
    """Why a filter turned a group down; None when it is kept."""
    if isinstance(answer, DynamicFilterOutput) or hasattr(answer, "keep"):
        return None if answer.keep else (answer.reason or "rejected")
    return None if answer else "rejected"
