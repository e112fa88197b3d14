"""Ctrl-C ends a job promptly and quietly; SIGTERM and SIGUSR1 on any rank let it end in order."""

import os
import signal

from tests.control import jobs
from tests.ranks import Running, run_ranks


def test_ctrl_c_under_torchrun() -> None:
    def press(running: Running) -> None:
        running.wait_for("READY")
        os.killpg(running.processes[0].pid, signal.SIGINT)

    outcome = run_ranks(2, jobs.idle, launcher="torchrun", act=press, limit=30)
    assert outcome.statuses[0]
    assert "interrupted (SIGINT)" in outcome.output and "got signal: 2" in outcome.last()
    assert outcome.output.count("Traceback") == 1  # torchrun's own
    assert outcome.left == []


def test_ctrl_c_reaches_all_ranks_at_once() -> None:
    def press(running: Running) -> None:
        running.wait_for("READY")
        for process in running.processes:
            process.send_signal(signal.SIGINT)

    outcome = run_ranks(3, jobs.idle, launcher="plain", act=press, limit=30)
    assert outcome.statuses == [130] * 3
    assert outcome.output.count("interrupted") == 1 and "Traceback" not in outcome.output
    assert outcome.left == []


def test_orderly_stop() -> None:
    def ask(running: Running) -> None:
        running.wait_for("READY")
        running.processes[1].send_signal(signal.SIGUSR1)  # any rank will do

    outcome = run_ranks(2, jobs.idle, act=ask)
    assert outcome.statuses == [0, 0], outcome.output
    assert outcome.lines("STOPPED") and outcome.left == []


def test_orderly_stop_under_torchrun() -> None:
    """Its own status is 1 after a SIGTERM, whatever the ranks say."""

    def ask(running: Running) -> None:
        running.wait_for("READY")
        running.processes[0].send_signal(signal.SIGTERM)

    outcome = run_ranks(2, jobs.idle, launcher="torchrun", act=ask)
    assert outcome.lines("STOPPED"), outcome.output
    assert "the job failed" not in outcome.output and outcome.left == []


def test_ranks_do_not_outlive_a_killed_launcher() -> None:
    def kill(running: Running) -> None:
        running.wait_for("READY")
        running.processes[0].kill()

    outcome = run_ranks(2, jobs.idle, launcher="torchrun", act=kill)
    assert outcome.left == []
    assert "the launcher is gone" in outcome.last()
