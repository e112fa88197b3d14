"""Runs the model over micro-batches through Megatron's pipeline schedules.

Forward only, giving log-probs of every response token; or forward and backward, leaving gradients
and giving the metrics of a step. The same calls on every rank; results exist on the last pipeline
stage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spmd_rl.trainer.data import Piece, RolloutData
from spmd_rl.trainer.loss import Head, Outcome
from spmd_rl.trainer.parallel import Groups

LossFunction = Callable[[Tensor, Piece], Outcome]


class Passes:
    """The model chunks of this rank with the schedule that drives them."""

    def __init__(self, chunks: list[Any], groups: Groups, head: Head):
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.chunks, self.groups, self.head = chunks, groups, head
        self.run = get_forward_backward_func()

    def log_probs(self, data: RolloutData) -> Tensor:
        """[R] log-probs of the shard's response tokens (zeros on stages before the last)."""
        return self.log_probs_and_entropy(data)[0]

    @torch.no_grad()
    def log_probs_and_entropy(self, data: RolloutData) -> tuple[Tensor, Tensor]:
        """[R] each, of the shard's response tokens (zeros on stages before the last)."""

        def keep(logits: Tensor, piece: Piece, non_loss_data: bool = True):
            now = self.head(logits, piece)
            return piece.rows, now.log_probs, now.entropy

        pieces = data.forward_only()
        results = self._schedule(pieces, keep, forward_only=True, collect_non_loss_data=True)
        log_probs, entropy = torch.zeros_like(data.mask), torch.zeros_like(data.mask)
        for rows, *values in results:
            log_probs[rows], entropy[rows] = values
        return log_probs, entropy

    def step(self, pieces: list[Piece], loss: LossFunction) -> tuple[dict, dict]:
        """Gradients of the sum of all micro-batches' losses; (sums, maxima) of their metrics."""

        def scaled(logits: Tensor, piece: Piece):
            outcome = loss(logits, piece)
            one = torch.ones((), dtype=torch.int, device=logits.device)
            return outcome.loss, one, outcome

        outcomes = self._schedule(pieces, scaled, forward_only=False)
        sums: dict[str, Tensor] = {}
        maxima: dict[str, Tensor] = {}
        for outcome in outcomes:
            for name, value in outcome.sums.items():
                sums[name] = sums[name] + value if name in sums else value
            for name, value in outcome.maxima.items():
                maxima[name] = torch.maximum(maxima[name], value) if name in maxima else value
        return sums, maxima

    def _schedule(self, pieces: list[Piece], on_logits: Callable, **how: Any) -> list[Any]:
        def forward(iterator, model):
            piece = next(iterator)
            micro_batch = piece.micro_batch
            output_layer = _output_layer(model)
            if output_layer is not None:
                output_layer.rows = micro_batch.logit_rows
            output = model(
                micro_batch.tokens,
                micro_batch.position_ids,
                None,
                packed_seq_params=piece.packing,
            )
            return output, lambda logits, **kwargs: on_logits(logits, piece, **kwargs)

        iterators = [iter(pieces) for _ in self.chunks]
        single = len(self.chunks) == 1
        return self.run(
            forward_step_func=forward,
            data_iterator=iterators[0] if single else iterators,
            model=self.chunks[0] if single else self.chunks,
            num_microbatches=len(pieces),
            seq_length=1,  # shapes travel with the tensors: variable_seq_lengths
            micro_batch_size=1,
            **how,
        )


def _output_layer(model: Any) -> Any:
    while hasattr(model, "module"):
        model = model.module
    return getattr(model, "output_layer", None)


def reduce_metrics(values: Tensor, groups: Groups, op: Any = dist.ReduceOp.SUM) -> list[float]:
    """Values [k] float64 added (or maximised) over data-parallel ranks, as numbers."""
    if groups.dp_size > 1 and len(values):
        dist.all_reduce(values, op=op, group=groups.dp)
    return values.tolist()
