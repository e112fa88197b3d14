"""Off-policy correction of a micro-batch's policy loss, as the configuration or the user's function
has it.

In: token losses [r] and the two log-probs of the same tokens. Out: corrected losses, what is kept,
metrics of each token. Knows no models and no schedules.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from spmd_rl.algo import offpolicy
from spmd_rl.algo.offpolicy import Bounds
from spmd_rl.algo.segments import sample_ids
from spmd_rl.config.schema import AlgoConfig, Config
from spmd_rl.trainer import custom
from spmd_rl.trainer.data import Piece, RolloutData
from spmd_rl.trainer.parallel import Groups


def importance_bounds(algo: AlgoConfig) -> Bounds:
    """slime's two spellings: `tis_clip_low` and `tis_clip`, or `tis_lower_bound` (else 1 / upper)
    and `tis_upper_bound`.
    """
    if algo.tis_upper_bound is None:
        low = algo.tis_clip_low if algo.tis_lower_bound is None else algo.tis_lower_bound
        return Bounds(low, algo.tis_clip, algo.tis_level)
    low = algo.tis_lower_bound
    low = 1 / algo.tis_upper_bound if low is None else low
    return Bounds(low, algo.tis_upper_bound, algo.tis_level)


def rejection_bounds(algo: AlgoConfig) -> Bounds:
    """`rs_lower_bound` and `rs_upper_bound`; else the bounds of MIS: upper, and 1 / upper."""
    high = algo.rs_upper_bound or algo.tis_upper_bound or algo.tis_clip
    low = algo.tis_lower_bound if algo.rs_lower_bound is None else algo.rs_lower_bound
    return Bounds(1 / high if low is None else low, high, algo.rs_level)


def correct(
    hooks: custom.Hooks,
    cfg: Config,
    loss: Tensor,
    trained: Tensor,
    sampled: Tensor,
    piece: Piece,
    data: RolloutData,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(token losses, mask of what stays in the sums, metrics), all [r]."""
    algo, mask = cfg.algo, data.mask[piece.rows]
    if hooks.tis is not None and (algo.use_tis or algo.get_mismatch_metrics):
        return custom.correction(hooks, cfg, loss, trained, sampled, piece, data)
    about = (trained, sampled, mask, piece.sample_ids, len(piece.micro_batch.samples))
    kept, metrics = mask, {}
    if algo.use_tis or algo.get_mismatch_metrics:
        found = offpolicy.importance(*about, importance_bounds(algo), algo.tis_mode)
        metrics |= found.metrics
        if algo.use_tis:
            loss, kept = loss * (found.weight / data.mean_weight), kept * found.keep
    if algo.use_rs:
        found = offpolicy.rejection(
            *about,
            rejection_bounds(algo),
            veto=algo.rs_veto_threshold,
            trust_region=algo.rs_trust_region,
            threshold=algo.rs_tr_threshold,
        )
        metrics |= found.metrics
        kept = kept * found.keep
    if algo.get_mismatch_metrics:
        metrics |= offpolicy.sequence_metrics(*about)
    return loss, kept, metrics


def mean_weight(cfg: Config, data: RolloutData, groups: Groups) -> float:
    """`tis_batch_normalize`: the mean importance weight over the whole rollout. Collective over
    data-parallel ranks.
    """
    assert data.rollout_log_probs is not None
    ids, count = sample_ids(data.response_lengths), len(data.response_lengths)
    bounds = importance_bounds(cfg.algo)
    about = (data.log_probs, data.rollout_log_probs, data.mask, ids, count)
    weight = offpolicy.importance(*about, bounds, cfg.algo.tis_mode).weight
    sums = offpolicy.weight_sums(weight, data.mask, ids, count, bounds.level)
    if groups.dp_size > 1:
        dist.all_reduce(sums, group=groups.dp)
    total, number = sums.tolist()
    mean = total / max(number, 1)
    return mean if mean > 1e-8 else 1.0


def needs_log_probs(cfg: Config, num_steps: int) -> bool:
    """Whether a pass before the first update is needed; else its own log-probs serve the step."""
    algo = cfg.algo
    if algo.keep_old_actor or algo.custom_advantage_function_path:
        return True
    if cfg.rollout.rollout_data_postprocess_path:
        return True
    if algo.use_opd and not algo.use_rollout_logprobs:
        return True
    if algo.use_routing_replay and not algo.use_rollout_routing_replay:
        return True
    if algo.use_tis and algo.tis_batch_normalize:
        return True
    if algo.use_rollout_logprobs:
        return num_steps > 1 and (algo.use_rs or algo.get_mismatch_metrics)
    return num_steps > 1 or bool(algo.kl_coef)
