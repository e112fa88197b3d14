"""Answers made to stall the verifiers; tools/bench_rewards.py takes 10,000."""

import asyncio

from tools.bench_rewards import HOSTILE, hostile_answers, withstand


def test_hostile_answers_neither_stall_nor_fool_the_pool():
    pool, _, accepted, right = asyncio.run(withstand(150, 2, 0.3))
    assert right  # it judges as before
    assert accepted == 0


def test_they_are_the_same_each_time_and_of_all_kinds():
    assert hostile_answers(len(HOSTILE)) == hostile_answers(len(HOSTILE))
    assert len({answer for answer, _ in hostile_answers(3 * len(HOSTILE))}) > 2 * len(HOSTILE)
