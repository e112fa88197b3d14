"""The confined process: its limits, then the code, as if it were `python main.py`."""

from __future__ import annotations

import atexit
import linecache
import os
import random
import resource
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Callable
from typing import Any, NoReturn

NAME = "main.py"


def run_code(
    code: str,
    folder: str,
    limits: dict[str, Any],
    confine: Callable[[], None],
    packages: list[str],
) -> NoReturn:
    """Never returns: the process ends with the code's exit status, 1 for an exception."""
    status = 70
    try:
        os.setsid()
        os.chdir(folder)
        os.environ.clear()
        # One thread: libraries would start one for each core, and threads count as processes.
        os.environ.update(
            {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"},
            OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MPLBACKEND="Agg",
        )  # fmt: skip
        sys.stdin, sys.stdout, sys.stderr = (_text(n, mode) for n, mode in enumerate("rww"))
        tempfile.tempdir = None  # read TMPDIR again
        main = types.ModuleType("__main__")
        main.__file__ = NAME
        for name in [name for name in sys.modules if name.startswith("spmd_rl")]:
            del sys.modules[name]
        sys.modules["__main__"], sys.argv = main, [NAME]
        sys.path[:] = [folder, *(path for path in sys.path if "python" in path), *packages]
        random.seed()
        _limit(limits)
        confine()
        status = _run(code, main)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _text(descriptor: int, mode: str) -> Any:
    return os.fdopen(descriptor, mode, encoding="utf-8", errors="backslashreplace", closefd=False)


def _limit(limits: dict[str, Any]) -> None:
    cpu, memory = limits["cpu_seconds"], limits["memory_bytes"]
    for what, soft, hard in (
        (resource.RLIMIT_CPU, cpu, cpu + 1),
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_FSIZE, limits["file_bytes"], limits["file_bytes"]),
        (resource.RLIMIT_NPROC, limits["processes"] + 1, limits["processes"] + 1),
        (resource.RLIMIT_NOFILE, 256, 256),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        most = resource.getrlimit(what)[1]
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        resource.setrlimit(what, (soft, hard))


def _run(code: str, main: types.ModuleType) -> int:
    linecache.cache[NAME] = (len(code), None, code.splitlines(keepends=True), NAME)
    status = 0
    try:
        exec(compile(code, NAME, "exec"), main.__dict__)
    except SystemExit as end:
        status = _exit_status(end.code)
    except BaseException as error:
        sys.last_value = error
        trace = error.__traceback__
        traceback.print_exception(type(error), error, trace.tb_next if trace else None)
        status = 1
    try:
        threading._shutdown()  # waits for threads that are not daemons, as the interpreter does
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        status = status or 1
    return status


def _exit_status(code: object) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    print(code, file=sys.stderr)
    return 1
