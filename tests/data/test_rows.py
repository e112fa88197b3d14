"""Rows of files: found by position, bad ones named by line."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spmd_rl.data.rows import DataError, Rows

LINES = [{"n": i, "text": "x" * i} for i in range(10)]


def jsonl(path, lines):
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture
def good(tmp_path):
    return jsonl(tmp_path / "good.jsonl", [json.dumps(row) for row in LINES])


def test_rows_by_position(good):
    rows = Rows(good)
    assert [rows[i] for i in range(len(rows))] == LINES


@pytest.mark.parametrize("cut", ["0:3", "3:", ":-2", "-4:", "2:5", "-3:-1", ":"])
def test_slices(good, cut):
    start, stop = (int(word) if word else None for word in cut.split(":"))
    rows = Rows(f"{good}@[{cut}]")
    assert [rows[i] for i in range(len(rows))] == LINES[start:stop]


def test_blank_lines_carriage_returns_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"n": 1}\r\n\r\n   \n{"n": 2}\n\n')
    rows = Rows(str(path))
    assert [rows[i]["n"] for i in range(len(rows))] == [1, 2]


def test_numbers_that_strict_json_refuses(tmp_path):
    rows = Rows(jsonl(tmp_path / "x.jsonl", ['{"n": NaN}', '{"n": Infinity}']))
    assert rows[0]["n"] != rows[0]["n"]
    assert rows[1]["n"] == float("inf")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"n": 1', "not JSON"),
        ('{"n": 1} {"n": 2}', "not JSON"),
        ("[1, 2]", "one JSON object per line"),
        ("[", "one JSON object per line"),
        ("7", "one JSON object per line"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, line, problem):
    path = jsonl(tmp_path / "bad.jsonl", ['{"n": 0}', "", line, '{"n": 3}'])
    with pytest.raises(DataError, match=rf"bad.jsonl line 3: .*{problem}.*data.on_bad_line: skip"):
        Rows(path)
    rows = Rows(path, on_bad_line="skip")
    assert [rows[i]["n"] for i in range(len(rows))] == [0, 3]
    assert "line 3" in rows.notes[0]


def test_many_bad_lines_are_counted_not_listed(tmp_path):
    rows = Rows(jsonl(tmp_path / "x.jsonl", ['{"n": 0}', *["?"] * 50]), on_bad_line="skip")
    assert rows.skipped == 50 and len(rows.notes) < 10
    assert "50 unreadable" in rows.notes[-1]


def test_faults_of_rows_count_as_bad_lines(tmp_path, good):
    with pytest.raises(DataError, match="line 5: too long"):
        Rows(good, fault=lambda row: "too long" if row["n"] > 3 else None)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_files(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="no usable rows"):
        Rows(str(path))


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        Rows(str(tmp_path / "nothing.jsonl"))


def test_parquet_rows_are_those_of_the_table(tmp_path):
    path = str(tmp_path / "x.parquet")
    table = [row | {"chat": [{"role": "user", "content": row["text"]}]} for row in LINES]
    pq.write_table(pa.Table.from_pylist(table), path, row_group_size=3)
    rows = Rows(f"{path}@[2:]")
    assert [rows[i] for i in range(len(rows))] == table[2:]
