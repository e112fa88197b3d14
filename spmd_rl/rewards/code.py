"""rm_type `code`: the last block of Python passes its tests, run in the sandbox: 1.0, else 0.0.

The tests stand in the label (an object, a list, or the JSON of either) or in the metadata, spelled
as the common sets have them: HumanEval's `test` and `entry_point`; MBPP's `test_list`; the `inputs`
and `outputs` of APPS, TACO and verl, with `fn_name` for a function's arguments; LiveCodeBench's
list of `{"input", "output", "testtype"}`. With `"continuous": true` (verl's word) the reward is the
share of tests passed.
"""

from __future__ import annotations

import ast
import json
import math
import re
import secrets
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

from spmd_rl.sandbox import Limits, Sandbox

# Runs beside the answer, in one process with it, and tells how the tests went only at their end, in
# a line that begins with a word the answer was not given. The answer's own prints go nowhere.
HARNESS = """
import io, json, os, sys, types

def main():
    given = json.loads(sys.stdin.read())
    sys.stdin, real, sys.stdout = io.StringIO(), os.dup(1), open(os.devnull, "w")
    answer = sys.modules["answer"] = types.ModuleType("answer")
    exec(compile(given["code"], "answer.py", "exec"), answer.__dict__)
    passed, results = 0, []
    for check in given["checks"]:
        try:
            exec(compile(check, "test.py", "exec"), answer.__dict__)
            passed += 1
        except BaseException as error:
            print(repr(error)[:1000], file=sys.stderr)
    if given["calls"]:
        name = given["function"]
        function = getattr(answer, name, None) or getattr(answer.Solution(), name)
    for arguments in given["calls"]:
        try:
            results.append([function(*arguments)])
        except BaseException as error:
            print(repr(error)[:1000], file=sys.stderr)
            results.append([])
    told = json.dumps([passed, results], default=repr)
    with open(real, "w") as file:
        file.write(chr(10) + given["word"] + told)

main()
"""
_FENCE = re.compile(r"[ \t]*(`{3,})[ \t]*(\w*)")
PYTHON = ("python", "python3", "py", "")


@dataclass
class Tests:
    checks: list[str] = field(default_factory=list)  # statements that raise for a wrong answer
    programs: list[tuple[str, str]] = field(default_factory=list)  # standard input, output
    calls: list[tuple[list[Any], Any]] = field(default_factory=list)  # arguments, result
    function: str = ""  # that is called
    head: str = ""  # what the answer may rest on: HumanEval's prompt
    continuous: bool = False

    def __len__(self) -> int:
        return len(self.checks) + len(self.programs) + len(self.calls)


async def code(
    response: str, label: Any, metadata: dict[str, Any], sandbox: Sandbox, timeout: float
) -> float:
    """`timeout`: seconds for each run; ValueError where the data holds no tests."""
    tests = read_tests(label, metadata)
    answer = last_block(response)
    if answer is None:
        return 0.0
    limits = Limits(wall_seconds=timeout, cpu_seconds=math.ceil(timeout))
    passed = 0
    if tests.checks or tests.calls:
        passed += await _in_process(answer, tests, sandbox, limits)
    for given, wanted in tests.programs:
        result = await sandbox.run(answer, given, limits)
        right = result.ok and same_output(result.stdout, wanted)
        passed += right
        # The others would take as long.
        if not right and (not tests.continuous or result.seconds >= timeout):
            break
    return passed / len(tests) if tests.continuous else float(passed == len(tests))


async def _in_process(answer: str, tests: Tests, sandbox: Sandbox, limits: Limits) -> int:
    word = secrets.token_hex(16)
    given = {
        "code": with_head(answer, tests.head, tests.function),
        "checks": tests.checks,
        "calls": [arguments for arguments, _ in tests.calls],
        "function": tests.function,
        "word": word,
    }
    result = await sandbox.run(HARNESS, json.dumps(given), limits)
    told = result.stdout.rsplit("\n", 1)[-1]
    if not told.startswith(word):
        return 0
    passed, results = json.loads(told[len(word) :])
    if len(results) != len(tests.calls):
        return 0
    for found, (_, wanted) in zip(results, tests.calls, strict=True):
        # APPS wraps some results in a list of one.
        passed += found == [wanted] or (isinstance(wanted, list) and found == wanted)
    return passed


