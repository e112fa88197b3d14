"""The option lists read from source are those of the installed packages."""

from __future__ import annotations

import dataclasses

import pytest

from spmd_rl.config import upstream


@pytest.mark.parametrize("name", upstream.MEGATRON_CONFIGS)
def test_megatron_fields_are_those_of_the_class(name: str):
    core = pytest.importorskip("megatron.core")
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig

    assert core
    classes = (TransformerConfig, OptimizerConfig, DistributedDataParallelConfig)
    cls = next(cls for cls in classes if cls.__name__ == name)
    assert set(upstream.megatron_fields(name)) == {
        f.name for f in dataclasses.fields(cls) if not f.name.startswith("_")
    }


def test_sglang_fields_hold_what_users_set():
    fields = upstream.sglang_fields()
    if not fields:
        pytest.skip("SGLang is not installed")
    assert len(fields) > 200
    for key in ("mem_fraction_static", "attention_backend", "max_total_tokens", "model_path"):
        assert key in fields


@pytest.mark.parametrize(
    ("annotation", "allowed", "choices"),
    [
        ("bool", {"bool"}, []),
        ("Optional[int]", {"int", "None"}, []),
        ("int | None", {"int", "None"}, []),
        ("typing.Union[int, str]", {"int", "str"}, []),
        ("Optional[Literal['full', 'selective']]", {"str", "None"}, ["full", "selective"]),
        ("A[str, Arg(help='x', choices=['a', 'b'])]", {"str"}, ["a", "b"]),
        ("A[str, Arg(help='x', choices=NAMED)]", {"str"}, []),
        ("A[Optional[int], Arg(type_parser=human)]", {"int", "str", "None"}, []),
        ("Callable", None, []),
        ("List[int]", None, []),
    ],
)
def test_plain_types(annotation: str, allowed: set[str] | None, choices: list[str]):
    assert upstream.plain_types(annotation) == (allowed, choices)


def test_older_and_newer_layouts_of_server_args(tmp_path, monkeypatch):
    """Fields stand in ServerArgs itself up to 0.5.15, in classes of their own in 0.5.23."""
    srt = tmp_path / "sglang" / "srt"
    (srt / "arg_groups" / "fields").mkdir(parents=True)
    (srt.parent / "__init__.py").write_text("raise ImportError('read, not imported')")
    old = "class Base:\n    a: int = 1\n\nclass ServerArgs(Base):\n    model_path: A[str, 'x']\n"
    (srt / "server_args.py").write_text(old)
    new = "class Model(msgspec.Struct):\n    _NS_PATH = 'model'\n    b: A[bool, 'x'] = True\n"
    (srt / "arg_groups" / "fields" / "model.py").write_text(new)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(upstream, "sglang_fields", upstream.sglang_fields.__wrapped__)
    assert set(upstream.sglang_fields()) == {"a", "model_path", "b"}
