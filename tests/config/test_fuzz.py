"""Whatever is written, loading ends with a configuration or with sentences, never otherwise."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from spmd_rl.config import ConfigError, dump, load
from spmd_rl.config.schema import PASS_THROUGH, SECTIONS
from tests.config.inputs import good, write

WHERE = tempfile.TemporaryDirectory()
GOOD = good(Path(WHERE.name))
KEYS = [f"{section}.{key}" for section, model in SECTIONS.items() for key in model.model_fields]
KEYS += [
    "megatron.tensor_model_parallel_size",
    "megatron.expert_model_parallel_size",
    "megatron.sequence_parallel",
    "megatron.num_layers",
    "megatron.bf16",
    "sglang.mem_fraction_static",
    "sglang.tp_size",
    *(f"{section}.nonsense" for section in (*SECTIONS, *PASS_THROUGH, "nonsense")),
    *SECTIONS,
    "x",
    "",
    "a.b.c",
]
VALUES = [
    0,
    1,
    2,
    -1,
    7,
    1.5,
    1e-6,
    "",
    "text",
    "a b",
    "x@[1:2]",
    ".",
    "/",
    "json:loads",
    "{",
    "[1",
]
VALUES += [
    True,
    None,
    [],
    [1],
    ["a", "b"],
    {},
    {"a": 1},
    "2024-01-01",
    "1e-6",
    "yes",
    "~",
    "&a",
    "!x",
]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(VALUES)), max_size=4),
    st.none() | st.integers(1, 9),
)
def test_overrides(words, world):
    path = write(Path(WHERE.name), GOOD)
    attempt(path, [f"{key}={str(value).lower()}" for key, value in words], world)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(VALUES)), max_size=4))
def test_files(words):
    values = {section: dict(keys) for section, keys in GOOD.items()}
    for name, value in words:
        section, _, key = name.partition(".")
        if not key:
            values[section] = value
        elif isinstance(values.setdefault(section, {}), dict):
            values[section][key] = value
    attempt(write(Path(WHERE.name), values), [], None)


def attempt(path: Path, overrides: list[str], world: int | None) -> None:
    try:
        cfg, placement = load(path, overrides, world)
    except ConfigError as error:
        assert error.faults
        assert all(text and "\n" not in text for text in error.faults)
    else:
        path.write_text(dump(cfg))
        assert load(path, [], placement.world, placement.ranks_per_node) == (cfg, placement)
