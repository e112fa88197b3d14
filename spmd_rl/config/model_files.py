"""Checks of Hugging Face directories that a configuration names.

Comes in: a key and its path; goes out: faults, and what config.json says.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

from spmd_rl import architecture
from spmd_rl.architecture import Architecture
from spmd_rl.config.errors import Fault


def read(key: str, path: str) -> Generator[Fault, None, dict[str, Any] | None]:
    """Faults of a directory; returns what its config.json says, None when it says nothing."""
    folder = Path(path)
    if not folder.is_dir():
        yield Fault(
            (key,),
            f"{key} '{path}' is not a directory: give the path of a downloaded Hugging Face model",
        )
        return None
    try:
        return json.loads((folder / "config.json").read_text())
    except OSError:
        yield Fault(
            (key,), f"{key} {folder} has no config.json: give a Hugging Face model directory"
        )
    except ValueError as error:
        yield Fault((key,), f"{key} {folder}/config.json is not JSON ({error}): copy it again")
    return None


def trainable(key: str, path: str, use: str) -> Generator[Fault, None, Architecture | None]:
    """Faults of a second model in the trainer, built for a `use`; returns what it is."""
    config = yield from read(key, path)
    if config is None:
        return None
    try:
        architecture.check_trainable(config)
        return architecture.parse(config)
    except (KeyError, ValueError) as error:
        yield Fault((key,), f"{key} {path} cannot be {use} ({error}): give another")
    return None
