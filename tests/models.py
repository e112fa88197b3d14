"""Tiny models for tests, made once for each set of options and kept under build/.

`tiny_model("qwen3", hidden=64)` returns the directory of a Hugging Face model. Its name holds a
hash of the options and of the script that makes it, so a stale model is never used. Several
processes may ask at once.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tools.make_tiny_model import make_tiny_model

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tools" / "make_tiny_model.py"


def tiny_model(family: str = "qwen3", **options: Any) -> Path:
    """Directory of a model; small and perturbed unless the options say otherwise."""
    options = {"hidden": 64, "layers": 2, "perturb": 0.1} | options
    key = json.dumps([family, options], sort_keys=True).encode() + SCRIPT.read_bytes()
    path = ROOT / "build" / "test-models" / f"{family}-{hashlib.sha256(key).hexdigest()[:12]}"
    if not (path / "config.json").is_file():
        try:
            make_tiny_model(path, family, **options)
        except OSError:
            if not (path / "config.json").is_file():  # another process made it first
                raise
    return path
