"""A rollout's shard on this rank's device: flat columns of response tokens, and micro-batches cut
from them.

In: a `Shard`. Out: tensors that passes and losses index by response row. Log-probs and advantages
are added as they are computed. Knows no models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spmd_rl.algo.segments import sample_ids
from spmd_rl.batch.pack import MicroBatch, Packer, shard_weights
from spmd_rl.config.schema import Config
from spmd_rl.trainer.packing import Packing, packing
from spmd_rl.trainer.parallel import Groups
from spmd_rl.types import Shard


@dataclass
class Piece:
    """A micro-batch with what the layers and the loss need. r: response tokens of its whole
    samples.
    """

    micro_batch: MicroBatch
    packing: Packing
    rows: Tensor  # [r] places in the shard's flat response arrays, over all cp ranks
    sample_ids: Tensor  # [r] which of the micro-batch's samples
    slots: Tensor  # places within r of this cp rank's logits rows
    step: int = 0


class RolloutData:
    """Columns [R] (response tokens) and [n] (samples) of a shard, and its micro-batches."""

    def __init__(self, shard: Shard, cfg: Config, groups: Groups, device: torch.device):
        batch = shard.batch
        self.shard, self.groups, self.device = shard, groups, device
        self.packer = Packer(
            shard,
            device=device,
            tp=groups.tp_size,  # sequence parallelism splits the tokens evenly
            cp=groups.cp_size,
            cp_rank=groups.cp_rank,
            pad_multiple=128 if device.type == "cuda" else 1,
        )
        self.response_lengths = torch.from_numpy(batch.response_lengths).long().to(device)
        self.mask = torch.from_numpy(batch.loss_mask).float().to(device)
        self.rewards = torch.from_numpy(batch.rewards).float().to(device)
        weights = shard_weights(shard, cfg.algo.calculate_per_token_loss)
        self.weights = weights.double().to(device)  # sums of many small terms: see loss.py
        algo = cfg.algo
        self.replays = algo.use_routing_replay or algo.use_rollout_routing_replay
        self.rollout_log_probs = None
        if batch.rollout_log_probs is not None:
            self.rollout_log_probs = torch.from_numpy(batch.rollout_log_probs).float().to(device)
        self.ref_log_probs: Tensor | None = None
        self.teacher_log_probs: Tensor | None = None
        if batch.teacher_log_probs is not None:
            self.teacher_log_probs = torch.from_numpy(batch.teacher_log_probs).to(device)
        self.opd_reverse_kl: Tensor | None = None  # of the policy from the teacher
        self.old_log_probs: Tensor | None = None  # None: those of the step itself
        self.recomputed = False  # the next two are of the weights that sampled, all of them
        self.log_probs = torch.zeros_like(self.mask)
        self.entropy = torch.zeros_like(self.mask)
        self.known = torch.zeros_like(self.mask, dtype=torch.bool)  # where they are so already
        self.advantages: Tensor = torch.zeros_like(self.mask)
        self.returns: Tensor | None = None  # None: equal to the advantages
        self.values: Tensor | None = None  # the critic's, before any update
        self.mean_weight = 1.0  # tis_batch_normalize divides by it
        self._pieces: dict[tuple[int, ...], Piece] = {}

    @property
    def num_steps(self) -> int:
        return len(self.shard.steps)

    @property
    def num_tokens(self) -> int:
        return int(self.shard.batch.total_lengths.sum())

    def step(self, step: int) -> list[Piece]:
        """The micro-batches of an optimizer step."""
        pieces = [self._piece(samples) for samples in self.shard.steps[step]]
        for piece in pieces:
            piece.step = step
        return pieces

    def steps(self) -> list[list[Piece]]:
        return [self.step(step) for step in range(self.num_steps)]

    def forward_only(self) -> list[Piece]:
        """Micro-batches covering every sample, for passes without gradient."""
        return [self._piece(samples) for samples in self.shard.forward]

    def keep_pass(self, log_probs: Tensor, entropy: Tensor) -> None:
        """What a pass without gradient found, before any update."""
        self.log_probs, self.entropy, self.recomputed = log_probs, entropy, True
        self.known[:] = True

    def keep_step(self, piece: Piece, log_probs: Tensor, entropy: Tensor) -> None:
        """What a step computed anyway; of use where no pass came before it."""
        if not self.recomputed:
            self.log_probs[piece.rows] = log_probs.detach()
            self.entropy[piece.rows] = entropy.detach()
            self.known[piece.rows] = piece.step == 0

    def lengths_of(self, piece: Piece) -> tuple[list[int], list[int]]:
        """Total and response lengths of a piece's samples."""
        batch, samples = self.shard.batch, piece.micro_batch.samples
        return batch.total_lengths[samples].tolist(), batch.response_lengths[samples].tolist()

    def denominator(self, piece: Piece, per_token: bool) -> int:
        """What sums over the samples of the piece's step are divided by."""
        return (self.shard.num_tokens if per_token else self.shard.num_rollouts)[piece.step]

    def _piece(self, samples: list[int]) -> Piece:
        key = tuple(samples)
        if key not in self._pieces or not key:
            self._pieces[key] = self._make(samples)
        return self._pieces[key]

    def _make(self, samples: list[int]) -> Piece:
        made = self.packer.pack(samples)
        layers = packing(
            made.lengths,
            made.position_ids[0],
            made.cu_seqlens,
            self.groups.cp_size,
            self.groups.cp_rank,
        )
        if self.replays:
            layers.places = self.packer.places(samples)
        if self.groups.cp_size == 1:  # logits rows are the responses in order
            slots = torch.arange(len(made.response_rows), device=self.device)
            return Piece(made, layers, made.response_rows, made.sample_ids, slots)
        lengths = self.response_lengths[torch.tensor(samples, dtype=torch.int64)]
        ends = self.response_lengths.cumsum(0).tolist()
        whole = [
            torch.arange(end - size, end)
            for end, size in ((ends[i], int(self.response_lengths[i])) for i in samples)
        ]
        rows = torch.cat([torch.empty(0, dtype=torch.int64), *whole]).to(self.device)
        ids = sample_ids(lengths)
        place = torch.zeros_like(self.mask, dtype=torch.int64)
        place[rows] = torch.arange(len(rows), device=self.device)
        return Piece(made, layers, rows, ids.to(self.device), place[made.response_rows])
