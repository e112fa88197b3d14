#!/usr/bin/env python3
"""Make the quickstart's data: two-digit addition and subtraction with worked columns.

Out: sft.jsonl (demonstrations of a sloppy teacher, who usually forgets the carry), train.jsonl and
eval.jsonl (question and right answer). With --chat-rows also conversations of several questions:
chat.jsonl, whose every answer is a careful teacher's, and chat-eval.jsonl, whose last one is to be
given. Whether a problem is held out for the eval files depends on the problem alone, so no seed
lets it leak into the others. Python's standard library only.
"""

from __future__ import annotations

import argparse
import json
import random
import zlib
from pathlib import Path
from typing import NamedTuple

LOWEST, HIGHEST = 10, 99
EASY = 0.5  # chance to keep a problem without carry or borrow
FORGET = 0.75  # chance that the teacher drops a carry or borrow that is due
SLIP = 0.15  # chance that the teacher misjudges a column by one or two
TURNS = 3  # questions of a conversation


class Problem(NamedTuple):
    op: str
    x: int
    y: int

    @property
    def question(self) -> str:
        return f"What is {self.x}{self.op}{self.y}?"

    @property
    def answer(self) -> str:
        return str(self.x + self.y if self.op == "+" else self.x - self.y)

    @property
    def carries(self) -> bool:
        """Whether the units need a carry or a borrow."""
        x, y = self.x % 10, self.y % 10
        return x + y > 9 if self.op == "+" else x < y

    @property
    def held_out(self) -> bool:
        # A hash linear in the digits would hold out whole digit pairs; crc32 of the text does not.
        return zlib.crc32(f"{self.x}{self.op}{self.y}".encode()) % 10 == 0


def draw(rng: random.Random, held_out: bool) -> Problem:
    while True:
        op, x, y = rng.choice("+-"), rng.randint(LOWEST, HIGHEST), rng.randint(LOWEST, HIGHEST)
        problem = Problem(op, max(x, y), min(x, y)) if op == "-" else Problem(op, x, y)
        if problem.held_out == held_out and (problem.carries or rng.random() < EASY):
            return problem


def demonstrate(rng: random.Random, problem: Problem, forget: float, slip: float) -> str:
    """The worked columns, units first, then the answer. Errors go on into the answer."""
    column = _add_column if problem.op == "+" else _subtract_column
    steps, value, carry = [], 0, 0
    for place in (1, 10):
        if carry and rng.random() < forget:
            carry = 0
        error = rng.choice([-2, -1, 1, 2]) if rng.random() < slip else 0
        x, y = problem.x // place % 10, problem.y // place % 10
        step, digit, carry = column(x, y, carry, error, last=place == 10)
        steps.append(step)
        value += digit * place
    return f"<think>{' '.join(steps)}</think>{value}"


def _add_column(x: int, y: int, carry: int, error: int, last: bool) -> tuple[str, int, int]:
    total = max(0, x + y + carry + error)
    return f"{x}+{y}{'+1' if carry else ''}={total}", total if last else total % 10, int(total > 9)


def _subtract_column(x: int, y: int, carry: int, error: int, last: bool) -> tuple[str, int, int]:
    borrow = int(x - y - carry < 0 and not last)
    digit = min(9, max(0, x - y - carry + 10 * borrow + error))
    return f"{x + 10 * borrow}-{y}{'-1' if carry else ''}={digit}", digit, borrow


def make_arithmetic(
    directory: str | Path,
    *,
    sft_rows: int = 38_400,
    train_rows: int = 4_096,
    eval_rows: int = 512,
    chat_rows: int = 0,
    forget: float = FORGET,
    slip: float = SLIP,
    seed: int = 0,
) -> Path:
    """Write the files into `directory` and return it."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(1000 + seed)
    taught = [draw(rng, held_out=False) for _ in range(sft_rows)]
    demonstrations = [(p, demonstrate(rng, p, forget, slip)) for p in taught]
    _write(directory / "sft.jsonl", ((p.question, text) for p, text in demonstrations))
    trained = [draw(rng, held_out=False) for _ in range(train_rows)]
    _write(directory / "train.jsonl", ((p.question, p.answer) for p in trained))
    evaluated = random.Random(7)  # the same questions for every seed, so that runs compare
    held_out = [draw(evaluated, held_out=True) for _ in range(eval_rows)]
    _write(directory / "eval.jsonl", ((p.question, p.answer) for p in held_out))
    if chat_rows:
        talks = [converse(rng, held_out=False) for _ in range(chat_rows)]
        shown = ((said, demonstrate(rng, last, 0, 0)) for said, last in talks)
        _write(directory / "chat.jsonl", shown)
        asked = [converse(evaluated, held_out=True) for _ in range(eval_rows)]
        _write(directory / "chat-eval.jsonl", ((said, last.answer) for said, last in asked))
    return directory


def converse(rng: random.Random, held_out: bool) -> tuple[list[dict[str, str]], Problem]:
    """Chat messages up to the last question, the earlier ones answered rightly; its problem."""
    *before, last = [draw(rng, held_out) for _ in range(TURNS)]
    messages = []
    for problem in before:
        messages.append({"role": "user", "content": problem.question})
        messages.append({"role": "assistant", "content": demonstrate(rng, problem, 0, 0)})
    return [*messages, {"role": "user", "content": last.question}], last


def _write(path: Path, rows) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for prompt, label in rows:
            file.write(json.dumps({"prompt": prompt, "label": label}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--sft-rows", type=int, default=38_400)
    parser.add_argument("--train-rows", type=int, default=4_096)
    parser.add_argument("--eval-rows", type=int, default=512)
    parser.add_argument("--chat-rows", type=int, default=0, help="conversations to learn from")
    parser.add_argument("--forget", type=float, default=FORGET, help="teacher drops a due carry")
    parser.add_argument("--slip", type=float, default=SLIP, help="teacher misjudges a column")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    print(f"made {make_arithmetic(options.pop('directory'), **options)}")


if __name__ == "__main__":
    main()
