"""What may import what, and that planning needs none of the heavy packages."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.models import ROOT

PACKAGE = ROOT / "spmd_rl"
HEAVY = ("torch", "sglang", "megatron", "transformers")
# Small files for several stages; they import the shared parts.
HELPERS = ("hooks", "tasks", "attend", "disk", "sandbox")
# All import these; they only each other.
SHARED = ("types", "architecture", "config", "layout", "planner", *HELPERS)
# Folders in the order of the data. A folder imports earlier ones only. The collector (rollout)
# calls rewards and normalises them, so both stand before it.
STAGES = ("control", "data", "rewards", "algo", "rollout", "agent", "batch", "weights", "trainer")
# Values that earlier folders describe their arguments with; the module imports no other stage.
VALUES = ("spmd_rl.trainer.parallel",)


def test_planning_imports_nothing_heavy_and_is_quick():
    modules = "spmd_rl, spmd_rl.config, spmd_rl.layout, spmd_rl.types, spmd_rl.cli"
    script = f"import sys, {modules}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not set(HEAVY) & set(done.stdout.split())
    assert time.monotonic() - start < 5  # 0.3 s on a quiet machine


def imports(path: Path) -> set[str]:
    """The modules of this package that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "spmd_rl":
            found |= {f"spmd_rl.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}: imports are written in full"
            found.add(node.module)
    return {name for name in found if name.startswith("spmd_rl.")}


def part_of(module: str) -> str:
    """spmd_rl.rollout.engines -> rollout."""
    return module.split(".")[1]


def files_of(part: str) -> list[Path]:
    folder = PACKAGE / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{part}.py"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_earlier_stages_only(stage: str):
    allowed = {*SHARED, *STAGES[: STAGES.index(stage) + 1]}
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in files_of(stage)
        if path.exists()
        for module in imports(path)
        if part_of(module) not in allowed and module not in VALUES
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", VALUES)
def test_values_import_no_stage(module: str):
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    if path.exists():
        assert {part_of(name) for name in imports(path)} <= set(SHARED)


@pytest.mark.parametrize("part", SHARED)
def test_shared_parts_import_each_other_only(part: str):
    allowed = {*SHARED, "data"}  # data/paths.py: the spelling of path@[a:b]
    for path in filter(Path.exists, files_of(part)):
        assert {part_of(module) for module in imports(path)} <= allowed, path
