"""Raw rewards to what the advantage estimator starts from: centred and scaled within each prompt's
group.

In: raw rewards [N] with the group (prompt) each sample belongs to. Out: float32 [N]. numpy only: it
runs in the collector's process, beside user hooks. Source: slime's `post_process_rewards`, except
that a batch with groups of unequal size is still normalised per prompt (slime then treats the whole
batch as one group).
"""

from __future__ import annotations

import numpy as np

STD_SCALED = ("grpo", "gspo", "cispo")
CENTRED = (*STD_SCALED, "rloo", "reinforce_plus_plus_baseline")
EPSILON = 1e-6  # added to the standard deviation


def normalise(
    raw: np.ndarray,
    group_ids: np.ndarray,
    estimator: str,
    *,
    rollout_ids: np.ndarray | None = None,
    use_std: bool = True,
    enabled: bool = True,
) -> np.ndarray:
    """Normalised rewards [N] float32, in float64 arithmetic.

    `rollout_ids`: samples sharing one (a trajectory split into several) count once in the group's
    mean and deviation, with the mean of their rewards. `use_std`: not
    `disable_grpo_std_normalization`. `enabled`: not `disable_rewards_normalization`. ppo and
    reinforce_plus_plus take raw rewards.
    """
    raw = np.asarray(raw, dtype=np.float64)
    if not enabled or estimator not in CENTRED or not len(raw):
        return raw.astype(np.float32)
    rewards, groups = raw, np.unique(np.asarray(group_ids), return_inverse=True)[1]
    sample_groups = groups
    if rollout_ids is not None:
        rewards, groups = _one_per_rollout(raw, groups, np.asarray(rollout_ids))

    size = np.bincount(groups)
    mean = np.bincount(groups, rewards) / size
    centred = raw - mean[sample_groups]
    if estimator == "rloo":  # r minus the mean of the others = (r - mean) * n / (n - 1)
        centred *= (size / np.maximum(size - 1, 1))[sample_groups]
    if estimator in STD_SCALED and use_std:
        spread = np.bincount(groups, (rewards - mean[groups]) ** 2) / np.maximum(size - 1, 1)
        scaled = centred / (np.sqrt(spread)[sample_groups] + EPSILON)
        centred = np.where(size[sample_groups] > 1, scaled, centred)
    return np.where(_is_constant(raw, sample_groups), 0.0, centred).astype(np.float32)


def _one_per_rollout(
    raw: np.ndarray, groups: np.ndarray, rollout_ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean reward and group of each distinct rollout id."""
    first, inverse = np.unique(rollout_ids, return_index=True, return_inverse=True)[1:]
    return np.bincount(inverse, raw) / np.bincount(inverse), groups[first]


def _is_constant(raw: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """[N] whether all rewards of the sample's group are equal: rounding must not turn into a
    signal.
    """
    low, high = np.full(groups.max() + 1, np.inf), np.full(groups.max() + 1, -np.inf)
    np.minimum.at(low, groups, raw)
    np.maximum.at(high, groups, raw)
    return (low == high)[groups]
