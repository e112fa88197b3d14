"""The quickstart's data: labels are right, the split never leaks, the teacher is sloppy."""

import asyncio
import json
import random
import re
import time

from examples.arithmetic.reward import FORMAT, score
from spmd_rl.types import Sample, Status
from tools.make_arithmetic import Problem, demonstrate, draw, make_arithmetic


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def right_answer(question: str) -> str:
    x, op, y = re.fullmatch(r"What is (\d\d)([+-])(\d\d)\?", question).groups()
    return str(int(x) + int(y) if op == "+" else int(x) - int(y))


def test_sizes_labels_and_disjoint_split(tmp_path):
    began = time.monotonic()
    made = make_arithmetic(tmp_path)
    assert time.monotonic() - began < 3
    sft, train, held_out = (rows(made / f"{n}.jsonl") for n in ("sft", "train", "eval"))
    assert (len(sft), len(train), len(held_out)) == (38_400, 4_096, 512)
    assert all(row["label"] == right_answer(row["prompt"]) for row in train + held_out)
    seen = {row["prompt"] for row in sft + train}
    assert not seen & {row["prompt"] for row in held_out}
    other = make_arithmetic(tmp_path / "other", seed=1, sft_rows=2_000)
    assert not {row["prompt"] for row in held_out} & {
        r["prompt"] for r in rows(other / "sft.jsonl")
    }
    assert (other / "eval.jsonl").read_bytes() == (made / "eval.jsonl").read_bytes()
    assert (other / "train.jsonl").read_bytes() != (made / "train.jsonl").read_bytes()
    right = sum(FORMAT.fullmatch(r["label"])[1] == right_answer(r["prompt"]) for r in sft)
    assert 0.35 < right / len(sft) < 0.5  # a weak start that RL can mend


def test_same_seed_same_bytes(tmp_path):
    first = make_arithmetic(tmp_path / "a", sft_rows=100, train_rows=50)
    second = make_arithmetic(tmp_path / "b", sft_rows=100, train_rows=50)
    for name in ("sft", "train", "eval"):
        assert (first / f"{name}.jsonl").read_bytes() == (second / f"{name}.jsonl").read_bytes()


def test_careful_teacher_is_right():
    rng = random.Random(3)
    assert demonstrate(rng, Problem("-", 60, 29), 0, 0) == "<think>10-9=1 6-2-1=3</think>31"
    assert demonstrate(rng, Problem("-", 60, 29), 1, 0) == "<think>10-9=1 6-2=4</think>41"
    assert demonstrate(rng, Problem("+", 58, 67), 0, 0) == "<think>8+7=15 5+6+1=12</think>125"
    for _ in range(500):
        problem = draw(rng, held_out=False)
        assert FORMAT.fullmatch(demonstrate(rng, problem, 0, 0))[1] == problem.answer


def reward_of(response: str, status: Status = Status.COMPLETED) -> float:
    sample = Sample(response=response, label="31", status=status)
    return asyncio.run(score(None, sample))


def test_reward_wants_format_number_and_end():
    assert reward_of("<think>10-9=1 6-2-1=3</think>31") == 1.0
    assert reward_of("<think>anything</think> 31\n") == 1.0
    assert reward_of("<think>10-9=1</think>31", Status.TRUNCATED) == 0.0
    assert reward_of("<think>10-9=1</think>41") == 0.0
    assert reward_of("31") == 0.0
    assert reward_of("<think>a</think>31<think>b</think>31") == 0.0
    assert reward_of("<think>a</think>31 of course") == 0.0
