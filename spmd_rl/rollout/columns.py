"""Finished samples to the columns of a `Batch`, checked, with normalised rewards.

Comes in: the accepted groups of a rollout; goes out: flat numpy arrays. User code may have built
the samples, so every length is checked and a fault names the sample.
"""

from __future__ import annotations

from itertools import chain
from math import prod
from typing import Any

import numpy as np

from spmd_rl.algo.rewards import normalise
from spmd_rl.config.schema import AlgoConfig, Config
from spmd_rl.types import Batch, Group, Sample, Status


def to_batch(
    groups: list[Group],
    cfg: Config,
    version: int = 0,
    rewards: tuple[list[float], list[float]] | None = None,
) -> Batch:
    """Columns of all samples in index order. `rewards`: raw and normalised, from the user's own
    post-processing; `version`: of tokens whose maker did not record one."""
    samples = in_order(groups)
    for sample in samples:
        _check(sample)
    if rewards is None:
        raw = np.array([reward_of(s, cfg.reward.reward_key) for s in samples], dtype=np.float64)
        normal = _normalised(samples, raw, cfg.algo)
    else:
        raw, normal = (_checked_rewards(values, len(samples)) for values in rewards)
    experts = _experts(samples, cfg)
    return Batch(
        tokens=_flat((s.tokens for s in samples), np.int32),
        total_lengths=np.array([len(s.tokens) for s in samples], dtype=np.int32),
        response_lengths=np.array([s.response_length for s in samples], dtype=np.int32),
        loss_mask=_flat((_mask(s) for s in samples), np.uint8),
        rewards=np.asarray(normal, dtype=np.float32),
        raw_rewards=np.asarray(raw, dtype=np.float32),
        rollout_ids=_rollout_ids(samples),
        rollout_log_probs=_log_probs(samples, cfg),
        weight_versions=_flat(
            (s.weight_versions or [version] * s.response_length for s in samples), np.int32
        ),
        teacher_log_probs=_of_teacher(samples, cfg),
        truncated=np.array([s.status is Status.TRUNCATED for s in samples], dtype=np.uint8),
        routed_experts=None if experts is None else np.concatenate(experts),
        routed_lengths=None if experts is None else np.array(list(map(len, experts)), np.int32),
    )


def in_order(groups: list[Group]) -> list[Sample]:
    return sorted(chain.from_iterable(groups), key=lambda sample: sample.index)


def reward_of(sample: Sample, key: str | None) -> float:
    """The number in a sample's reward."""
    reward: Any = sample.reward
    if isinstance(reward, dict):
        if key is None:
            raise ValueError(
                f"the reward is an object with {', '.join(map(str, reward))}: set "
                "reward.reward_key to the one to use"
            )
        if key not in reward:
            raise ValueError(f"the reward has no '{key}' (reward.reward_key): {reward!r:.200}")
        reward = reward[key]
    if reward is None:
        raise ValueError(f"sample {sample.index} has no reward")
    value = float(reward)
    if not np.isfinite(value):
        raise ValueError(f"the reward of sample {sample.index} is {value}")
    return value


def _normalised(samples: list[Sample], raw: np.ndarray, algo: AlgoConfig) -> np.ndarray:
    return normalise(
        raw,
        np.array([s.group_index for s in samples], dtype=np.int64),
        algo.advantage_estimator,
        rollout_ids=_rollout_ids(samples),
        use_std=not algo.disable_grpo_std_normalization,
        enabled=algo.loss_type != "sft_loss" and not algo.disable_rewards_normalization,
    )


def _rollout_ids(samples: list[Sample]) -> np.ndarray:
    ids = (s.index if s.rollout_id is None else s.rollout_id for s in samples)
    return np.fromiter(ids, dtype=np.int64)


def _flat(lists: Any, dtype: Any) -> np.ndarray:
    return np.fromiter(chain.from_iterable(lists), dtype=dtype)


def _mask(sample: Sample) -> list[int]:
    if sample.remove_sample:
        return [0] * sample.response_length
    return [1] * sample.response_length if sample.loss_mask is None else sample.loss_mask


def _log_probs(samples: list[Sample], cfg: Config) -> np.ndarray | None:
    lacking = [s.index for s in samples if s.response_length and not s.rollout_log_probs]
    if not lacking:
        return _flat((s.rollout_log_probs for s in samples), np.float32)
    needing = ("use_tis", "use_rs", "get_mismatch_metrics", "use_rollout_logprobs")
    needed = [f"algo.{key}" for key in needing if getattr(cfg.algo, key)]
    if needed:
        raise ValueError(
            f"sample {lacking[0]} has no rollout_log_probs, which {needed[0]} needs: record them "
            "in the custom generate function"
        )
    return None


def _of_teacher(samples: list[Sample], cfg: Config) -> np.ndarray | None:
    """None where no teacher behind HTTP was asked."""
    if not (cfg.algo.use_opd and cfg.algo.opd_type == "sglang"):
        return None
    for sample in samples:
        if len(sample.teacher_log_probs) != sample.response_length:
            raise ValueError(
                f"sample {sample.index} has {len(sample.teacher_log_probs)} teacher_log_probs, but "
                f"response_length {sample.response_length}: change neither after the teacher told"
            )
    return _flat((s.teacher_log_probs for s in samples), np.float32)


def _experts(samples: list[Sample], cfg: Config) -> list[np.ndarray] | None:
    """[k, layers x experts of a token] of each sample; None where nobody replays them."""
    if not cfg.algo.use_rollout_routing_replay:
        return None
    told = [s.rollout_routed_experts for s in samples]
    shapes = {array.shape[1:] for array in told if array is not None}
    for sample, array in zip(samples, told, strict=True):
        if array is None and sample.response_length:
            raise ValueError(
                f"sample {sample.index} has no rollout_routed_experts, which "
                "algo.use_rollout_routing_replay needs: call keep_experts(sample, answer) of "
                "spmd_rl.rollout.generate in the custom generate function"
            )
        if array is not None and (len(array) > len(sample.tokens) or len(shapes) > 1):
            raise ValueError(
                f"sample {sample.index} has rollout_routed_experts of shape {array.shape} for "
                f"{len(sample.tokens)} tokens: give one row for each of its first tokens, as the "
                "engine told them"
            )
    [shape] = shapes or [(0, 0)]
    dtype = next((array.dtype for array in told if array is not None), np.uint8)
    width = prod(shape)
    none = np.empty((0, width), dtype)
    return [none if array is None else array.reshape(len(array), width) for array in told]


def _check(sample: Sample) -> None:
    length = sample.response_length
    if not 0 <= length <= len(sample.tokens):
        raise ValueError(
            f"sample {sample.index} has response_length {length}, but {len(sample.tokens)} tokens"
        )
    for name in ("loss_mask", "rollout_log_probs", "weight_versions"):
        values = getattr(sample, name)
        if values and len(values) != length:
            raise ValueError(
                f"sample {sample.index} has {len(values)} entries in {name}, but "
                f"response_length {length}: they must be equal"
            )


def _checked_rewards(values: list[float], count: int) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    if len(array) != count:
        raise ValueError(
            f"reward.custom_reward_post_process_path returned {len(array)} rewards for {count} "
            "samples"
        )
    return array
