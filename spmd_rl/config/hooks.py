"""Whether the functions of the `*_path` keys exist, found by reading source and importing nothing.

A hook is written `package.module:function` or, as slime does, `package.module.function`.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from spmd_rl.config.errors import Fault
from spmd_rl.config.schema import SECTIONS, Config

KEYS = [
    (section, key)
    for section, model in SECTIONS.items()
    for key in model.model_fields
    if key.endswith("_path")
]


def split(path: str) -> tuple[str, str]:
    """Module and function of a hook's path; ValueError when it names no module."""
    module, _, function = path.rpartition(":" if ":" in path else ".")
    if not module or not all(part.isidentifier() for part in (*module.split("."), function)):
        raise ValueError(f"'{path}' is no function: write package.module:function")
    return module, function


def check(cfg: Config) -> Iterator[Fault]:
    for section, key in KEYS:
        given = getattr(getattr(cfg, section), key) or []
        for path in [given] if isinstance(given, str) else given:
            fault = missing(path)
            if fault:
                yield Fault((f"{section}.{key}",), f"{section}.{key} {fault}")


def missing(path: str) -> str | None:
    """What is wrong with a hook's path, as the end of a sentence."""
    try:
        module, function = split(path)
    except ValueError as error:
        return str(error)
    spec = _find(module)
    if spec is None:
        return f"'{path}': there is no module {module}: add its folder to PYTHONPATH"
    if spec.origin and spec.origin.endswith(".py"):
        names = _defined(Path(spec.origin))
        if names is not None and function not in names:
            return f"'{path}': {spec.origin} defines no {function}: correct the name"
    return None


def _find(module: str) -> ModuleSpec | None:
    """The module's spec, without importing its parents; the working directory counts too."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top) or PathFinder.find_spec(top, [""])
    except ValueError:  # a running program without a spec, such as __main__
        return None
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(part, list(spec.submodule_search_locations))
    return spec


def _defined(source: Path) -> set[str] | None:
    """Names bound at the top level of a file; None when that cannot be said."""
    try:
        tree = ast.parse(source.read_text())
    except (OSError, SyntaxError):
        return None
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.asname or alias.name for alias in node.names]
            found.update(names)
    return None if found & {"*", "__getattr__"} else found
