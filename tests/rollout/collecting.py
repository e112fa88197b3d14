"""Configurations and data for tests of the collector."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spmd_rl.config.schema import Config
from spmd_rl.rollout.collector import Collector, Rollout
from spmd_rl.rollout.service import Service
from tests.models import tiny_model


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sums(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {i}+{i % 7}?", "label": str(i + i % 7)} for i in range(count)]


def config(folder: Path, rows: list[dict[str, Any]] | None = None, **sections: Any) -> Config:
    """A run over `rows` (32 sums) with a tiny model."""
    data = write_rows(folder / "rows.jsonl", sums(32) if rows is None else rows)
    values: dict[str, dict[str, Any]] = {
        "model": {"hf_checkpoint": str(tiny_model("qwen3", positions=1024))},
        "data": {
            "prompt_data": str(data),
            "input_key": "prompt",
            "label_key": "label",
            "apply_chat_template": True,
        },
        "rollout": {
            "rollout_batch_size": 4,
            "n_samples_per_prompt": 2,
            "rollout_max_response_len": 8,
        },
        "reward": {"rm_type": "math"},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return Config.model_validate(values)


@contextmanager
def collecting(cfg: Config, folder: Path, addresses: Any = None) -> Iterator[Collector]:
    collector = Collector(cfg, folder, addresses)
    try:
        yield collector
    finally:
        collector.close()


def in_this_process(
    cfg: Config, addresses: Any, evaluation: bool = False, state: dict[str, Any] | None = None
) -> Any:
    """One rollout (or evaluation) without the second that a process takes to start; `state`: where
    the data stands before."""

    async def serve() -> Any:
        service = Service(cfg)
        await service.connect(addresses)
        try:
            if state:
                await service.load_state(state)
            if evaluation:
                return await service.evaluate(0)
            return Rollout(*await service.collect(0, 1))
        finally:
            await service.close()

    return asyncio.run(serve())
