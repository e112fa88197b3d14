"""Code in the sandbox: it runs as Python does, and nothing of it gets out."""

import asyncio
import os
import signal
import subprocess
import sys

import psutil
import pytest

from spmd_rl.sandbox import Limits, Sandbox, SandboxUnavailable
from tools.check_sandbox import ATTACKS, attack

SHORT = Limits(wall_seconds=1, cpu_seconds=1)


@pytest.fixture(scope="module", params=["namespaces", "filters"])
def confined(request):
    """A function that runs a coroutine function with a sandbox of either kind."""
    loop = asyncio.new_event_loop()
    sandbox = Sandbox(at_once=4, way=request.param)

    def run(function, *args, **kwargs):
        return loop.run_until_complete(function(sandbox, *args, **kwargs))

    try:
        run(Sandbox.run, "pass")
    except SandboxUnavailable as error:
        pytest.skip(str(error))  # such as namespaces in a container: the other way is tested
    yield run
    run(Sandbox.close)
    loop.close()


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_contained(confined, name):
    result, faults = confined(attack, name, SHORT)
    assert not faults, (faults, result)
    assert result.seconds < 20  # 1 to 2 s on a quiet machine


@pytest.mark.parametrize(
    ("code", "stdin", "stdout", "reason"),
    [
        ("print(6 * 7)", "", "42\n", "finished"),
        ("print(int(input()) + int(input()))", "1\n2\n", "3\n", "finished"),
        ("import sys; print(len(sys.stdin.read()))", "é" * 100_000, "100000\n", "finished"),
        ("print('a'); raise SystemExit(3)", "", "a\n", "exit status 3"),
        ("print('a'); raise SystemExit('no')", "", "a\n", "exit status 1"),
        ("print('a'); undefined", "", "a\n", "exit status 1"),
        ("if __name__ == '__main__': print(__file__)", "", "main.py\n", "finished"),
        ("import numpy; print(numpy.arange(3))", "", "[0 1 2]\n", "finished"),
        ("open('f', 'w').write('x'); print(open('f').read())", "", "x\n", "finished"),
        ("import tempfile; print(tempfile.TemporaryFile().write(b'x'))", "", "1\n", "finished"),
        ("import threading as t; t.Thread(target=print, args=('b',)).start()", "", "b\n",
         "finished"),
        ("import atexit; atexit.register(print, 'c')", "", "c\n", "finished"),
        ("print('\\ud83d')", "", "\\ud83d\n", "finished"),
        ("def f(:", "", "", "exit status 1"),
        ("\0", "", "", "exit status 1"),
        ("import os; os.environ.pop('PATH'); print(len(os.environ) < 10)", "", "True\n",
         "finished"),
    ],
)  # fmt: skip
def test_code_runs_as_in_python(confined, code, stdin, stdout, reason):
    result = confined(Sandbox.run, code, stdin)
    assert (result.stdout, result.reason) == (stdout, reason), result
    assert result.ok == (reason == "finished")


def test_a_fault_names_its_line(confined):
    result = confined(Sandbox.run, "x = 1\nprint(x / 0)\n")
    assert 'File "main.py", line 2, in <module>\n    print(x / 0)' in result.stderr
    assert result.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert "spmd_rl" not in result.stderr


def test_what_was_printed_before_the_limit_is_there(confined):
    result = confined(Sandbox.run, "print('so far', flush=True)\nwhile True: pass", limits=SHORT)
    assert result.stdout == "so far\n"


def test_runs_know_nothing_of_each_other(confined):
    async def both(sandbox):
        await sandbox.run("open('left', 'w').write('x'); import json; json.left = 1")
        return await sandbox.run("import os, json; print(os.listdir(), hasattr(json, 'left'))")

    assert confined(both).stdout in ("[] False\n", "['main.py'] False\n")


def test_many_at_once(confined):
    async def many(sandbox):
        return await asyncio.gather(*(sandbox.run(f"print({n})") for n in range(100)))

    assert [result.stdout for result in confined(many)] == [f"{n}\n" for n in range(100)]


def runs_of(launcher):
    return psutil.Process(launcher).children(recursive=True)


async def begun(sandbox):
    """A task whose code has started."""
    task = asyncio.create_task(
        sandbox.run("import time; time.sleep(1000)", limits=Limits(wall_seconds=1000))
    )
    while not (sandbox.launcher_pid and runs_of(sandbox.launcher_pid)):
        await asyncio.sleep(0.01)
    return task


def test_a_cancelled_run_ends(confined):
    async def cancelled(sandbox):
        task = await begun(sandbox)
        processes = runs_of(sandbox.launcher_pid)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return await asyncio.to_thread(psutil.wait_procs, processes, 30)

    assert not confined(cancelled)[1]


def test_a_killed_launcher_is_replaced(confined):
    async def killed(sandbox):
        os.kill(sandbox.launcher_pid, signal.SIGKILL)
        return await sandbox.run("print(1)")

    assert confined(killed).stdout == "1\n"


CALLER = """
import asyncio
from spmd_rl.sandbox import Limits, Sandbox
async def main():
    sandbox = Sandbox()
    await sandbox.run("pass")
    print(sandbox.launcher_pid, flush=True)
    await sandbox.run("import time; time.sleep(1000)", limits=Limits(wall_seconds=1000))
asyncio.run(main())
"""


def test_all_end_with_their_caller():
    caller = subprocess.Popen([sys.executable, "-c", CALLER], stdout=subprocess.PIPE, text=True)
    assert caller.stdout
    with caller:
        launcher = psutil.Process(int(caller.stdout.readline()))
        while len(processes := launcher.children(recursive=True)) < 2:
            pass
        caller.kill()
    assert not psutil.wait_procs([launcher, *processes], 30)[1]


def test_where_nothing_can_be_confined_nothing_runs():
    async def refused():
        sandbox = Sandbox(way="no such way")
        with pytest.raises(SandboxUnavailable, match="code cannot be confined on this machine"):
            await sandbox.run("print(1)")

    asyncio.run(refused())
