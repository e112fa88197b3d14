"""No knob without a reader: every key is read somewhere outside the configuration's own files."""

from __future__ import annotations

import ast

from spmd_rl.config.schema import SECTIONS
from tests.models import ROOT

PACKAGE = ROOT / "spmd_rl"


def test_every_key_has_a_reader():
    read: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        # evaluation.py reads the keys of `eval:` for the collector, debug.py what implies others.
        if path.parent == PACKAGE / "config" and path.name not in ("evaluation.py", "debug.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                read.add(node.value)  # getattr(cfg, "key")
    keys = {f"{s}.{key}" for s, model in SECTIONS.items() for key in model.model_fields}
    unread = sorted(name for name in keys if name.split(".")[1] not in read)
    assert not unread, f"keys nothing reads: {', '.join(unread)}"
