"""How often the rewards err: tables of false accepts and false rejects.

    python tools/check_rewards.py math DATA/math_eval   ours beside math-verify's own
    python tools/check_rewards.py code DATA/humaneval   right and wrong solutions, in the sandbox

`math`: every reference answer of the .jsonl files (`label`, or the last box of `solution`), as it
is, spelled otherwise, and changed so that it is wrong. `code`: HumanEval's rows. `--show` prints
each error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from spmd_rl.rewards import answers  # noqa: E402
from spmd_rl.rewards.code import code  # noqa: E402
from spmd_rl.rewards.math import math  # noqa: E402
from spmd_rl.rewards.pool import Pool  # noqa: E402
from spmd_rl.sandbox import Sandbox  # noqa: E402

EQUAL, WRONG = True, False


def rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise SystemExit(f"there are no .jsonl files in {folder}")
    return {file.stem: [json.loads(line) for line in open(file)] for file in files}


def reference(row: dict[str, Any]) -> str | None:
    return str(row["label"]) if "label" in row else answers.last_boxed(row["solution"])


def spellings(gold: str) -> Iterator[str]:
    """The same answer in other words."""
    yield gold
    for before, after in (
        (r"\frac", r"\dfrac"), (r"\left(", "("), (r"\right)", ")"), (",", ", "), (" ", ""),
        (r"\left", r""), ("-", " -"), (r"\pi", r"{\pi}"), (r"\sqrt{", r"\sqrt {"),
    ):  # fmt: skip
        # A piece less of a pair, or a command that runs into a letter, is another text.
        if before in gold and not (before == " " and re.search(r"\\[a-zA-Z]+ [a-zA-Z]", gold)):
            if before in (r"\left(", r"\right)"):
                yield gold.replace(r"\left(", "(").replace(r"\right)", ")")
            elif before == r"\left":
                yield gold.replace(r"\left", "").replace(r"\right", "")
            else:
                yield gold.replace(before, after)
    if re.fullmatch(r"-?\d+", gold):
        yield f"{gold}.0"
        yield f"x = {gold}"
        yield f"{int(gold):,}"
    if match := re.fullmatch(r"(-?)\\frac\{(\d+)\}\{(\d+)\}", gold):
        yield f"{match[1]}{match[2]}/{match[3]}"
        yield rf"\frac{{{match[1]}{match[2]}}}{{{match[3]}}}"


def mistakes(gold: str, others: list[str]) -> Iterator[str]:
    """Answers that are not the same."""
    digits = list(re.finditer(r"\d+", gold))
    for match in {digits[0], digits[-1]} if digits else ():
        for step in (1, 10):
            changed = str(int(match[0]) + step)
            yield gold[: match.start()] + changed + gold[match.end() :]
    if re.search(r"[1-9]", gold) and re.fullmatch(r"[-\d./\\fracsqrtpi{}]+", gold):
        yield gold[1:] if gold.startswith("-") else f"-{gold}"
    if "+" in gold:
        yield gold.replace("+", "-", 1)
    parts = gold.split(",")
    if len(parts) > 1 and not gold.endswith("000"):
        yield ",".join(parts[:-1]) + (gold[-1] if gold[-1] in ")]}" else "")
    yield from others


def cases(golds: list[str]) -> Iterator[tuple[str, str, bool]]:
    for index, gold in enumerate(golds):
        kin = [golds[(index + step) % len(golds)] for step in (1, 7)]
        others = [o for o in kin if answers.normalize(o) != answers.normalize(gold)]
        others = [o for o in others if not _same_value(o, gold)]
        same = dict.fromkeys(spellings(gold))
        wrong = dict.fromkeys(mistakes(gold, others))
        yield from ((gold, answer, EQUAL) for answer in same)
        yield from ((gold, answer, WRONG) for answer in wrong if answer not in same)


def _same_value(one: str, other: str) -> bool:
    values = [answers.as_number(answers.normalize(text)) for text in (one, other)]
    return values[0] is not None and values[0] == values[1]


def theirs(gold: str, answer: str) -> bool:
    """math-verify as its README uses it."""
    from math_verify import parse, verify

    return bool(verify(parse(f"${gold}$"), parse(f"The answer is $\\boxed{{{answer}}}$.")))


async def compare_math(folder: Path, show: bool, workers: int) -> dict[str, dict[str, Counter]]:
    """Counts for each set and verifier: `right`, `false accept`, `false reject`."""
    pool = Pool(workers, timeout=10.0)
    found: dict[str, dict[str, Counter]] = {}
    for name, table in rows(folder).items():
        golds = [gold for gold in map(reference, table) if gold]
        todo = list(cases(golds))
        ours = await asyncio.gather(*(math(f"\\boxed{{{a}}}", gold, pool) for gold, a, _ in todo))
        counts = found[name] = {"ours": Counter(), "math-verify": Counter()}
        for (gold, answer, truth), mine in zip(todo, ours, strict=True):
            for who, said in (("ours", bool(mine)), ("math-verify", theirs(gold, answer))):
                error = "right" if said == truth else "false reject" if truth else "false accept"
                counts[who][error] += 1
                counts[who]["equal" if truth else "wrong"] += 1
                if show and error != "right":
                    print(f"{who:12} {error:13} {gold!r} <- {answer!r}", flush=True)
    await pool.close()
    return found


def print_math(found: dict[str, dict[str, Counter]]) -> None:
    print("| set | equal | wrong | verifier | false rejects | false accepts |")
    print("|---|---|---|---|---|---|")
    for name, counts in found.items():
        for who, count in counts.items():
            print(
                f"| {name} | {count['equal']} | {count['wrong']} | {who} "
                f"| {count['false reject']} | {count['false accept']} |"
            )


# Wrong whatever the task: NAME is the function's.
WRONG_CODE = {
    "other result": """
