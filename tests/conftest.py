"""Fixtures shared by all tests. The engine is started once: tests that change its weights put
them back.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402

pytest.register_assert_rewrite("tests.whole.jobs")


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    """A running CPU engine with a tiny Qwen3."""
    from tests.engine import LiveEngine, engine_config, engine_host
    from tests.models import tiny_model

    model = tiny_model("qwen3", positions=1024)
    run_dir = tmp_path_factory.mktemp("engine")
    host = engine_host(engine_config(model), run_dir)
    host.launch()
    try:
        [(_, url)] = host.wait_ready(120)
        yield LiveEngine(url, model, run_dir, host)
    finally:
        host.stop()
