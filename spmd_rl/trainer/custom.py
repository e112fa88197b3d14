"""The user's functions of a loss, with slime's signatures: lists of one tensor a sample.

In: flat tensors of a micro-batch (or of the rank's whole rollout); they are split by sample for the
function and joined again. Responses are whole on every context-parallel rank, so a function need
not know how samples are split. A fault names the key and what the function gave.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spmd_rl import hooks as functions
from spmd_rl.algo.aggregate import weighted_sum
from spmd_rl.config.schema import Config
from spmd_rl.trainer.data import Piece, RolloutData

if TYPE_CHECKING:
    from spmd_rl.trainer.heads import LogProbs


class Hooks:
    """The functions that the configuration names; None where it names none."""

    def __init__(self, cfg: Config):
        algo = cfg.algo
        self.advantage = functions.optional(algo.custom_advantage_function_path)
        self.loss = functions.optional(algo.custom_loss_function_path)
        self.reducer = functions.optional(algo.custom_pg_loss_reducer_function_path)
        self.tis = functions.optional(algo.custom_tis_function_path)
        self.postprocess = functions.optional(cfg.rollout.rollout_data_postprocess_path)


def correction(
    hooks: Hooks,
    cfg: Config,
    loss: Tensor,
    trained: Tensor,
    sampled: Tensor,
    piece: Piece,
    data: RolloutData,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """`custom_tis_function_path`: (token losses [r], mask [r], metrics [r])."""
    totals, lengths = data.lengths_of(piece)
    key = "algo.custom_tis_function_path"
    assert hooks.tis is not None
    given = hooks.tis(
        args=cfg,
        pg_loss=loss,
        train_log_probs=list(trained.split(lengths)),
        rollout_log_probs=list(sampled.split(lengths)),
        loss_masks=list(data.mask[piece.rows].split(lengths)),
        total_lengths=totals,
        response_lengths=lengths,
    )
    if not isinstance(given, tuple) or len(given) != 3:
        raise ValueError(f"{key} returned {_kind(given)}: return (pg_loss, loss_masks, metrics)")
    corrected, masks, metrics = given
    corrected = _checked(corrected, len(loss), f"{key}: pg_loss")
    if not cfg.algo.use_tis:  # get_mismatch_metrics alone only looks
        return loss, data.mask[piece.rows], _flat(metrics, len(loss), key)
    mask = _joined(masks, lengths, f"{key}: loss_masks")
    return corrected, mask.to(loss.dtype), _flat(metrics, len(loss), key)


def reduced(
    hooks: Hooks, cfg: Config, loss: Tensor, kept: Tensor, piece: Piece, data: RolloutData
) -> Tensor:
    """`custom_pg_loss_reducer_function_path`: this micro-batch's part of the step's policy loss."""
    per_token = cfg.algo.calculate_per_token_loss
    totals, lengths = data.lengths_of(piece)
    assert hooks.reducer is not None
    given: dict[str, Any] = {"args": cfg} if functions.accepts(hooks.reducer, "args") else {}
    reduce: Any = hooks.reducer(totals, lengths, list(kept.split(lengths)), per_token, **given)
    if not callable(reduce):
        raise ValueError(
            f"algo.custom_pg_loss_reducer_function_path returned {_kind(reduce)}: return a "
            "function of the token losses"
        )
    value: Any = reduce(loss)
    return value / data.denominator(piece, per_token)


def loss(
    hooks: Hooks, cfg: Config, now: LogProbs, piece: Piece, data: RolloutData
) -> tuple[Tensor, dict[str, Tensor]]:
    """`custom_loss_function_path`: the step's share of the loss, and of its metrics."""
    rows, per_token = piece.rows, cfg.algo.calculate_per_token_loss
    totals, lengths = data.lengths_of(piece)
    divisor = data.denominator(piece, per_token)
    weights = data.weights[rows] * divisor

    def sum_of_sample_mean(values: Tensor) -> Tensor:
        return weighted_sum(weights, values)

    current = now.log_probs
    old = current.detach() if data.old_log_probs is None else data.old_log_probs[rows]
    columns = {
        "current_log_probs": current,
        "entropy": now.entropy,
        "log_probs": old,
        "ref_log_probs": None if data.ref_log_probs is None else data.ref_log_probs[rows],
        "rollout_log_probs": (
            None if data.rollout_log_probs is None else data.rollout_log_probs[rows]
        ),
        "advantages": data.advantages[rows],
        "returns": _returns(data)[rows],
        "values": None if data.values is None else data.values[rows],
        "loss_masks": data.mask[rows],
    }
    batch: dict[str, Any] = {
        name: list(values.split(lengths)) for name, values in columns.items() if values is not None
    }
    batch |= _samples(data, piece.micro_batch.samples)
    assert hooks.loss is not None
    given = hooks.loss(cfg, batch, now.logits, sum_of_sample_mean)
    if not isinstance(given, tuple) or len(given) != 2 or not isinstance(given[0], Tensor):
        raise ValueError(
            f"algo.custom_loss_function_path returned {_kind(given)}: return (loss, metrics)"
        )
    value, metrics = given
    value = value / divisor + 0.0 * current.sum()  # backward runs on every rank
    sums = {name: torch.as_tensor(v).detach().double() / divisor for name, v in metrics.items()}
    return value, sums


