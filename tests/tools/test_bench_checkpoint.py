"""The checkpoint benchmark runs, and prints what it promises."""

from tools.bench_checkpoint import BLOCKED, ROWS, table


def test_table():
    seconds = dict.fromkeys(ROWS, 2.0) | {BLOCKED: 0.2, "load": 1.0}
    text = table({"bytes": 4_000_000_000, "ranks": 4, "seconds": seconds})
    assert "blocks for 10% of a synchronous one" in text
    ratios = [line.split()[-1] for line in text.splitlines()[1 : len(ROWS) + 1]]
    assert ratios == ["1.00", "1.00", "0.10", "1.00", "1.00", "1.00", "0.50"]
