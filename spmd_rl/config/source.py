"""What the user wrote: a YAML file and overrides, as values by (section, key), each with its place.

Comes in: a path and the words after it; goes out: a `Source`. It must not know which keys exist:
that is names.py and load.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from spmd_rl.config.errors import ConfigError


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which reads 1e-6 as a number (YAML 1.1 asks for 1.0e-6)."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)?(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


class Dumper(yaml.SafeDumper):
    """Quotes text that Loader would read as something else."""


Dumper.yaml_implicit_resolvers = Loader.yaml_implicit_resolvers


@dataclass
class Entry:
    """One key as written. `section` is None when it was written without one."""

    section: str | None
    key: str
    value: Any
    place: str  # "config.yaml:12" or "override 1 'lr=2'"


@dataclass
class Source:
    entries: list[Entry] = field(default_factory=list)
    sections: dict[str, str] = field(default_factory=dict)  # top-level mapping -> its place
    faults: list[str] = field(default_factory=list)


def parse_value(text: str) -> Any:
    return yaml.load(text, Loader)  # noqa: S506 - Loader is a SafeLoader


def read(path: str | Path, overrides: list[str]) -> Source:
    """The file's entries, then the overrides' (later ones win)."""
    source = Source()
    _read_yaml(Path(path), source)
    for number, word in enumerate(overrides, 1):
        _read_override(number, word, source)
    return source


def _read_yaml(path: Path, source: Source) -> None:
    try:
        text = path.read_text()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            [f"--config {path} cannot be read ({reason}): give a YAML file"]
        ) from None
    try:
        loader = Loader(text)
        root = loader.get_single_node()
        if root is None:
            raise ConfigError([f"--config {path} is empty: see docs/configuration.md for its form"])
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError([f"{path}:1: the file must hold sections, such as 'model:'"])
        for key_node, value_node in _pairs(root, str(path), "", source):
            _read_section(loader, str(path), key_node, value_node, source)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(
            [f"{path}:{line}: not valid YAML: {error.problem}; mend the file"]
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError([f"{path}: not valid YAML: {error}; mend the file"]) from None


def _read_section(
    loader: Loader, path: str, key_node: yaml.Node, value_node: yaml.Node, source: Source
) -> None:
    name = _name(key_node.value)
    place = f"{path}:{key_node.start_mark.line + 1}"
    if isinstance(value_node, yaml.MappingNode):
        source.sections[name] = place
        for inner, value in _pairs(value_node, path, f"{name}.", source):
            line = inner.start_mark.line + 1
            parsed = loader.construct_object(value, deep=True)
            source.entries.append(Entry(name, _name(inner.value), parsed, f"{path}:{line}"))
        return
    parsed = loader.construct_object(value_node, deep=True)
    if parsed is None:  # "algo:" with nothing below it: a section left at its defaults
        source.sections[name] = place
    else:
        source.entries.append(Entry(None, name, parsed, place))


def _pairs(
    node: yaml.MappingNode, path: str, prefix: str, source: Source
) -> list[tuple[yaml.Node, yaml.Node]]:
    """The mapping's pairs; a key written twice is a fault (YAML itself would drop the first)."""
    seen: dict[str, int] = {}
    for key, _ in node.value:
        line, name = key.start_mark.line + 1, _name(key.value)
        if name in seen:
            source.faults.append(
                f"{path}:{line}: {prefix}{name} is already set in line {seen[name]}: keep one"
            )
        seen[name] = line
    return node.value


def _read_override(number: int, word: str, source: Source) -> None:
    place = f"override {number} '{word}'"
    name, equals, text = word.partition("=")
    name = _name(name)
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)?", name):
        source.faults.append(
            f"{place}: an override is written section.key=value or key=value, "
            "such as rollout.num_rollout=2"
        )
        return
    try:
        value = parse_value(text)
    except yaml.YAMLError:
        source.faults.append(f"{place}: the value is not valid YAML: put it in quotes")
        return
    section, dot, key = name.rpartition(".")
    source.entries.append(Entry(section if dot else None, key, value, place))


def _name(written: Any) -> str:
    """slime's spelling of a flag (--num-rollout) as a key."""
    return str(written).removeprefix("--").replace("-", "_").strip()
