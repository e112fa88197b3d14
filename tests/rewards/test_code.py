"""rm_type `code`: answers that are right, wrong, or try to pass without being right."""

import asyncio
import json

import pytest

from spmd_rl.rewards.code import code, last_block, read_tests, same_output
from spmd_rl.sandbox import Sandbox


@pytest.fixture(scope="module")
def judge():
    loop, sandbox = asyncio.new_event_loop(), Sandbox(at_once=2)

    def judged(answer, label=None, metadata=None, timeout=5.0):
        response = f"I think:\n```python\n{answer}\n```\nDone."
        return loop.run_until_complete(code(response, label, metadata or {}, sandbox, timeout))

    yield judged
    loop.run_until_complete(sandbox.close())
    loop.close()


HEAD = 'import math\n\n\ndef half(n):\n    return n / 2\n\n\ndef area(r):\n    """Of a circle."""\n'
HUMANEVAL = {
    "prompt": HEAD,
    "entry_point": "area",
    "test": "def check(candidate):\n    assert candidate(2) == math.pi * 4\n"
    "    assert half(candidate(1)) == math.pi / 2\n",
}


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("def area(r):\n    return math.pi * r * r", 1.0),  # its import stands in the prompt
        ("    return math.pi * r ** 2", 1.0),  # goes on from the prompt
        ("area = lambda r: math.pi * r * r", 1.0),
        ("def area(r):\n    print('x' * 5000000)\n    return math.pi * r * r", 1.0),
        ("def area(r):\n    return 3.14 * r * r", 0.0),
        ("def area(r):\n    return math.pi * r * r if r == 2 else 0", 0.0),
        ("def area(r): pass", 0.0),
        ("def area(r", 0.0),
        ("", 0.0),
        ("import os; os._exit(0)", 0.0),
        ("raise SystemExit(0)", 0.0),
        ("def area(r): raise SystemExit(0)", 0.0),
        ("def check(candidate): pass\ndef area(r): pass", 0.0),
        ("print('[1, []]')\nimport os; os.write(1, b'\\n[1, []]'); os._exit(0)", 0.0),
    ],
)
def test_a_function_and_its_check(judge, answer, reward):
    assert judge(answer, None, HUMANEVAL) == reward
    assert judge(answer, json.dumps(HUMANEVAL)) == reward


def test_an_answer_that_never_ends_costs_its_limit(judge):
    assert judge("while True: pass", None, HUMANEVAL, timeout=0.5) == 0.0
    assert (
        judge("while True: pass", {"inputs": ["1"] * 50, "outputs": ["1"] * 50}, timeout=0.5) == 0
    )


SUM = "print(sum(map(int, open(0).read().split())))"


def test_standard_input_and_output(judge):
    label = {"inputs": ["1 2\n", "3\n4\n"], "outputs": ["3\n", "7"]}
    assert judge(SUM, label) == 1.0
    assert judge(SUM, json.dumps(label)) == 1.0
    assert judge("print(3)", label) == 0.0
    assert judge("print(3)", label | {"continuous": True}) == 0.5
    assert judge(SUM + "; raise ValueError", label) == 0.0
    cases = [{"input": "1 2", "output": "3", "testtype": "stdin"}]
    assert judge(SUM, cases) == 1.0 and judge(SUM.replace("sum", "max"), cases) == 0.0


def test_functions_of_arguments(judge):
    apps = {"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [[3], [7]]}
    assert judge("def add(a, b): return a + b", apps) == 1.0
    assert judge("class Solution:\n    def add(self, a, b): return a + b", apps) == 1.0
    assert judge("def add(a, b): return 3", apps | {"continuous": True}) == 0.5
    assert judge("def add(a, b): return object()", apps) == 0.0
    assert judge("def plus(a, b): return a + b", apps) == 0.0
    cases = [{"input": "[1, 2]\n3", "output": "[1, 2, 3]", "testtype": "functional"}]
    given = {"func_name": "put"}
    assert judge("def put(a, b): return (*a, b)", cases, given) == 1.0
    assert judge("def put(a, b): return a", cases, given) == 0.0


def test_lists_of_assertions(judge):
    tests = ["assert two() == 2", "assert two() > 1", "assert two() == 3"]
    assert judge("def two(): return 2", tests) == 0.0
    assert judge("def two(): return 2", tests[:2]) == 1.0
    assert judge("def two(): return 2", None, {"test_list": tests, "continuous": True}) == 2 / 3


def test_a_row_without_tests_is_a_fault():
    for label, metadata in ((None, {}), ("72", {}), ("[]", {}), ({}, {"entry_point": "f"})):
        with pytest.raises(ValueError, match="rm_type code needs tests in data.label_key"):
            read_tests(label, metadata)


@pytest.mark.parametrize(
    ("response", "block"),
    [
        ("```python\na\n```\n```python\nb\n```", "b"),
        ("```py\na\n```\noutput:\n```\nb\n```", "a"),
        ("```\na\n```", "a"),
        ("  ```python\n  a\n  ```", "  a"),
        ("```python\na\n```\n```bash\nls\n```", "a"),
        ("```python\na = '''\n````\n'''\n```", "a = '''\n````\n'''"),
        ("<think>```python\na\n```</think> no", None),
        ("```python\ncut off", None),
        ("def f(): pass", None),
    ],
)
def test_the_last_block(response, block):
    assert last_block(response) == block


@pytest.mark.parametrize(
    ("printed", "wanted", "same"),
    [
        ("1 2\n", "1 2", True),
        (" 1  2 \n3\n\n", "1 2\n3", True),
        ("1.0", "1", True),
        ("0.10", "0.1", True),
        ("1\n2", "1 2", False),
        ("yes", "Yes", False),
        ("1.01", "1", False),
        ("", "1", False),
        ("nan", "nan", True),
    ],
)
def test_same_output(printed, wanted, same):
    assert same_output(printed, wanted) is same
