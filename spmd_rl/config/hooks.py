"""Whether the functions of the `*_path` keys exist and can be called as they will be, found by
reading source and importing nothing.

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

# How a key's function is called: the arguments in their order, then those given by name.
CALLS = {
    "custom_rm_path": "args, sample",
    "custom_reward_post_process_path": "args, samples",
    "custom_generate_function_path": "args, sample, sampling_params",
    "dynamic_sampling_filter_path": "args, samples",
    "buffer_filter_path": "args, rollout_id, buffer, num_samples",
    "rollout_function_path": "args, rollout_id, data_source, *, evaluation",
    "eval_function_path": "args, rollout_id, data_source, *, evaluation",
    "rollout_sample_hook_path": "args, sample, *, rollout_id, evaluation",
    "rollout_sample_filter_path": "args, groups",
    "rollout_all_samples_process_path": "args, all_groups, data_source",
    "custom_convert_samples_to_train_data_path": "args, samples",
    "rollout_data_postprocess_path": "args, rollout_id, rollout_data",
    "custom_rollout_log_function_path": "rollout_id, args, samples, extra, time",
    "custom_eval_rollout_log_function_path": "rollout_id, args, data, extra",
    "custom_advantage_function_path": "args, rollout_data",
    "custom_loss_function_path": "args, batch, logits, sum_of_sample_mean",
    "custom_pg_loss_reducer_function_path": "total_lengths, response_lengths, loss_masks, "
    "calculate_per_token_loss",
}
CLASSES = {"data_source_path": {"__len__", "get_samples"}}  # keys of classes: methods they need


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
            fault = missing(path, key)
            if fault:
                yield Fault((f"{section}.{key}",), f"{section}.{key} {fault}")


def missing(path: str, key: str = "") -> str | None:
    """What is wrong with a hook's path, as the end of a sentence; `key`: whose value it is."""
    try:
        module, function = split(path)
    except ValueError as error:
        return str(error)
    spec = _find(module)
    if spec is None:
        return f"'{path}': there is no module {module}: add its folder to PYTHONPATH"
    if not spec.origin or not spec.origin.endswith(".py"):
        return None
    names = _defined(Path(spec.origin))
    if names is not None and function not in names:
        return f"'{path}': {spec.origin} defines no {function}: correct the name"
    return _unfit(path, function, key, (names or {}).get(function), spec.origin)


def _unfit(path: str, name: str, key: str, node: ast.AST | None, origin: str) -> str | None:
    """Why what `node` defines cannot be what the key asks for; None also where nobody can say."""
    call = CALLS.get(key)
    if key in CLASSES and node is not None:
        methods = {getattr(part, "name", "") for part in getattr(node, "body", ())}
        if not isinstance(node, ast.ClassDef) or not (node.bases or methods >= CLASSES[key]):
            return f"'{path}' is no class with {', '.join(sorted(CLASSES[key]))}: give it these"
    if (
        call
        and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and not node.decorator_list
        and not _takes(node.args, call)
    ):
        where = f"{origin}:{node.lineno}"
        return f"'{path}' is called as {name}({call}), but {where} takes other arguments: mend it"
    return None


def _takes(given: ast.arguments, call: str) -> bool:
    """Whether a function of these parameters can be called so."""
    ordered, _, named = (part.strip(", ") for part in call.partition("*"))
    count, names = len(ordered.split(",")), set(filter(None, named.split(", ")))
    places = [one.arg for one in (*given.posonlyargs, *given.args)]
    needed = places[: len(places) - len(given.defaults)]
    must = {
        one.arg
        for one, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)
        if default is None
    }
    by_name = {one.arg for one in (*given.args, *given.kwonlyargs)} - set(places[:count])
    return (
        (len(places) >= count or given.vararg is not None)
        and set(needed[count:]) <= names
        and must <= names
        and (names <= by_name or given.kwarg is not None)
    )


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


def _defined(source: Path) -> dict[str, ast.AST | None] | None:
    """Names bound in a file, with the function or class of each; None when that cannot be said."""
    try:
        tree = ast.parse(source.read_text())
    except (OSError, SyntaxError):
        return None
    found: dict[str, ast.AST | None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.setdefault(node.name, None)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found[node.id] = None
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name: None for alias in node.names}
    if found.keys() & {"*", "__getattr__"}:
        return None
    bodies = [node for node in tree.body if getattr(node, "name", None) in found]
    return found | {str(getattr(node, "name", "")): node for node in bodies}
