"""A process that decides by algebra whether two answers are equal, one question at a time.

Comes in: JSON lines [answer, truth] on stdin; goes out: one word a line on stdout: `ready` at the
start, then `true`, `false`, `overtime` or `crashed` for each question. A child forked after the
imports does the work: it may hang, grow or crash on a hostile answer, and the next costs a fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import resource
import signal
import socket
import sys
from typing import TextIO

MEMORY = 4 << 30  # bytes of address space; an answer that wants more is wrong
PR_SET_PDEATHSIG = 1


def main(timeout: float) -> None:
    """`timeout`: seconds of processor time for a question, so that a busy machine changes no
    reward.
    """
    _die_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not end up among the answers
    logging.disable(logging.CRITICAL)
    import math_verify  # noqa: F401 - once, for all children

    print("ready", file=answers, flush=True)
    child = None
    for line in sys.stdin:
        child = child or _Child(timeout)
        word = child.ask(line)
        if not word:
            word = child.end()
            child = None
        print(word, file=answers, flush=True)


class _Child:
    def __init__(self, timeout: float):
        ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                ours.close()
                _die_with_parent()
                with contextlib.suppress(ValueError, OSError):
                    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
                _serve(theirs.makefile("r"), theirs.makefile("w"), timeout)
            finally:
                os._exit(1)
        theirs.close()
        self._questions, self._answers = ours.makefile("w"), ours.makefile("r")
        ours.close()  # open as long as the files are

    def ask(self, line: str) -> str:
        """Its answer; empty when it died of the question."""
        with contextlib.suppress(OSError):
            self._questions.write(line)
            self._questions.flush()
            return self._answers.readline().strip()
        return ""

    def end(self) -> str:
        _, status = os.waitpid(self.pid, 0)
        return "overtime" if os.waitstatus_to_exitcode(status) == -signal.SIGPROF else "crashed"


def _serve(questions: TextIO, answers: TextIO, timeout: float) -> None:
    for line in questions:
        signal.setitimer(signal.ITIMER_PROF, timeout)  # its signal kills, also within C code
        answer, truth = json.loads(line)
        result = equal(answer, truth)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(result), file=answers, flush=True)


def equal(answer: str, truth: str) -> bool:
    """Whether the answer means the truth, by math-verify."""
    from math_verify import parse, verify

    try:
        gold, given = (parse(_boxed(text), parsing_timeout=0) for text in (truth, answer))
        return bool(verify(gold, given, timeout_seconds=None))
    except (Exception, RecursionError):  # any failure to understand it means a wrong answer
        return False


def _boxed(text: str) -> str:
    """In a box it is read as a whole: `$-1./3$` would be -1, and a `$` inside would end it."""
    return f"$\\boxed{{{text.replace(chr(92) + '$', '').replace('$', ' ')}}}$"


def _die_with_parent() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main(float(sys.argv[1]))
