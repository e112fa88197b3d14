"""The rollout's gap between engine and trainer, over all ranks, as metrics and perhaps a sentence.

In: a rollout's columns after its steps, the version that the engines should have. Out: metrics
under `mismatch/`, and an alarm for rank 0 to say. Collective over data-parallel ranks, on the last
pipeline stage.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from spmd_rl.algo import mismatch
from spmd_rl.algo.segments import sample_ids
from spmd_rl.trainer.data import RolloutData
from spmd_rl.trainer.parallel import Groups

ALARM = "alarm"  # the sentence among the metrics; the run log takes it out and says it


def report(
    data: RolloutData,
    watch: mismatch.Watch,
    groups: Groups,
    version: int | None,
    temperature: float,
) -> dict[str, Any]:
    """`version`: of the last push; None: the newest that any token names."""
    if data.rollout_log_probs is None:
        return {}
    versions = data.shard.batch.weight_versions
    versions = torch.zeros(len(data.mask)) if versions is None else torch.from_numpy(versions)
    versions = versions.long().to(data.device)
    if version is None:
        newest = versions.max() if len(versions) else versions.new_zeros(())
        if groups.dp_size > 1:
            dist.all_reduce(newest, op=dist.ReduceOp.MAX, group=groups.dp)
        version = int(newest)
    ids = sample_ids(data.response_lengths)
    starts = data.response_lengths.cumsum(0) - data.response_lengths
    at = (data.mask > 0) & data.known
    found = mismatch.sums(
        data.log_probs[at],
        data.rollout_log_probs[at],
        data.entropy[at],
        (torch.arange(len(ids), device=ids.device) - starts[ids])[at],
        (version - versions)[at],
        ids[at],
        len(data.response_lengths),
        watch.limit,
    )
    if groups.dp_size > 1:
        for values in found:
            op = dist.ReduceOp.MAX if values is found.largest else dist.ReduceOp.SUM
            dist.all_reduce(values, op=op, group=groups.dp)
    found = mismatch.Sums(*(values.cpu() for values in found))
    if not found.positions[:, 0].sum():
        return {}
    metrics: dict[str, Any] = mismatch.metrics(found)
    sentence = watch.judge(found, version, temperature)
    metrics["mismatch/alarm"] = float(sentence is not None)
    return metrics | ({ALARM: sentence} if sentence else {})
