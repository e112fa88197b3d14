"""A configuration that is right, with the files it names, for tests that spoil one thing."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import yaml

CONFIG = {
    "num_hidden_layers": 2,
    "model_type": "qwen3",
    "intermediate_size": 128,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


def make_model(folder: Path, leave_out: str = "") -> Path:
    """What the checks look at of a Hugging Face model; nothing loads it."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"config.json": json.dumps(CONFIG), "tokenizer.json": "{}", "model.safetensors": ""}
    for name, text in files.items():
        if name != leave_out:
            (folder / name).write_text(text)
    return folder


def make_rows(path: Path, columns: tuple[str, ...] = ("question", "answer")) -> Path:
    rows = [{column: f"{column} {number}" for column in columns} for number in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def good(tmp_path: Path) -> dict[str, dict[str, Any]]:
    return {
        "placement": {"device": "cpu", "colocate": True},
        "model": {"hf_checkpoint": str(make_model(tmp_path / "model"))},
        "data": {
            "prompt_data": str(make_rows(tmp_path / "rows.jsonl")),
            "input_key": "question",
            "label_key": "answer",
        },
        "rollout": {"num_rollout": 2, "rollout_batch_size": 8, "n_samples_per_prompt": 4},
        "reward": {"rm_type": "math"},
    }


def write(tmp_path: Path, values: dict[str, Any], **changes: dict[str, Any] | None) -> Path:
    """The values as a YAML file, after changes of whole sections' keys; None removes a key."""
    values = copy.deepcopy(values)
    for section, keys in changes.items():
        for key, value in (keys or {}).items():
            values.setdefault(section, {})[key] = value
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path
