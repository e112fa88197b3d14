"""What the reward pool withstands, and how fast it is.

    python tools/bench_rewards.py hostile [--count 10000]     answers made to stall it
    python tools/bench_rewards.py speed DATA/math_eval        against math-verify in one process

`hostile` prints the time, how many ran out of time or crashed their process, and whether the pool
still judges rightly afterwards. `speed` gives every pair of reference answers that takes algebra to
the pool and to one process, in processor time limits alike.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from spmd_rl.rewards import answers  # noqa: E402
from spmd_rl.rewards.math import math  # noqa: E402
from spmd_rl.rewards.pool import Pool  # noqa: E402
from spmd_rl.rewards.score import default_workers  # noqa: E402
from spmd_rl.rewards.worker import equal  # noqa: E402
from tools.check_rewards import cases, reference, rows  # noqa: E402

LABELS = (r"\sqrt{17}", r"\frac{\pi}{2}", "(1,2)", "x^2+1", "204", r"\text{(C)}", "1.6")
UNICODE = "\u202e\u0661\u00bd\u221e\ud83d\ufffe\u0338\U0001d7d8\u2212\uff11"

# Each makes an answer from a source of chance.
HOSTILE: dict[str, Callable[[random.Random], str]] = {
    "tower of powers": lambda r: "^{".join(["9"] * r.randint(4, 30)) + "}" * 29,
    "power of ten": lambda r: f"10^{{10^{{{r.randint(5, 40)}}}}}",
    "product of powers": lambda r: f"({r.randint(2, 9)}x+1)^{{{r.randint(10**4, 10**7)}}}",
    "open parentheses": lambda r: "(" * r.randint(100, 990),
    "closed parentheses": lambda r: "(" * (n := r.randint(50, 490)) + "x" + ")" * n,
    "fraction in fraction": lambda r: r"\frac{1}{" * (n := r.randint(20, 100)) + "2" + "}" * n,
    "root in root": lambda r: r"\sqrt{" * (n := r.randint(20, 140)) + "2" + "}" * n,
    "unbalanced": lambda r: "".join(r.choice("{}[]()\\$^_&|") for _ in range(r.randint(5, 900))),
    "long sum": lambda r: "+".join(f"x_{{{n}}}" for n in range(r.randint(50, 130))),
    "integral": lambda r: rf"\int_0^1 \sin(\sin(\cos(x^{{{r.randint(3, 99)}}}))) dx",
    "long series": lambda r: rf"\sum_{{n=1}}^{{{10 ** r.randint(4, 12)}}} n^n",
    "factorials": lambda r: f"{r.randint(1000, 10**6)}" + "!" * r.randint(1, 5),
    "binomial": lambda r: rf"\binom{{{10 ** r.randint(5, 9)}}}{{{10 ** r.randint(4, 8)}}}",
    "matrix": lambda r: r"\begin{pmatrix}" + "1 & " * r.randint(50, 200) + r"\end{pmatrix}",
    "big set": lambda r: r"\{" + ",".join(f"\\sqrt{{{n}}}" for n in range(80)) + r"\}",
    "interval of powers": lambda r: rf"(-\infty, {r.randint(2, 9)}^{{{10 ** r.randint(4, 9)}}}]",
    "many digits": lambda r: "7" * r.randint(1000, 6000),
    "a megabyte": lambda r: r.choice(("x", "{", "\\frac", "1,", " ", "\\text{", "$=")) * 150_000,
    "boxes": lambda r: r"\boxed{" * r.randint(100, 5000),
    "commas": lambda r: "1," * r.randint(100, 490) + "1",
    "signs": lambda r: "-" * r.randint(100, 990) + "1",
    "spaces": lambda r: "1" + " " * r.randint(100, 990) + "/" + " " * 5 + "2",
    "percent and units": lambda r: r"\% \text{ cm}^2" * r.randint(5, 60),
    "unicode": lambda r: "".join(r.choice(UNICODE) for _ in range(r.randint(1, 300))),
    "Python": lambda r: "__import__('os').kill(__import__('os').getppid(), 9)",
    "no bytes": lambda r: "\x00\r\v\f\x1b" * r.randint(1, 50),
    "absolute values": lambda r: "|x-1|+" * r.randint(5, 60) + "1",
    "equations": lambda r: "x=" * r.randint(5, 300) + "1",
    "inequalities": lambda r: "1<" * r.randint(3, 200) + "x",
    "logarithms": lambda r: r"\log_{2}{" * (n := r.randint(10, 60)) + "x" + "}" * n,
}  # fmt: skip


def hostile_answers(count: int, seed: int = 1) -> list[tuple[str, str]]:
    """Pairs of answer and label, all kinds in turn."""
    chance = random.Random(seed)
    kinds = list(HOSTILE.values())
    return [(kinds[n % len(kinds)](chance), chance.choice(LABELS)) for n in range(count)]


STRAIGHT = 20  # one in so many goes to the pool without the look that spares it most of them


async def judge(pool: Pool, number: int, answer: str, label: str) -> int:
    if number % STRAIGHT == 0:
        return int(await pool.equal(answer[:2000], label))
    return await math(f"\\boxed{{{answer}}}", label, pool)


async def withstand(count: int, workers: int, timeout: float) -> tuple[Pool, float, int, bool]:
    """The pool afterwards, seconds, how many were accepted, and whether it judges rightly still."""
    pool = Pool(workers, timeout)
    began = time.monotonic()
    rewards = await asyncio.gather(
        *(judge(pool, n, *pair) for n, pair in enumerate(hostile_answers(count)))
    )
    took = time.monotonic() - began
    after = [
        await pool.equal(rf"{n}\sqrt{{2}}", rf"\sqrt{{{2 * n * n + extra}}}")
        for n in range(3, 8)
        for extra in (0, 1)
    ]
    await pool.close()
    return pool, took, sum(rewards), after == [True, False] * 5


def hostile(count: int, workers: int, timeout: float) -> None:
    pool, took, accepted, right = asyncio.run(withstand(count, workers, timeout))
    print(f"{count} hostile answers of {len(HOSTILE)} kinds in {took:.0f} s, {workers} workers")
    print(f"  ran into the limit of {timeout:g} s: {pool.overtime}; crashed: {pool.crashed}")
    print(f"  accepted: {accepted}; judged rightly afterwards: {'yes' if right else 'NO'}")


def speed(folder: Path, workers: int, most: int) -> None:
    pairs = []
    for table in rows(folder).values():
        golds = [gold for gold in map(reference, table) if gold]
        pairs += [(a, gold) for gold, a, _ in cases(golds) if answers.same(a, gold) is None]
    random.Random(1).shuffle(pairs)
    pairs = list(dict.fromkeys(pairs))[:most]
    equal(*pairs[0])  # imported
    began = time.monotonic()
    alone = [equal(answer, gold) for answer, gold in pairs]
    one = len(pairs) / (time.monotonic() - began)

    async def together() -> float:
        pool = Pool(workers, 10.0)
        await asyncio.gather(*(pool.equal("a", rf"\sqrt{{{n}}}") for n in range(workers)))
        start = time.monotonic()
        found = await asyncio.gather(*(pool.equal(answer, gold) for answer, gold in pairs))
        took = time.monotonic() - start
        await pool.close()
        assert found == alone
        return len(pairs) / took

    many = asyncio.run(together())
    print(f"{len(pairs)} pairs that take algebra: {one:.0f}/s in one process, {many:.0f}/s by")
    print(f"{workers} workers: {many / one / workers:.2f} x workers x one process")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Hostile answers, and the speed of the pool")
    parser.add_argument("what", choices=("hostile", "speed"))
    parser.add_argument("data", type=Path, nargs="?", help="speed: folder of .jsonl files")
    parser.add_argument("--count", type=int, default=10_000, help="answers, or pairs at most")
    parser.add_argument("--workers", type=int, default=default_workers())
    parser.add_argument("--timeout", type=float, default=1.0, help="processor seconds an answer")
    given = parser.parse_args()
    print(f"{os.cpu_count()} cores")
    if given.what == "hostile":
        hostile(given.count, given.workers, given.timeout)
    else:
        if given.data is None:
            parser.error("speed needs DATA, a folder of .jsonl files with label or solution")
        speed(given.data, given.workers, given.count)
