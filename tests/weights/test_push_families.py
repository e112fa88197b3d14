"""Families beyond Llama in a real engine: pushed weights are there bit for bit, and give
transformers' log-probs.
"""

from __future__ import annotations

import json

import pytest

from spmd_rl import control
from spmd_rl.types import EngineSpec, Placement
from spmd_rl.weights.push import Pusher
from tests.engine import KEY, LiveEngine, another_engine, engine_config, hf_log_probs, log_probs
from tests.models import tiny_model
from tests.ranks import run_ranks
from tests.weights.test_push import PROMPTS, trainer_of

FAMILIES = ("qwen3_moe", "glm4", "glm4_moe")


def rank_push(url: str, model: str) -> None:
    """One train rank beside one engine, sharing a place."""
    job = control.join()
    place = Placement(1, 1, (0,), (0,), (EngineSpec(0, (0,), 0, 0),), True)
    job.train_group(place.train_ranks)
    cfg = engine_config(model, debug={"check_weight_update_equal": True})
    Pusher(cfg, place, job, json.loads(url), KEY).push(trainer_of(model), 1)
    job.leave()


@pytest.mark.parametrize("family", FAMILIES)
def test_pushed_weights_give_transformers_log_probs(engine, family, tmp_path):
    first, second = (tiny_model(family, positions=1024, tied=False, seed=seed) for seed in (0, 1))
    with another_engine(engine, engine_config(first), tmp_path) as host:
        [(_, url)] = host.wait_ready(120)
        done = run_ranks(1, rank_push, json.dumps([url]), str(second), limit=120)
        assert done.statuses == [0], done.output
        live = LiveEngine(url, second, tmp_path, host)
        live.admin.resume()
        replies = live.generate(PROMPTS, {"max_new_tokens": 8, "ignore_eos": True})
        expected = hf_log_probs(second, PROMPTS, [r["output_ids"] for r in replies])
        for reply, row in zip(replies, expected, strict=True):
            assert log_probs(reply) == pytest.approx(row, abs=1e-5)
