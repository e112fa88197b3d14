"""Prompts of a data set, tokenised once, and an endless seeded walk over them.

Comes in: a file and the `data:` keys; goes out: groups of samples waiting to be generated, in an
order that depends on the seed alone and can be taken up again. It must not know engines or rewards.
"""

from __future__ import annotations

import copy
import random
from array import array
from dataclasses import dataclass, field
from typing import Any

import orjson

from spmd_rl.config.schema import Config
from spmd_rl.data.rows import DataError, Rows
from spmd_rl.data.template import Messages, Template
from spmd_rl.types import Group, Sample

ENCODE_AT_ONCE = 1024


@dataclass(slots=True, frozen=True)
class Prompt:
    """One row, ready to be sampled from."""

    text: str | Messages
    tokens: list[int]  # empty when the prompt stays chat messages
    label: Any = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True, frozen=True)
class Columns:
    """Which column of a row means what."""

    input_key: str = "input"
    label_key: str | None = None
    metadata_key: str = "metadata"
    tool_key: str = "tools"

    @classmethod
    def of(cls, cfg: Config) -> Columns:
        data = cfg.data
        return cls(data.input_key, data.label_key, data.metadata_key, data.tool_key)

    def fault(self, row: dict[str, Any]) -> str | None:
        """What is wrong with a row, as the end of a sentence."""
        for key, name in ((self.input_key, "input_key"), (self.label_key, "label_key")):
            if key is not None and key not in row:
                return f"no '{key}' (data.{name}), its keys are {', '.join(sorted(row)) or 'none'}"
        value = row[self.input_key]
        messages = isinstance(value, list) and all(
            isinstance(item, dict) and "role" in item for item in value
        )
        if not isinstance(value, str) and not (messages and value):
            return f"'{self.input_key}' (data.input_key) is neither text nor a list of messages"
        try:
            self.metadata(row)
        except ValueError as error:
            return f"'{self.metadata_key}' (data.metadata_key) {error}"
        return None

    def metadata(self, row: dict[str, Any]) -> dict[str, Any]:
        """Extra columns for rewards and tools: an object, or JSON text of one."""
        value = row.get(self.metadata_key)
        if isinstance(value, str):
            try:
                value = orjson.loads(value)
            except orjson.JSONDecodeError as error:
                raise ValueError("is text that is not JSON") from error
        if value is not None and not isinstance(value, dict):
            raise ValueError("is no object")
        metadata = dict(value or {})
        tools = self.tools(row)
        if tools is not None:
            metadata["tools"] = tools
        return metadata

    def tools(self, row: dict[str, Any]) -> list | None:
        value = row.get(self.tool_key)
        if isinstance(value, str):
            try:
                value = orjson.loads(value)
            except orjson.JSONDecodeError as error:
                raise ValueError(f"has tools in '{self.tool_key}' that are not JSON") from error
        return value


class PromptSet:
    """The prompts of one file by position. Rows are parsed and tokenised when first asked for,
    unless a length limit makes it necessary to see them all."""

    def __init__(
        self,
        path: str,
        columns: Columns,
        template: Template,
        max_length: int | None = None,
        on_bad_line: str = "stop",
        raw: bool = False,  # SFT encodes whole conversations itself
    ):
        self.columns, self.template, self.raw = columns, template, raw
        self._rows = Rows(path, columns.fault, on_bad_line)
        self.notes = list(self._rows.notes)
        self._kept: array | range = range(len(self._rows))
        self._tokens: list[array | None] = [None] * len(self._rows)
        if max_length is not None and not raw:
            self._drop_long(path, max_length)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Prompt:
        place = self._kept[index]
        row = self._rows[place]
        metadata = self.columns.metadata(row)
        label = row[self.columns.label_key] if self.columns.label_key else None
        if self.raw:
            return Prompt(row[self.columns.input_key], [], label, metadata)
        text = self.template.render(row[self.columns.input_key], metadata.get("tools"))
        tokens = self._tokens[place]
        if tokens is None and isinstance(text, str):
            tokens = self._tokens[place] = array("i", self.template.encode(text))
        return Prompt(text, list(tokens or ()), label, metadata)

    def _drop_long(self, path: str, limit: int) -> None:
        kept = array("q")
        for start in range(0, len(self._rows), ENCODE_AT_ONCE):
            places = range(start, min(start + ENCODE_AT_ONCE, len(self._rows)))
            rows = [self._rows[place] for place in places]
            texts = [
                self.template.render(row[self.columns.input_key], self.columns.tools(row))
                for row in rows
            ]
            encoded = self.template.encode_all([t if isinstance(t, str) else "" for t in texts])
            for place, text, tokens in zip(places, texts, encoded, strict=True):
                if len(tokens) <= limit:
                    self._tokens[place] = array("i", tokens) if isinstance(text, str) else None
                    kept.append(place)
        dropped = len(self._rows) - len(kept)
        if not kept:
            raise DataError(f"{path}: every prompt is longer than {limit} tokens")
        if dropped:
            total = len(self._rows)
            self.notes.append(
                f"{path}: {dropped} of {total} prompts are longer than {limit} tokens: dropped"
            )
        self._kept = kept


