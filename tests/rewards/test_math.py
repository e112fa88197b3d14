"""`math` and `deepscaler` on real labels and answers; hostile answers cost their time limit."""

import asyncio
import os
import signal
import time

import pytest

from spmd_rl.rewards.math import deepscaler, math
from spmd_rl.rewards.pool import Pool


def judged(function, pairs, timeout=10.0, workers=1):
    async def judge():
        pool = Pool(workers, timeout)
        try:
            return [await function(response, label, pool) for response, label in pairs]
        finally:
            await pool.close()

    return asyncio.run(judge())


GSM8K = "She sold 48/2 = <<48/2=24>>24 clips in May.\n48+24 = <<48+24=72>>72 in all.\n#### 72"


def test_gsm8k_labels():
    answers = [
        r"so \boxed{72}",
        r"\boxed{72.0} clips",
        r"first \boxed{71}, no: \boxed{72}",
        "24+48 = 72\n#### 72",
        "72",
        r"\boxed{24+48}",
        r"\boxed{73}",
        "#### 73",
    ]
    assert judged(math, [(answer, GSM8K) for answer in answers]) == [1, 1, 1, 1, 0, 0, 0, 0]


def test_labels_that_take_algebra():
    right = [
        (r"\boxed{2\sqrt{2}}", r"\sqrt{8}"),
        (r"\boxed{(x+1)^2}", "x^2+2x+1"),
        (r"\boxed{\left(3, \pi/2\right)}", r"\left( 3, \frac{\pi}{2} \right)"),
        (r"\boxed{q - 2p + p}", "-p + q"),
        (r"\boxed{\text{(C)}}", "C"),
        (r"\boxed{0.5}", [r"\frac{1}{3}", r"\frac{1}{2}"]),
    ]
    wrong = [
        (r"\boxed{\sqrt{7}}", r"\sqrt{8}"),
        (r"\boxed{p + q}", "p - q"),
        (r"\boxed{(1, 2, 3)}", "(1, 2)"),
        (r"\boxed{[1,2)}", "(1,2)"),
    ]
    assert judged(math, right + wrong) == [1] * len(right) + [0] * len(wrong)


def test_deepscaler_wants_an_end_of_thought():
    pairs = [
        (r"<think>\boxed{72}</think>\boxed{71}", "72"),
        (r"<think>x</think>It is \boxed{72}", "72"),
        (r"<think>\boxed{72}", "72"),
        (r"###Response \boxed{72}", "72"),
        (r"\boxed{72}", "72"),
        (r"</think> 72", "72"),
    ]
    assert judged(deepscaler, pairs) == [0, 1, 0, 1, 0, 0]


HOSTILE = [
    "9^{9^{9^{9}}}",
    "10^{10^{10}}",
    "((((((((((" * 80,
    r"\frac{1}{" * 80,
    r"\sqrt{" * 100,
    "1" + "+1" * 450,
    r"\int_0^1 \sin(\sin(\sin(x^{99}))) dx",
    r"\sum_{n=1}^{10^{9}} n^{n}",
    "100000!!!!",
    "x^{x^{x^{x^{x^{x}}}}}",
    r"\begin{pmatrix}" + "1 &" * 200 + r"\end{pmatrix}",
    "__import__('os').system('kill 1')",
    "\x00\ud83d\ufffe",
    r"\text{\text{\text{",
    "(" + ",".join("x" * 90) + ")",
]


def test_hostile_answers_cost_their_limit_and_no_more():
    """And the answer after each is judged rightly: the worker was replaced."""

    async def judge():
        pool = Pool(2, timeout=0.5)
        await pool.equal(r"\sqrt{8}", r"2\sqrt{2}")  # started
        began = time.monotonic()
        hostile = await asyncio.gather(
            *(math(rf"\boxed{{{text}}}", r"\sqrt{17}", pool) for text in HOSTILE)
        )
        took = time.monotonic() - began
        after = await asyncio.gather(
            *(math(rf"\boxed{{{n}\sqrt{{2}}}}", rf"\sqrt{{{2 * n * n}}}", pool) for n in (3, 4, 5))
        )
        await pool.close()
        return hostile, after, took

    hostile, after, took = asyncio.run(judge())
    assert hostile == [0] * len(HOSTILE)
    assert after == [1, 1, 1]
    assert took < 60


def test_workers_start_when_needed_and_are_used_again():
    async def judge():
        pool = Pool(4, timeout=10.0)
        assert await math(r"\boxed{72}", "72", pool) == 1
        assert pool.workers() == []
        for n in (2, 3, 4):
            assert await math(rf"\boxed{{{n}\sqrt{{3}}}}", rf"\sqrt{{{3 * n * n}}}", pool) == 1
        [worker] = pool.workers()
        await pool.close()
        return worker

    worker = asyncio.run(judge())
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_a_worker_that_dies_is_replaced():
    async def judge():
        pool = Pool(1, timeout=10.0)
        assert await pool.equal(r"\sqrt{8}", r"2\sqrt{2}")
        os.kill(pool.workers()[0], signal.SIGKILL)
        first = await pool.equal(r"\sqrt{12}", r"2\sqrt{3}")  # its worker is gone: not judged right
        second = await pool.equal(r"\sqrt{27}", r"3\sqrt{3}")
        await pool.close()
        return first, second, pool.crashed

    assert asyncio.run(judge()) == (False, True, 1)


def test_a_cancelled_question_does_not_answer_the_next():
    async def judge():
        pool = Pool(1, timeout=60.0)
        await pool.equal("1", "2")
        asked = asyncio.create_task(pool.equal("9^{9^{9^{9}}}", r"\sqrt{2}"))
        await asyncio.sleep(0.05)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        right = await pool.equal(r"\sqrt{8}", r"2\sqrt{2}")
        await pool.close()
        return right

    assert asyncio.run(judge())
