"""The options of the installed megatron-core and SGLang, read from their source without importing.

Goes out: names and annotations of their configuration classes, and sentences on `megatron:` and
`sglang:` values that do not fit. It must not import either package: that takes seconds.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spmd_rl.config.errors import Fault

# class -> (file below megatron/core, base class in another file)
MEGATRON_CLASSES = {
    "ModelParallelConfig": ("model_parallel_config.py", None),
    "TransformerConfig": ("transformer/transformer_config.py", "ModelParallelConfig"),
    "OptimizerConfig": ("optimizer/optimizer_config.py", None),
    "DistributedDataParallelConfig": ("distributed/distributed_data_parallel_config.py", None),
}
MEGATRON_CONFIGS = ("TransformerConfig", "OptimizerConfig", "DistributedDataParallelConfig")
SCALARS = ("bool", "int", "float", "str")
UNSETTABLE = ("Callable", "torch.dtype", "ContextManager")  # what a YAML file cannot hold


@functools.cache
def megatron_fields(cls_name: str) -> dict[str, str]:
    """Field -> annotation of a megatron-core configuration class; {} when it is not installed."""
    root = _package("megatron", "core")
    if root is None:
        return {}
    file, base = MEGATRON_CLASSES[cls_name]
    inherited = megatron_fields(base) if base else {}
    return inherited | _class_fields(_parse(root / file), cls_name)


@functools.cache
def sglang_fields() -> dict[str, str]:
    """Field -> annotation of SGLang's ServerArgs; {} when it is not installed.

    In older versions the fields stand in the class; in newer ones in a class per namespace,
    which has _NS_PATH.
    """
    root = _package("sglang", "srt")
    if root is None:
        return {}
    fields = _class_fields(_parse(root / "server_args.py"), "ServerArgs")
    for file in sorted((root / "arg_groups" / "fields").glob("*.py")):
        for node in _parse(file).body:
            if isinstance(node, ast.ClassDef) and _has(node, "_NS_PATH"):
                fields |= _annotated(node)
    return fields


def check_megatron(given: dict[str, Any]) -> Iterator[Fault]:
    """Faults of the `megatron:` keys' values; unknown keys are for names.py."""
    for key, value in given.items():
        for name in MEGATRON_CONFIGS:
            annotation = megatron_fields(name).get(key)
            if annotation is not None:
                yield from _check(f"megatron.{key}", annotation, value)
                break


def check_sglang(given: dict[str, Any]) -> Iterator[Fault]:
    fields = sglang_fields()
    for key, value in given.items():
        if key in fields:
            yield from _check(f"sglang.{key}", fields[key], value)


def all_megatron_fields() -> dict[str, str]:
    return {key: text for name in MEGATRON_CONFIGS for key, text in megatron_fields(name).items()}


def _check(name: str, annotation: str, value: Any) -> Iterator[Fault]:
    declared, _ = _declared(annotation)
    if any(word in _text(declared) for word in UNSETTABLE):
        yield Fault((name,), f"{name} cannot be set in a configuration: leave it out")
        return
    allowed, choices = plain_types(annotation)
    if allowed is None or (value is None and "None" in allowed):
        return
    found = type(value).__name__
    if found not in allowed and not (found == "int" and "float" in allowed):
        words = " or ".join(_in_words(a) for a in sorted(allowed, key=lambda a: (a == "None", a)))
        yield Fault((name,), f"{name} must be {words}, not {value!r}: change it")
    elif choices and found == "str" and value not in choices:
        listed = ", ".join(map(str, choices))
        yield Fault((name,), f"{name} must be one of {listed}, not {value!r}: change it")


def plain_types(annotation: str) -> tuple[set[str] | None, list[Any]]:
    """The plain types an annotation allows (None: anything goes) and the choices it lists."""
    declared, metadata = _declared(annotation)
    choices = _listed_choices(metadata)
    allowed: set[str] = set()
    for leaf in _leaves(declared):
        if isinstance(leaf, ast.Constant) and leaf.value is None:
            allowed.add("None")
        elif isinstance(leaf, ast.Name) and leaf.id in SCALARS:
            allowed.add(leaf.id)
        elif isinstance(leaf, ast.Subscript) and _text(leaf.value).endswith("Literal"):
            values = leaf.slice.elts if isinstance(leaf.slice, ast.Tuple) else [leaf.slice]
            literal = [value.value for value in values if isinstance(value, ast.Constant)]
            choices = choices + literal
            allowed |= {type(value).__name__ for value in literal}
        else:
            return None, []
    if any(keyword.arg == "type_parser" for keyword in _keywords(metadata)):
        allowed.add("str")  # SGLang reads words such as 128k itself
    return allowed, choices


def _declared(annotation: str) -> tuple[ast.expr, list[ast.expr]]:
    """A type and what is said about it: SGLang writes A[type, help or Arg(...)]."""
    node = ast.parse(annotation, mode="eval").body
    if isinstance(node, ast.Subscript) and _text(node.value).split(".")[-1] in ("A", "Annotated"):
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return parts[0], parts[1:]
    return node, []


def _leaves(node: ast.expr) -> Iterator[ast.expr]:
    """The alternatives of Optional[...], Union[...] and `|`."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        yield from _leaves(node.left)
        yield from _leaves(node.right)
    elif isinstance(node, ast.Subscript) and _text(node.value).split(".")[-1] == "Optional":
        yield from _leaves(node.slice)
        yield ast.Constant(None)
    elif isinstance(node, ast.Subscript) and _text(node.value).split(".")[-1] == "Union":
        for part in node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]:
            yield from _leaves(part)
    else:
        yield node


def _listed_choices(metadata: list[ast.expr]) -> list[Any]:
    """choices=[...] of an Arg(...), when written out; a named list may be extended by plugins."""
    for keyword in _keywords(metadata):
        if keyword.arg == "choices" and isinstance(keyword.value, ast.List):
            values = [e.value for e in keyword.value.elts if isinstance(e, ast.Constant)]
            return values if len(values) == len(keyword.value.elts) else []
    return []


def _keywords(metadata: list[ast.expr]) -> list[ast.keyword]:
    return [word for node in metadata if isinstance(node, ast.Call) for word in node.keywords]


def _class_fields(tree: ast.Module, name: str) -> dict[str, str]:
    """The fields of a class and of its bases in the same file."""
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if name not in classes:
        return {}
    fields: dict[str, str] = {}
    for base in classes[name].bases:
        fields |= _class_fields(tree, _text(base))
    return fields | _annotated(classes[name])


def _annotated(node: ast.ClassDef) -> dict[str, str]:
    found = {}
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            text = _text(item.annotation)
            if not item.target.id.startswith("_") and not text.startswith("ClassVar"):
                found[item.target.id] = text
    return found


def _has(node: ast.ClassDef, name: str) -> bool:
    return any(
        isinstance(item, ast.Assign) and any(_text(target) == name for target in item.targets)
        for item in node.body
    )


def _package(name: str, folder: str) -> Path | None:
    """Where a package's subfolder lies; find_spec of a top-level name imports nothing."""
    spec = importlib.util.find_spec(name)
    for root in (spec.submodule_search_locations or []) if spec else []:
        if (Path(root) / folder).is_dir():
            return Path(root) / folder
    return None


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text()) if path.is_file() else ast.Module([], [])


def _text(node: ast.expr) -> str:
    return ast.unparse(node)


def _in_words(kind: str) -> str:
    words = {"bool": "true or false", "int": "a whole number", "float": "a number"}
    return words.get(kind, {"str": "text", "None": "null"}.get(kind, kind))
