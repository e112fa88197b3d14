"""The bench of collecting: its ideal schedule, and that every part runs."""

from pathlib import Path

import pytest

from tools import bench_collect


def test_the_ideal_keeps_every_slot_busy():
    """Two groups of eight samples of 1 to 8 tokens, on one slot and on many."""
    lengths, seeds = list(range(1, 9)), list(range(16))
    assert bench_collect.ideal(lengths, seeds, 1, 2, 2) == 72
    assert bench_collect.ideal(lengths, seeds, 16, 2, 2) == 8
    assert bench_collect.ideal([1, 3], [0, 1] * 4 + [0] * 8, 4, 2, 2) == 6


def test_the_ideal_draws_again_for_what_is_turned_down():
    lengths, seeds = [5], list(range(8 * 12))
    assert bench_collect.ideal(lengths, seeds, 8, 3, 3) == 5 * 4  # the third is turned down


@pytest.mark.parametrize("part", list(bench_collect.PARTS))
def test_every_part_runs(part: str, capsys, tmp_path: Path):
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("20 40 10 30 400")
    words = ["--only", part, "--rounds", "1", "--in-flight", "512", "--lengths", str(lengths)]
    bench_collect.main(words)  # its status says whether a goal was met, which is no test's matter
    assert f"{part}  " in capsys.readouterr().out
