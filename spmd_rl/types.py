"""What passes between the stages of a run: prompt -> sample -> group -> batch -> shard.

Samples are what user code (rewards, custom generate functions) sees and changes; from `Batch` on
everything is columnar, ragged and frozen. Imports numpy only, so planning works on a login node.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, NamedTuple

import numpy as np


class Status(str, Enum):
    """How a sample's generation ended."""

    PENDING = "pending"
    COMPLETED = "completed"  # the model stopped by itself
    TRUNCATED = "truncated"  # a length limit stopped it
    ABORTED = "aborted"  # the engine was told to stop
    FAILED = "failed"


@dataclass(slots=True)
class Sample:
    """One response to one prompt. Lists are plain Python: user hooks build and edit them."""

    group_index: int = 0  # which prompt of the run, counted from 0
    index: int = 0  # which sample of the run, counted from 0
    prompt: str | list[dict[str, Any]] = ""  # text, or chat messages
    tokens: list[int] = field(default_factory=list)  # prompt then response
    response: str = ""
    response_length: int = 0  # the last `response_length` of `tokens` are the response
    label: Any = None
    reward: float | dict[str, Any] | None = None
    loss_mask: list[int] | None = None  # [response_length] of 0/1; None: all ones
    status: Status = Status.PENDING
    metadata: dict[str, Any] = field(default_factory=dict)
    rollout_log_probs: list[float] = field(
        default_factory=list
    )  # [response_length], the engine's own
    weight_versions: list[int] = field(
        default_factory=list
    )  # [response_length], the version that sampled it
    # [response_length], a teacher's behind HTTP (algo.opd_type sglang)
    teacher_log_probs: list[float] = field(default_factory=list)
    # [k, layers with experts, experts of a token]: those the engine chose for the first k tokens
    rollout_routed_experts: np.ndarray | None = field(default=None, compare=False)
    remove_sample: bool = False  # keep it in reward normalisation, but train on none of its tokens
    rollout_id: int | None = None  # siblings made from one prompt share it; None: `index`

    @property
    def prompt_length(self) -> int:
        return len(self.tokens) - self.response_length

    def to_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"status": self.status.value}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Sample:
        experts = values.get("rollout_routed_experts")
        if isinstance(experts, list):  # from JSON
            values = values | {"rollout_routed_experts": _smallest(experts)}
        return cls(**(values | {"status": Status(values["status"])}))


def _smallest(experts: list) -> np.ndarray | None:
    array = np.array(experts, dtype=np.int16)
    if not len(array):
        return None
    return array.astype(np.uint8) if array.max() < 256 else array


Group = list[Sample]  # the `n_samples_per_prompt` samples of one prompt


@dataclass(frozen=True, slots=True)
class Batch:
    """All samples of a rollout, columnar and ragged: N samples, R response tokens, T tokens.

    Flat arrays hold sample 0 first; sample i owns `total_lengths[i]` tokens and
    `response_lengths[i]` response tokens. Of its first `routed_lengths[i]` tokens the engine's
    experts are known.
    """

    tokens: np.ndarray  # [T] int32
    total_lengths: np.ndarray  # [N] int32
    response_lengths: np.ndarray  # [N] int32
    loss_mask: np.ndarray  # [R] uint8
    rewards: np.ndarray  # [N] float32, normalised: what the estimator uses
    raw_rewards: np.ndarray  # [N] float32, as the reward function gave them
    rollout_ids: np.ndarray  # [N] int64, equal for siblings
    rollout_log_probs: np.ndarray | None = None  # [R] float32
    weight_versions: np.ndarray | None = None  # [R] int32
    teacher_log_probs: np.ndarray | None = None  # [R] float32
    truncated: np.ndarray | None = None  # [N] uint8
    # [sum of routed_lengths, layers with experts x experts of a token] uint8, or int16 beyond 256
    routed_experts: np.ndarray | None = None
    routed_lengths: np.ndarray | None = None  # [N] int32

    def __len__(self) -> int:
        return len(self.total_lengths)

    def take(self, indices: np.ndarray | list[int]) -> Batch:
        """The same columns for the given samples, in the given order."""
        columns = {name: np.concatenate(parts) for name, parts in self.pieces(indices).items()}
        return Batch(**{f.name: columns.get(f.name) for f in fields(Batch)})  # type: ignore[arg-type]

    def pieces(self, indices: np.ndarray | list[int]) -> dict[str, list[np.ndarray]]:
        """The arrays that `take` joins, by column; those of tokens are views, nothing is copied."""
        order = np.asarray(indices, dtype=np.int64)
        found = {}
        for name in (f.name for f in fields(Batch)):
            values = getattr(self, name)
            if values is None:
                continue
            if name == "tokens":
                found[name] = _rows(values, self.total_lengths, order)
            elif name == "routed_experts":
                assert self.routed_lengths is not None
                found[name] = _rows(values, self.routed_lengths, order)
            elif name in PER_RESPONSE_TOKEN:
                found[name] = _rows(values, self.response_lengths, order)
            else:
                found[name] = [values[order]]
        return found


