"""The table of what learns says the worst of all seeds."""

from tools.learn import AGREES, LEARNS, REACHES, Found, row


def test_every_seed_counts():
    runs = [Found(0.3, after, 2.0) for after in (0.9, 0.55, 0.8)]
    words, holds = row("grpo", runs, LEARNS)
    assert words == [
        "grpo",
        "3",
        "0.300 (0.300-0.300)",
        "0.750 (0.550-0.900)",
        "gain >= 0.3",
        "0.250",
        "2.0",
        "NO",
    ]
    assert not holds
    assert row("grpo", runs[:1], LEARNS)[1]


def test_the_worst_is_the_largest_where_a_figure_must_be_small():
    words, holds = row("opd", [Found(0.3, after, 2.0, 0.9) for after in (0.92, 0.84)], REACHES)
    assert words[5] == "0.060" and not holds
    words, holds = row("r3", [Found(2e-3, gap, 1.0) for gap in (9e-7, 2e-6)], AGREES)
    assert words[5] == "2.0e-06" and holds
