"""Pushes into real engines: both transports, engines of one and two ranks, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spmd_rl import control
from spmd_rl.rollout.launchers import shared_memory_of
from spmd_rl.types import EngineSpec, Placement
from spmd_rl.weights.equal import WeightsDiffer
from spmd_rl.weights.push import Pusher
from tests.engine import (
    KEY,
    LiveEngine,
    another_engine,
    engine_config,
    hf_log_probs,
    log_probs,
)
from tests.models import tiny_model
from tests.ranks import run_ranks

PROMPTS = [[5, 6, 7], [8, 9]]
OTHER = {"positions": 1024, "seed": 1}


@pytest.fixture(scope="module")
def wide(engine, tmp_path_factory):
    """An engine over two ranks with the same model as the session's."""
    run_dir = tmp_path_factory.mktemp("wide")
    with another_engine(engine, engine_config(engine.model), run_dir, width=2) as host:
        [(_, url)] = host.wait_ready(120)
        files = shared_memory_of(host.launcher.server.pid)  # its ranks talk through some
        yield LiveEngine(url, engine.model, run_dir, host)
    assert files and not [file for file in files if file.exists()]


def placement(colocate: bool) -> Placement:
    """Three train ranks that share their places with both engines, or one beside them."""
    first = 0 if colocate else 1
    engines = (EngineSpec(0, (first,), 0, 0), EngineSpec(1, (first + 1, first + 2), 0, 1))
    train = (0, 1, 2) if colocate else (0,)
    ranks = tuple(range(first, first + 3))
    return Placement(first + 3, first + 3, train, ranks, engines, colocate)


def trainer_of(model: str, **changed: torch.Tensor) -> SimpleNamespace:
    from safetensors.torch import load_file

    tensors = load_file(Path(model) / "model.safetensors") | changed
    return SimpleNamespace(hf_tensors=lambda: iter(tensors.items()), tensors=tensors)


def push_twice(colocate: str, urls: str, first: str, second: str) -> None:
    """One train rank: push `first`, prove that the proof notices one bit, push `second`."""
    job = control.join()
    place = placement(colocate == "True")
    job.train_group(place.train_ranks)
    cfg = engine_config(
        second, debug={"check_weight_update_equal": True, "update_weight_buffer_size": 50_000}
    )
    pusher = Pusher(cfg, place, job, json.loads(urls), KEY)
    stats, failed = pusher.push(trainer_of(first), 1)
    assert not failed
    name = "model.layers.1.mlp.up_proj.weight"
    changed = trainer_of(first).tensors[name].clone()
    changed.view(torch.int32)[3, 3] ^= 1
    try:
        pusher.check_equal(trainer_of(first, **{name: changed}).hf_tensors())
    except WeightsDiffer as error:
        print("noticed:", error, flush=True)
    pusher.push(trainer_of(second), 2)
    if job.rank == 0:
        print("stats:", json.dumps(stats), flush=True)
    job.leave()


@pytest.mark.parametrize("colocate", [True, False], ids=["tensor", "distributed"])
def test_every_engine_gets_the_trainers_bits(engine, wide, colocate):
    other = tiny_model("qwen3", **OTHER)
    urls = json.dumps([engine.url, wide.url])
    ranks = 3 if colocate else 1
    done = run_ranks(
        ranks, push_twice, str(colocate), urls, str(engine.model), str(other), limit=120
    )
    assert done.statuses == [0] * ranks, done.output
    [noticed] = done.lines("noticed: ")
    assert "engine 0, tensor-parallel rank 0" in noticed
    assert "1 of 18 tensors differ" in noticed and "layers.1.mlp.gate_up_proj" in noticed
    [stats] = done.lines("stats: ")
    assert json.loads(stats)["perf/update_weights_bytes"] > 400_000
    for live in (engine, wide):
        live.admin.resume()
        replies = live.generate(PROMPTS, {"max_new_tokens": 8, "ignore_eos": True})
        expected = hf_log_probs(other, PROMPTS, [r["output_ids"] for r in replies])
        for reply, row in zip(replies, expected, strict=True):
            assert log_probs(reply) == pytest.approx(row, abs=1e-5)
            assert reply["meta_info"]["weight_versions"] == [{"version": "2", "start": 0, "end": 8}]
    restore(engine, wide)


def restore(*engines: LiveEngine) -> None:
    for live in engines:
        live.admin.update_from_disk(str(live.model), "0")


def test_train_ranks_do_not_import_sglang():
    code = "import sys, spmd_rl.weights.push; print('sglang' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
