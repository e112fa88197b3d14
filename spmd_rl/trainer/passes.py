"""Runs the model over micro-batches through Megatron's pipeline schedules.

Forward only, giving what the head makes of every response token; or forward and backward, leaving
gradients and giving the metrics of a step. The same calls on every rank; results exist on the last
pipeline stage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spmd_rl.trainer.data import Piece, RolloutData
from spmd_rl.trainer.heads import PolicyHead, ValueHead
from spmd_rl.trainer.parallel import Groups


class Passes:
    """The model chunks of this rank with the schedule that drives them."""

    def __init__(self, chunks: list[Any], groups: Groups, head: PolicyHead | ValueHead):
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.chunks, self.groups, self.head = chunks, groups, head
        self.run = get_forward_backward_func()

    @torch.no_grad()
    def forward(self, data: RolloutData) -> list[Tensor]:
        """The head's columns for the shard's response tokens, [R] each: log-probs and entropies,
        or values (zeros on stages before the last).
        """

        def keep(output: Tensor, piece: Piece, non_loss_data: bool = True):
            return piece.rows, *self.head(output, piece)[: self.head.columns]

        pieces = data.forward_only()
        results = self._schedule(pieces, keep, forward_only=True, collect_non_loss_data=True)
        columns = [torch.zeros_like(data.mask) for _ in range(self.head.columns)]
        for rows, *values in results:
            for column, found in zip(columns, values, strict=True):
                column[rows] = found
        return columns

    def step(self, pieces: list[Piece], loss: Callable[[Any, Piece], Any]) -> tuple[dict, dict]:
        """Gradients of the sum of all micro-batches' losses; (sums, maxima) of their metrics.
        `loss` makes a loss.Outcome of what the head gives.
        """

        def scaled(output: Tensor, piece: Piece):
            outcome = loss(self.head(output, piece), piece)
            one = torch.ones((), dtype=torch.int, device=output.device)
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

    def _schedule(self, pieces: list[Piece], on_output: Callable, **how: Any) -> list[Any]:
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
            return output, lambda output, **kwargs: on_output(output, piece, **kwargs)

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