def advantages(hooks: Hooks, cfg: Config, data: RolloutData, kl: Tensor) -> tuple[Tensor, Tensor]:
    """`custom_advantage_function_path`: (advantages [R], returns [R]) of this rank's samples."""
    lengths = data.response_lengths.tolist()
    rollout = by_sample(data) | {"kl": list(kl.split(lengths))}
    assert hooks.advantage is not None
    hooks.advantage(cfg, rollout)
    key = "algo.custom_advantage_function_path"
    if "advantages" not in rollout:
        raise ValueError(f"{key} set no rollout_data['advantages']: set one tensor a sample")
    found = _joined(rollout["advantages"], lengths, f"{key}: advantages")
    returns = _joined(rollout.get("returns", rollout["advantages"]), lengths, f"{key}: returns")
    return found.detach().float(), returns.detach().float()


def postprocess(hooks: Hooks, cfg: Config, rollout: int, data: RolloutData) -> None:
    """`rollout_data_postprocess_path`: what it leaves in its dict is trained on. Tokens that it
    masks leave every sum; denominators stay.
    """
    if hooks.postprocess is None:
        return
    key, lengths = "rollout.rollout_data_postprocess_path", data.response_lengths.tolist()
    given = by_sample(data, advantages=True)
    hooks.postprocess(cfg, rollout, given)
    for name, column in CHANGEABLE.items():
        if name in given and getattr(data, column) is not None:
            values = _joined(given[name], lengths, f"{key}: {name}")
            setattr(data, column, values.detach().to(getattr(data, column)))
    kept = _joined(given["loss_masks"], lengths, f"{key}: loss_masks").to(data.mask)
    data.mask, data.weights = data.mask * kept, data.weights * kept


CHANGEABLE = {  # columns of a post-process that are taken back, and their names here
    "advantages": "advantages",
    "returns": "returns",
    "log_probs": "old_log_probs",
    "ref_log_probs": "ref_log_probs",
    "rollout_log_probs": "rollout_log_probs",
}


def by_sample(data: RolloutData, advantages: bool = False) -> dict[str, Any]:
    """All samples of this rank under slime's names: lists of one tensor a response, and of
    numbers. What was not computed is left out; `advantages` are asked for once they are known.
    """
    lengths = data.response_lengths.tolist()
    computed = data.log_probs if data.known.any() else None
    columns = {
        "log_probs": computed if data.old_log_probs is None else data.old_log_probs,
        "ref_log_probs": data.ref_log_probs,
        "rollout_log_probs": data.rollout_log_probs,
        "teacher_log_probs": data.teacher_log_probs,
        "values": data.values,
        "loss_masks": data.mask,
        "advantages": data.advantages if advantages else None,
        "returns": _returns(data) if advantages else None,
    }
    found: dict[str, Any] = {  # copies: a function may write into them
        name: list(values.clone().split(lengths))
        for name, values in columns.items()
        if values is not None
    }
    return found | _samples(data, list(range(len(lengths))))


def _returns(data: RolloutData) -> Tensor:
    return data.advantages if data.returns is None else data.returns


def _samples(data: RolloutData, samples: list[int]) -> dict[str, Any]:
    """What belongs to samples: lists of numbers, and the tokens of each."""
    batch = data.shard.batch
    ends = batch.total_lengths.cumsum()
    starts = ends - batch.total_lengths
    tokens = [torch.from_numpy(batch.tokens[starts[i] : ends[i]]).long() for i in samples]
    return {
        "unconcat_tokens": [t.to(data.device) for t in tokens],
        "rewards": batch.rewards[samples].tolist(),
        "raw_reward": batch.raw_rewards[samples].tolist(),
        "rollout_ids": batch.rollout_ids[samples].tolist(),
        "total_lengths": batch.total_lengths[samples].tolist(),
        "response_lengths": batch.response_lengths[samples].tolist(),
    }


def _joined(parts: Sequence[Tensor], lengths: list[int], what: str) -> Tensor:
    sizes = [len(part) for part in parts]
    if sizes != lengths:
        raise ValueError(
            f"{what} have {sizes[:8]} entries, the responses {lengths[:8]}: match them"
        )
    return torch.cat([*parts, torch.empty(0, device=parts[0].device if parts else None)])


def _checked(values: Any, size: int, what: str) -> Tensor:
    if not isinstance(values, Tensor) or values.shape != (size,):
        raise ValueError(f"{what} must be a tensor of {size} token losses, not {_kind(values)}")
    return values


def _flat(metrics: dict[str, Tensor], size: int, key: str) -> dict[str, Tensor]:
    return {name: _checked(v, size, f"{key}: metric {name}") for name, v in metrics.items()}


def _kind(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
