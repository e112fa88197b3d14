"""From a YAML file and overrides to a checked `Config` and a `Placement`, or to all faults at once.

The steps: names -> types (pydantic) -> what follows from other keys -> cross checks, placement,
files. A step looks past keys that an earlier one found wrong, so that one mistake is one sentence.
Must not import torch, sglang or megatron.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from spmd_rl import layout
from spmd_rl.config import check, debug, files, names, source, upstream
from spmd_rl.config.errors import ConfigError, Fault
from spmd_rl.config.schema import PASS_THROUGH, SECTIONS, Config
from spmd_rl.types import Placement

PLACEHOLDERS = {"model.hf_checkpoint": "", "rollout.rollout_batch_size": 1}  # of required keys


def load(
    path: str | Path,
    overrides: list[str],
    world: int | None = None,
    ranks_per_node: int | None = None,
    check_files: bool = True,
) -> tuple[Config, Placement]:
    """The configuration with everything filled in, and who is where on `world` ranks.

    Without `world` the placement is planned for the size the configuration asks for; without
    `check_files` models and data need not be there yet.
    """
    given = names.resolve(source.read(path, overrides))
    cfg, faults, wrong = _build(given.values)
    wrong |= given.meant
    # What is derived below is done before the checks, which read it.
    fill(cfg, Path(path).stem)
    planned, per_node = layout.planned_world(cfg, world)
    world, ranks_per_node = world or planned, ranks_per_node or per_node
    later: list[Fault] = [
        *upstream.check_megatron(cfg.megatron),
        *upstream.check_sglang(cfg.sglang),
        *check.check(cfg),
        *layout.misfits(cfg, world, ranks_per_node),
        *(files.check(cfg) if check_files else ()),
    ]
    faults += [fault for fault in later if not wrong.intersection(fault.keys)]
    sentences = given.faults + _sentences(faults, given.places)
    if sentences:
        raise ConfigError(sentences)
    return cfg, layout.place(cfg, world, ranks_per_node)


def dump(cfg: Config) -> str:
    """The whole configuration as YAML that loads back equal."""
    return yaml.dump(
        cfg.model_dump(), Dumper=source.Dumper, sort_keys=False, width=100, allow_unicode=True
    )


def fill(cfg: Config, name: str) -> None:
    """Write down what follows from other keys, so that readers need no rules of their own."""
    place, rollout, train = cfg.placement, cfg.rollout, cfg.train
    if place.device == "auto":
        place.device = "cuda" if layout.has_nvidia_driver() else "cpu"
    for switch in ("offload_train", "offload_rollout"):
        if getattr(place, switch) is None:
            both = place.colocate if place.offload is None else place.offload
            setattr(place, switch, both)
    debug.fill(cfg)
    if cfg.logging.name is None:
        cfg.logging.name = name
    if not cfg.megatron.get("fp16"):
        cfg.megatron.setdefault("bf16", place.device == "cuda")
    if train.deterministic:
        cfg.megatron.setdefault("deterministic_mode", True)
        cfg.sglang.setdefault("enable_deterministic_inference", True)
        # With it, what a prompt's log-probs are in the last bit depends on what was cached before.
        cfg.sglang.setdefault("disable_radix_cache", True)
    produced = rollout.rollout_batch_size * rollout.n_samples_per_prompt
    if rollout.num_steps_per_rollout is None:
        size = train.global_batch_size or produced
        rollout.num_steps_per_rollout = max(produced // size, 1)
    if train.global_batch_size is None:
        train.global_batch_size = max(produced // rollout.num_steps_per_rollout, 1)


def _build(values: dict[str, dict[str, Any]]) -> tuple[Config, list[Fault], set[str]]:
    """A Config of the values that have the right type, the faults, and the keys they concern."""
    values = {section: dict(keys) for section, keys in values.items()}
    faults = _booleans_for_numbers(values)
    _split_eval_data(values)
    try:
        return Config.model_validate(_accepted(values, faults)), faults, set()
    except ValidationError as error:
        faults += [_type_fault(item) for item in error.errors()]
    wrong = {fault.keys[0] for fault in faults}
    accepted = _accepted(values, faults)
    for dotted, value in PLACEHOLDERS.items():
        section, key = dotted.split(".")
        accepted.setdefault(section, {}).setdefault(key, value)
    return Config.model_validate(accepted), faults, wrong


def _accepted(values: dict[str, dict[str, Any]], faults: list[Fault]) -> dict[str, dict[str, Any]]:
    wrong = {fault.keys[0] for fault in faults}
    return {
        section: {key: value for key, value in keys.items() if f"{section}.{key}" not in wrong}
        for section, keys in values.items()
    }


def _booleans_for_numbers(values: dict[str, dict[str, Any]]) -> list[Fault]:
    """true is no number here, though Python and pydantic count it as 1."""
    faults = []
    for section, keys in values.items():
        fields = SECTIONS[section].model_fields if section in SECTIONS else {}
        for key, value in keys.items():
            allowed = _plain(fields[key].annotation) if key in fields else set()
            if isinstance(value, bool) and allowed & {int, float} and bool not in allowed:
                name = f"{section}.{key}"
                faults.append(Fault((name,), f"{name} must be a number, not {_shown(value)}"))
    return faults


def _split_eval_data(values: dict[str, dict[str, Any]]) -> None:
    """slime writes `--eval-prompt-data name path name path`: take the words of one string too."""
    words = values.get("eval", {}).get("eval_prompt_data")
    if isinstance(words, str):
        values["eval"]["eval_prompt_data"] = words.split()


def _plain(annotation: Any) -> set[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        return set().union(*(_plain(part) for part in get_args(annotation)))
    return {annotation}


def _type_fault(item: Any) -> Fault:
    """A sentence for one of pydantic's errors."""
    where = [str(part) for part in item["loc"][:2]]
    name = ".".join(where)
    kind, context, value = item["type"], item.get("ctx", {}), _shown(item.get("input"))
    if kind == "missing":
        missing = name if len(where) == 2 else _required(where[0])
        return Fault((missing,), f"{missing} is missing: {_meaning(missing)}")
    if kind == "literal_error":
        choices = _choices(name)
        guess = names._nearest(str(item["input"]), choices)
        fix = f"did you mean {guess}?" if guess else "change it"
        return Fault((name,), f"{name} must be one of {', '.join(choices)}, not {value}: {fix}")
    for limit, words in (
        ("ge", "at least"),
        ("gt", "more than"),
        ("le", "at most"),
        ("lt", "less"),
    ):
        if limit in context:
            return Fault(
                (name,), f"{name} must be {words} {context[limit]}, not {value}: change it"
            )
    wanted = _WANTED.get(kind.split("_")[0], "of another type")
    return Fault((name,), f"{name} must be {wanted}, not {value}: change it")


_WANTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text (put it in quotes)",
    "list": "a list",
    "dict": "a mapping",
}


def _required(section: str) -> str:
    return next(name for name in PLACEHOLDERS if name.startswith(f"{section}."))


def _meaning(name: str) -> str:
    meanings = {
        "model.hf_checkpoint": "give the directory of a Hugging Face model",
        "rollout.rollout_batch_size": "give the number of prompts of a rollout",
    }
    return meanings.get(name, "set it")


def _choices(name: str) -> list[str]:
    section, key = name.split(".")
    for part in _plain(SECTIONS[section].model_fields[key].annotation):
        if get_origin(part) is Literal:
            return [str(choice) for choice in get_args(part)]
    return []


def _shown(value: Any) -> str:
    """A value as its user wrote it."""
    return yaml.safe_dump(value, default_flow_style=True, width=200).removesuffix("...\n").strip()


def _sentences(faults: Iterable[Fault], places: dict[str, str]) -> list[str]:
    """The faults with the place of the first of their keys that the user wrote; each once."""
    sentences: dict[str, None] = {}
    for fault in faults:
        place = next((places[key] for key in fault.keys if key in places), None)
        sentences[f"{place}: {fault.text}" if place else fault.text] = None
    return list(sentences)


assert not set(PASS_THROUGH) & set(SECTIONS)
