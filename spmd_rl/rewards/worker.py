"""A process that decides by algebra whether two answers are equal, one question at a time.

Comes in: JSON lines [answer, truth] on stdin; goes out: JSON booleans on stdout, the first line
when it is ready. It may hang or grow on a hostile answer: pool.py kills it then.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import resource
import signal
import sys

MEMORY = 4 << 30  # bytes of address space; an answer that wants more is wrong
PR_SET_PDEATHSIG = 1


def main() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not end up among the answers
    logging.disable(logging.CRITICAL)
    import math_verify  # noqa: F401 - so that the time limit does not count the import

    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        answer, truth = json.loads(line)
        print(json.dumps(equal(answer, truth)), file=answers, flush=True)


def equal(answer: str, truth: str) -> bool:
    """Whether the answer means the truth, by math-verify."""
    from math_verify import parse, verify

    try:
        gold, given = (parse(f"${text}$", parsing_timeout=0) for text in (truth, answer))
        return bool(verify(gold, given, timeout_seconds=None))
    except (Exception, RecursionError):  # any failure to understand it means a wrong answer
        return False


if __name__ == "__main__":
    main()