def _off(f):
    def other(*a, **k):
        r = f(*a, **k)
        if isinstance(r, bool): return not r
        if isinstance(r, (int, float)): return r + 1
        if isinstance(r, str): return r + 'x'
        if isinstance(r, (list, tuple)): return list(r) + [0]
        return 0
    return other
NAME = _off(NAME)""",
    "right once only": """
def _once(f):
    left = [1]
    return lambda *a, **k: f(*a, **k) if left and (left.pop() or 1) else object()
NAME = _once(NAME)""",
    "no result": "def NAME(*a, **k): pass",
    "raises": "def NAME(*a, **k): raise ValueError",
    "exits early": "import os\ndef NAME(*a, **k): os._exit(0)",
    "ends by SystemExit": "import sys\nsys.exit(0)",
    "replaces the check": "def check(candidate): pass\ndef NAME(*a, **k): pass",
    "does not parse": "def NAME(:",
    "never ends": "while True: pass",
}


async def compare_code(
    folder: Path, show: bool, workers: int, timeout: float = 10.0
) -> dict[str, Counter]:
    """Counts of each kind of answer: `accepted`, `rejected`."""
    sandbox = Sandbox(at_once=workers)
    [table] = rows(folder).values()
    todo = []
    for index, row in enumerate(table):
        name, solution = row["entry_point"], row["prompt"] + row["canonical_solution"]
        kinds = {"solution": solution, "solution alone": row["canonical_solution"]}
        for kind, ending in WRONG_CODE.items():
            if kind != "never ends" or index % 16 == 0:  # each costs its limit
                kinds[kind] = f"{solution}\n{ending.replace('NAME', name)}"
        todo += [(row, kind, text) for kind, text in kinds.items()]
    timed = time.monotonic()
    found: dict[str, Counter] = {}
    rewards = await asyncio.gather(
        *(code(f"```python\n{text}\n```", None, row, sandbox, timeout) for row, _, text in todo)
    )
    for (row, kind, _), reward in zip(todo, rewards, strict=True):
        word = "accepted" if reward == 1 else "rejected"
        found.setdefault(kind, Counter())[word] += 1
        if show and (word == "accepted") != kind.startswith("solution"):
            print(f"{row['task_id']}: {kind} was {word}")
    await sandbox.close()
    print(f"{len(todo)} answers in {time.monotonic() - timed:.1f} s, {sandbox.way}")
    return found


def print_code(found: dict[str, Counter]) -> None:
    print("| answer | accepted | rejected |\n|---|---|---|")
    for kind, count in found.items():
        print(f"| {kind} | {count['accepted']} | {count['rejected']} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="False accepts and false rejects of the rewards")
    parser.add_argument("what", choices=("math", "code"))
    parser.add_argument("data", type=Path, help="folder of .jsonl files")
    parser.add_argument("--show", action="store_true", help="print each error")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    if given.what == "math":
        print_math(asyncio.run(compare_math(given.data, given.show, given.workers)))
    else:
        print_code(asyncio.run(compare_code(given.data, given.show, given.workers)))
