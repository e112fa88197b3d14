"""What differs between SGLang versions, and what an engine does rarely: answered by a small server.

Everything else about EngineAdmin is tested on a real engine in test_engines.py and test_push.py.
"""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from spmd_rl.rollout.admin import EngineAdmin, EngineError


@contextmanager
def answering(answers: dict[str, list[tuple[int, dict]]]):
    """An engine that gives each path its answers in turn, the last one for ever. Yields
    (admin, seen).
    """
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            seen.append(self.path)
            known = answers.get(self.path, [(404, {"detail": "Not Found"})])
            status, body = known.pop(0) if len(known) > 1 else known[0]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield EngineAdmin(f"http://127.0.0.1:{server.server_port}", "key"), seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


GOOD = (200, {"success": True})


def test_engines_without_update_sessions_are_updated_without_them():
    with answering({"/update_weight_version": [GOOD]}) as (old, seen):
        for version in (1, 2):
            old.begin_update()
            old.end_update(version)
    assert seen == ["/begin_weight_update", *["/update_weight_version"] * 2]  # asked once


def test_engines_with_update_sessions_get_them_opened_and_closed():
    paths = ["/begin_weight_update", "/end_weight_update", "/update_weight_version"]
    with answering({path: [GOOD] for path in paths}) as (new, seen):
        new.begin_update()
        new.end_update(1)
    assert seen == paths


def test_a_session_that_cannot_be_opened_is_an_error_not_an_old_version():
    refusal = (400, {"success": False, "message": "already open"})
    with (
        answering({"/begin_weight_update": [refusal]}) as (admin, _),
        pytest.raises(EngineError, match="refused /begin_weight_update .*already open"),
    ):
        admin.begin_update()


def test_a_flush_is_tried_until_the_engine_is_idle():
    busy = (400, {"success": False, "message": "requests are running"})
    with answering({"/flush_cache": [busy, busy, GOOD]}) as (admin, seen):
        admin.flush()
    assert len(seen) == 3
    with (
        answering({"/flush_cache": [busy]}) as (admin, _),
        pytest.raises(EngineError, match="refused /flush_cache for 0 s .*requests are running"),
    ):
        admin.flush(seconds=0.1)


@pytest.mark.parametrize("listed", [True, False])
def test_checksums_are_ordered_by_rank_in_either_versions_form(listed):
    ranks = [
        {
            "checksums": {"w": f"sum{r}"},
            "parallelism_info": [{"tp_rank": r}] if listed else {"tp_rank": r},
        }
        for r in (1, 0)
    ]
    with answering({"/weights_checker": [(200, {"success": True, "ranks": ranks})]}) as (admin, _):
        assert admin.checksums() == [{"w": "sum0"}, {"w": "sum1"}]
