"""The router in front of two engines."""

from __future__ import annotations

import urllib.error

import pytest

from spmd_rl.rollout.router import Router
from tests.engine import KEY, LiveEngine, another_engine, engine_config, log_probs, post


def test_requests_reach_both_engines_and_only_with_the_key(engine, tmp_path):
    cfg = engine_config(engine.model)
    assert Router(cfg, [engine.url], KEY, tmp_path).url == engine.url  # one engine: none needed
    with another_engine(engine, cfg, tmp_path) as host:
        [(_, url)] = host.wait_ready(120)
        router = Router(cfg, [engine.url, url], KEY, tmp_path)
        try:
            router.check()
            through = LiveEngine(router.url, engine.model, tmp_path, host)
            sampling = {"max_new_tokens": 4, "ignore_eos": True, "sampling_seed": 3}
            replies = [through.generate([5, 6, i], sampling) for i in range(10, 30)]
            assert [log_probs(r) for r in replies] == [
                log_probs(engine.generate([5, 6, i], sampling)) for i in range(10, 30)
            ]
            with pytest.raises(urllib.error.HTTPError, match="401"):
                post(router.url, "/generate", {"input_ids": [5]}, key=None)
        finally:
            router.stop()
