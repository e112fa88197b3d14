"""`path@[start:stop]`, as slime writes slices of a data set."""

import pytest

from spmd_rl.data.paths import split_slice


@pytest.mark.parametrize(
    ("written", "path", "rows"),
    [
        ("a/b.jsonl", "a/b.jsonl", None),
        ("b.jsonl@[0:100]", "b.jsonl", slice(0, 100)),
        ("b.jsonl@[:-10]", "b.jsonl", slice(None, -10)),
        ("b.parquet@[-5:]", "b.parquet", slice(-5, None)),
        ("b@home.jsonl@[:]", "b@home.jsonl", slice(None, None)),
        ("me@host.jsonl", "me@host.jsonl", None),
    ],
)
def test_path_and_rows(written: str, path: str, rows: slice | None):
    assert split_slice(written) == (path, rows)


@pytest.mark.parametrize("written", ["b.jsonl@[1]", "b.jsonl@[a:b]", "b.jsonl@[1:2", "b@[1:-]"])
def test_malformed(written: str):
    with pytest.raises(ValueError, match="path@"):
        split_slice(written)