PER_RESPONSE_TOKEN = (
    "loss_mask",
    "rollout_log_probs",
    "weight_versions",
    "teacher_log_probs",
)  # the [R] columns of a Batch


def _rows(values: np.ndarray, lengths: np.ndarray, order: np.ndarray) -> list[np.ndarray]:
    """The rows `order` of a ragged array whose rows have `lengths`; at least one array."""
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = (ends - lengths)[order].tolist()  # slices copy faster than an array of positions
    rows = [values[a:b] for a, b in zip(starts, ends[order].tolist(), strict=True)]
    return rows or [values[:0]]


class StepPlan(NamedTuple):
    """One optimizer step: which samples go where, and what its losses are divided by."""

    micro_batches: list[
        list[list[int]]
    ]  # [dp][micro-batch] -> indices into the batch; same count on each dp rank
    num_rollouts: int  # G: distinct rollout_ids in the step (per-sample aggregation divides by it)
    num_tokens: int  # sum over samples of max(mask total, 1) (per-token aggregation divides by it)
    forward: list[list[list[int]]] | None = None  # as micro_batches, for passes without gradient


@dataclass(frozen=True, slots=True)
class Shard:
    """One data-parallel rank's part of a batch, with its micro-batches for every step."""

    batch: Batch  # only this rank's samples
    steps: list[list[list[int]]]  # [step][micro-batch] -> indices into `batch`
    num_rollouts: list[int]  # [step], over all data-parallel ranks
    num_tokens: list[int]  # [step], over all data-parallel ranks
    mask_totals: (
        np.ndarray
    )  # [n] int64: mask total over all siblings of the sample's rollout_id, at least 1
    forward: list[list[int]]  # micro-batches of all samples for passes without gradient


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """One SGLang server: which ranks' GPUs it uses, and which rank starts it."""

    index: int
    ranks: tuple[int, ...]  # job ranks whose GPUs it occupies, in tensor-parallel order
    host_rank: int  # the first rank of that node: the parent of the process
    base_gpu_id: int  # index of its first GPU on the node
    teacher: bool = False  # it holds algo.opd_teacher_load's model, and generates nothing

    @property
    def name(self) -> str:
        return "teacher" if self.teacher else f"engine {self.index}"


@dataclass(frozen=True, slots=True)
class Placement:
    """Who is where. Job ranks 0..world-1 come from the launcher, node by node."""

    world: int
    ranks_per_node: int
    train_ranks: tuple[int, ...]
    rollout_ranks: tuple[int, ...]
    engines: tuple[EngineSpec, ...]  # those that generate
    colocate: bool
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    dp: int = 1  # data-parallel width of the training ranks
    teacher: EngineSpec | None = None