class PromptSource:
    """Groups of samples, epoch after epoch. The n samples of a prompt are equal but for `index`."""

    def __init__(self, prompts: PromptSet, n_samples: int, shuffle: bool, seed: int):
        self.prompts, self.n_samples, self.shuffle, self.seed = prompts, n_samples, shuffle, seed
        self.load_state({})

    def __len__(self) -> int:
        return len(self.prompts)

    def draw(self, count: int) -> list[Group]:
        """The next `count` prompts, as groups."""
        return [self._group(self.prompts[self._next()]) for _ in range(count)]

    def state(self) -> dict[str, Any]:
        """Where the walk is, with slime's names."""
        return {
            "sample_offset": self.sample_offset,
            "epoch_id": self.epoch_id,
            "sample_group_index": self.sample_group_index,
            "sample_index": self.sample_index,
            "metadata": {},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.sample_offset: int = state.get("sample_offset", 0)
        self.epoch_id: int = state.get("epoch_id", 0)
        self.sample_group_index: int = state.get("sample_group_index", 0)
        self.sample_index: int = state.get("sample_index", 0)
        self._order = self._permutation()

    def _permutation(self) -> array | range:
        """The order of this epoch: always a permutation of the file's order, so any epoch can be
        entered without going through those before it."""
        order = range(len(self.prompts))
        if not self.shuffle:
            return order
        shuffled = list(order)
        random.Random(self.seed + self.epoch_id).shuffle(shuffled)
        return array("q", shuffled)

    def _next(self) -> int:
        if self.sample_offset >= len(self.prompts):
            self.epoch_id += 1
            self.sample_offset = 0
            self._order = self._permutation()
        self.sample_offset += 1
        return self._order[self.sample_offset - 1]

    def _group(self, prompt: Prompt) -> Group:
        group = [
            Sample(
                group_index=self.sample_group_index,
                index=self.sample_index + position,
                prompt=copy.deepcopy(prompt.text),
                tokens=list(prompt.tokens),
                label=copy.deepcopy(prompt.label),
                metadata=copy.deepcopy(prompt.metadata),
            )
            for position in range(self.n_samples)
        ]
        self.sample_group_index += 1
        self.sample_index += self.n_samples
        return group


def prompt_limit(prompt: int | None, context: int | None) -> int | None:
    """The longest prompt that both limits allow; a response needs at least one token."""
    limits = [limit for limit in (prompt, context and context - 1) if limit is not None]
    return min(limits, default=None)


def training_source(cfg: Config, template: Template) -> PromptSource:
    """The prompts a run trains on."""
    if not cfg.data.prompt_data:
        raise DataError("data.prompt_data is missing: give a JSONL or Parquet file")
    prompts = PromptSet(
        cfg.data.prompt_data,
        Columns.of(cfg),
        template,
        prompt_limit(cfg.data.rollout_max_prompt_len, cfg.rollout.rollout_max_context_len),
        cfg.data.on_bad_line,
        raw=cfg.algo.loss_type == "sft_loss",
    )
    return PromptSource(
        prompts,
        cfg.rollout.n_samples_per_prompt,
        cfg.data.rollout_shuffle,
        cfg.data.rollout_seed,
    )
