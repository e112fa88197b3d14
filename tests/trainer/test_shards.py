"""Boxes of tensors in files: cut anywhere, put together again, and no code in them is run."""

from __future__ import annotations

import math
import os
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spmd_rl.trainer.pieces import Piece, boxes
from spmd_rl.trainer.shards import INDEX, Image, Stored, write_index

SHAPE = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


def cut(whole: torch.Tensor, cuts: list[int], key: str = "t") -> list[Piece]:
    """The tensor as the pieces that owners of the runs between `cuts` have."""
    places = sorted({0, whole.numel(), *cuts})
    found = []
    for start, stop in zip(places, places[1:], strict=False):
        at = start
        for offset, size in boxes(tuple(whole.shape), start, stop):
            values = whole.view(-1)[at : at + math.prod(size)].view(size)
            found.append(Piece(key, tuple(whole.shape), offset, values))
            at += math.prod(size)
        assert at == stop
    return found


@settings(deadline=None, max_examples=60)
@given(SHAPE, st.lists(st.integers(0, 625)), st.lists(st.integers(0, 625)))
def test_any_cut_is_read_back_as_any_other(tmp_path_factory, shape, before, after):
    folder = tmp_path_factory.mktemp("shards")
    size = math.prod(shape)
    whole = torch.arange(size, dtype=torch.float32).view(shape)
    image = Image(cut(whole, [c for c in before if c < size]), "__0_0.distcp", pinned=False)
    image.fill(cut(whole, [c for c in before if c < size]))
    image.write(folder)
    write_index(folder, image.chunks)
    read = torch.zeros_like(whole)
    with Stored(folder) as stored:
        stored.fill(cut(read, [c for c in after if c < size]))
    assert torch.equal(read, whole)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of three kinds of numbers, from two ranks."""
    values = {
        "a": torch.randn(3, 4),
        "b": torch.randn(7).bfloat16(),
        "c": torch.arange(5, dtype=torch.uint8),
    }
    chunks = []
    for rank, names in enumerate(("ab", "c")):
        pieces = [p for name in names for p in cut(values[name], [2], name)]
        image = Image(pieces, f"__{rank}_0.distcp", pinned=False)
        image.fill(pieces)
        image.write(tmp_path)
        chunks += image.chunks
    write_index(tmp_path, chunks)
    return tmp_path, values


def test_torch_reads_it(folder):
    from torch.distributed.checkpoint.state_dict_loader import load

    path, values = folder
    read = {name: torch.zeros_like(value) for name, value in values.items()}
    load(read, checkpoint_id=str(path), no_dist=True)
    assert all(torch.equal(read[name], values[name]) for name in values)


class Harm:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_an_index_that_runs_code_is_refused(folder, monkeypatch):
    path, _ = folder
    monkeypatch.chdir(path)
    (path / INDEX).write_bytes(pickle.dumps(Harm()))
    with pytest.raises(ValueError, match="names posix.system"):
        Stored(path)
    assert not (path / "harmed").exists()


def test_files_outside_are_not_read(folder):
    path, values = folder
    (path.parent / "outside").write_bytes(b"0" * 4096)
    index = pickle.loads((path / INDEX).read_bytes())
    for info in index.storage_data.values():
        info.relative_path = "../outside"
    (path / INDEX).write_bytes(pickle.dumps(index))
    with Stored(path) as stored, pytest.raises(ValueError, match="a file outside it"):
        stored.fill(cut(torch.zeros(3, 4), [], "a"))


def test_what_is_not_there_or_has_another_shape(folder):
    path, _ = folder
    with Stored(path) as stored:
        with pytest.raises(ValueError, match="holds no tensor 'd'"):
            stored.fill(cut(torch.zeros(3), [], "d"))
        with pytest.raises(ValueError, match=r"another model: 'a' has the shape \[3, 4\] there"):
            stored.fill(cut(torch.zeros(3, 5), [], "a"))
