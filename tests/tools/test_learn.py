"""The table of what learns says the least gain of all seeds."""

from tools.learn import row


def test_every_seed_counts():
    runs = [{"eval_before": 0.3, "eval_after": after, "minutes": 2.0} for after in (0.9, 0.55, 0.8)]
    words, enough = row("grpo", runs)
    assert words == [
        "grpo",
        "3",
        "0.300 (0.300-0.300)",
        "0.750 (0.550-0.900)",
        "+0.250",
        "2.0",
        "NO",
    ]
    assert not enough
    assert row("grpo", runs[:1])[1]