def last_block(response: str) -> str | None:
    """The last fenced block marked as Python, else the last with no mark; None: there is none."""
    text = response.rsplit("</think>", 1)[-1]
    found: dict[str, str] = {}
    fence = mark = ""
    lines: list[str] = []
    for line in text.split("\n"):
        match = _FENCE.match(line)
        if not match:
            lines.append(line)
        elif not fence:
            fence, mark = match[1], match[2].lower()
            lines = []
        elif line.strip() == fence:
            found[mark] = "\n".join(lines)
            fence = ""
        else:
            lines.append(line)
    return next((found[mark] for mark in PYTHON if mark in found), None)


def with_head(answer: str, head: str, function: str) -> str:
    """The answer after what it may rest on; one that only goes on from there is joined to it."""
    if not head:
        return answer
    name = re.escape(function)
    if name and not re.search(rf"(?m)\bdef[ \t]+{name}\b|^{name}[ \t]*=", answer):
        return head + answer
    try:
        ast.parse(head)
    except (SyntaxError, ValueError):
        return answer
    return f"{head}\n{answer}"


def read_tests(label: Any, metadata: dict[str, Any]) -> Tests:
    """The tests in a row of data; ValueError where there are none."""
    given = dict(metadata)
    told = _parsed(label)
    if isinstance(told, dict):
        given.update(told)
    elif isinstance(told, list):
        given["cases" if told and isinstance(told[0], dict) else "test_list"] = told
    tests = Tests(continuous=bool(given.get("continuous")))
    tests.head = given.get("prompt") or given.get("starter_code") or ""
    if given.get("test") and given.get("entry_point"):
        tests.function = given["entry_point"]
        tests.checks = [f"{given['test']}\ncheck({tests.function})"]
    elif given.get("test_list"):
        setup = "\n".join([given.get("test_setup_code") or "", *given.get("test_imports", [])])
        tests.checks = [f"{setup}\n{check}" for check in given["test_list"]]
    elif given.get("inputs") and given.get("outputs"):
        pairs = list(zip(given["inputs"], given["outputs"], strict=True))
        _cases(tests, pairs, given.get("fn_name"))
    elif cases := _parsed(given.get("cases") or given.get("test_cases")):
        name = given.get("fn_name") or given.get("func_name")
        functional = cases[0].get("testtype") == "functional"
        pairs = [(case["input"], case["output"]) for case in cases]
        _cases(tests, pairs, name if functional or "testtype" not in cases[0] else None)
    if not len(tests):
        raise ValueError(
            "rm_type code needs tests in data.label_key's column or data.metadata_key's: test and "
            "entry_point, test_list, or inputs and outputs (docs/customization.md)"
        )
    return tests


def _cases(tests: Tests, pairs: list[tuple[Any, Any]], name: str | None) -> None:
    if not name:
        tests.programs = [(_lines(given), _lines(wanted)) for given, wanted in pairs]
        return
    tests.function = name
    for given, wanted in pairs:
        if isinstance(given, str):  # LiveCodeBench: the JSON of an argument in each line
            given = [json.loads(line) for line in given.split("\n") if line.strip()]
            wanted = json.loads(wanted)
        tests.calls.append((given, wanted))


def _lines(text: Any) -> str:
    return "\n".join(map(str, text)) if isinstance(text, list) else str(text)


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return None


def same_output(printed: str, wanted: str) -> bool:
    """Line by line without the spaces around; or the same words, and numbers of the same value."""
    ours, theirs = ([line.strip() for line in t.strip().split("\n")] for t in (printed, wanted))
    if len(ours) != len(theirs):
        return False
    return all(
        mine == other or _same_words(mine.split(), other.split())
        for mine, other in zip(ours, theirs, strict=True)
    )


def _same_words(ours: list[str], theirs: list[str]) -> bool:
    return len(ours) == len(theirs) and all(
        mine == other or _same_number(mine, other) for mine, other in zip(ours, theirs, strict=True)
    )


def _same_number(one: str, other: str) -> bool:
    try:
        return Decimal(one) == Decimal(other)
    except InvalidOperation:
        return False
