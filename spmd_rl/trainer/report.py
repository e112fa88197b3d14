"""Metrics of a rollout's training under slime's names, and the gates of `debug.ci_test`.

In: what each optimizer step and the rollout's columns say on this rank. Out: one dictionary, the
same on every rank of the last pipeline stage. A list holds one value for each step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spmd_rl.algo.segments import sample_ids, segment_sum
from spmd_rl.config.schema import Config
from spmd_rl.trainer.data import RolloutData
from spmd_rl.trainer.parallel import Groups
from spmd_rl.trainer.passes import reduce_metrics

Metrics = dict[str, Any]


class Timers:
    """Seconds of named phases, as perf/<name>_time."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def metrics(self) -> Metrics:
        return {f"perf/{name}_time": seconds for name, seconds in self.seconds.items()}


def collect(
    data: RolloutData,
    steps: list[tuple[dict[str, Tensor], dict[str, Tensor]]],
    groups: Groups,
) -> Metrics:
    """Loss metrics of each step and means over the rollout's samples, over all ranks."""
    columns = _columns(data)
    names = [list(sums) for sums, _ in steps]
    values = [value for sums, _ in steps for value in sums.values()]
    tail = [torch.tensor(float(data.num_tokens)), torch.tensor(float(len(data.shard.batch)))]
    flat = [v.double().to(data.device) for v in [*values, *columns.values(), *tail]]
    *reduced, tokens, samples = reduce_metrics(torch.stack(flat), groups)
    metrics: Metrics = {}
    for name in names[0] if names else []:
        at = [
            sum(map(len, names[:step])) + names[step].index(name) for step in _having(names, name)
        ]
        metrics[f"train/{name}"] = [reduced[i] for i in at]
    means = reduced[len(values) :]
    for name, value in zip(columns, means, strict=True):
        metrics[f"rollout/{name}"] = value / samples
    metrics["tokens"] = tokens
    return metrics | _maxima(steps, groups, data.device)


def _having(names: list[list[str]], name: str) -> list[int]:
    return [step for step, known in enumerate(names) if name in known]


def _maxima(steps: list, groups: Groups, device: torch.device) -> Metrics:
    names = [(step, name) for step, (_, maxima) in enumerate(steps) for name in maxima]
    if not names:
        return {}
    values = torch.stack([steps[step][1][name] for step, name in names]).to(device)
    reduced = reduce_metrics(values, groups, dist.ReduceOp.MAX)
    found: Metrics = {}
    for (_, name), value in zip(names, reduced, strict=True):
        found.setdefault(f"train/{name}", []).append(value)
    return found


def _columns(data: RolloutData) -> dict[str, Tensor]:
    """Sums over this rank's samples: of per-sample values, and of masked means of token values."""
    batch = data.shard.batch
    per_sample = {
        "rewards": batch.rewards,
        "raw_reward": batch.raw_rewards,
        "response_lengths": batch.response_lengths,
        "total_lengths": batch.total_lengths,
    }
    if batch.truncated is not None:
        per_sample["truncated"] = batch.truncated
    sums = {name: torch.tensor(float(values.sum())) for name, values in per_sample.items()}
    ids, count = sample_ids(data.response_lengths), len(batch)
    totals = segment_sum(data.mask, ids, count).clamp_min(1)
    weights = (data.mask / totals[ids]).double()
    per_token = {
        "log_probs": data.log_probs if data.known.any() else None,
        "ref_log_probs": data.ref_log_probs,
        "teacher_log_probs": data.teacher_log_probs,
        "rollout_log_probs": data.rollout_log_probs,
        "advantages": data.advantages,
        "returns": data.advantages if data.returns is None else data.returns,
        "values": data.values,
    }
    for name, values in per_token.items():
        if values is not None:
            sums[name] = (weights * torch.where(data.mask > 0, values, 0.0)).sum()
    return sums


def check_gates(metrics: Metrics, cfg: Config, rollout: int, first: int) -> None:
    """slime's CI gates: policy and reference agree at first, the first step's ratio is 1, the
    engines agree.
    """
    faults = []
    same = 1e-8 if cfg.train.log_probs_max_tokens_per_gpu is None else 1e-5
    if rollout == first == 0 and "rollout/ref_log_probs" in metrics:
        gap = abs(metrics["rollout/log_probs"] - metrics["rollout/ref_log_probs"])
        if gap > same:
            faults.append(f"mean log-prob differs from the reference's by {gap:.3g} at the start")
        kl = metrics.get("train/kl_loss", [0.0])[0]
        if abs(kl) > same:
            faults.append(f"kl_loss of the first step is {kl:.3g}")
    if not cfg.algo.use_rollout_logprobs and abs(metrics["train/ppo_kl"][0]) > same:
        faults.append(f"ppo_kl of the first step is {metrics['train/ppo_kl'][0]:.3g}")
    gaps = metrics.get("train/train_rollout_logprob_abs_diff", [0.0])
    if gaps[0] > 0.1:
        faults.append(f"log-probs of trainer and engine differ by {gaps[0]:.3g} on average")
    if faults:
        raise RuntimeError(f"debug.ci_test, rollout {rollout}: " + "; ".join(faults))
