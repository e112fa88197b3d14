"""The alarm on a gap between engine and trainer, and the cause it names, with a real engine that
is one version behind, has one corrupted weight, or does not apply the temperature.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine import log_probs
from tests.ranks import run_ranks
from tests.trainer.cases import Ranks, config, ok, ragged_batch

TEMPERATURE = 0.7
PROMPTS, LENGTH = 24, 24


def rank_update(model: str, folder: str) -> None:
    """Version 1: an ordinary update of version 0."""
    with Ranks() as ranks:
        train = {"lr": 2e-3, "clip_grad": 1.0, "use_dynamic_batch_size": True}
        trainer = ranks.trainer(config(model, train=train | {"max_tokens_per_gpu": 1000}))
        ranks.train(trainer, ragged_batch())
        trainer.save_hf(f"{folder}/updated")


def rank_judge(folder: str, names: str) -> None:
    """A trainer at version 1, pushed, judges what each engine has sampled."""
    from spmd_rl.types import Batch

    with Ranks() as ranks:
        cfg = config(
            f"{folder}/updated",
            rollout={"rollout_batch_size": PROMPTS, "n_samples_per_prompt": 1, "num_rollout": 1,
                     "rollout_temperature": TEMPERATURE},
            train={"lr": 0.0, "use_dynamic_batch_size": True, "max_tokens_per_gpu": 1000},
        )  # fmt: skip
        trainer = ranks.trainer(cfg)
        trainer.weights_pushed(1)
        for rollout, name in enumerate(json.loads(names)):
            with np.load(f"{folder}/{name}.npz") as columns:
                batch = Batch(**columns)
            metrics = ranks.train(trainer, batch, rollout)
            ranks.keep(folder, name, {k: v for k, v in metrics.items() if "/" not in k
                                      or k.startswith("mismatch/")})  # fmt: skip


def corrupt(source: Path, target: Path) -> None:
    """One matrix of one layer with some wrong rows."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    rows = tensors["model.layers.1.mlp.down_proj.weight"][:8]
    rows.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)) * 0.5)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


def sample(engine, version: str, temperature: float) -> dict[str, np.ndarray]:
    """Columns of a batch, as the engine's replies have them."""
    prompts = [[5 + i, 6, 7 + i % 5] for i in range(PROMPTS)]
    options = {"max_new_tokens": LENGTH, "ignore_eos": True, "temperature": temperature}
    replies = engine.generate(prompts, options)
    assert {r["meta_info"]["weight_version"] for r in replies} == {version}
    tokens = [token for p, r in zip(prompts, replies, strict=True) for token in p + r["output_ids"]]
    return {
        "tokens": np.array(tokens, dtype=np.int32),
        "total_lengths": np.full(PROMPTS, 3 + LENGTH, dtype=np.int32),
        "response_lengths": np.full(PROMPTS, LENGTH, dtype=np.int32),
        "loss_mask": np.ones(PROMPTS * LENGTH, dtype=np.uint8),
        "rewards": np.linspace(-1, 1, PROMPTS, dtype=np.float32),
        "raw_rewards": np.ones(PROMPTS, dtype=np.float32),
        "rollout_ids": np.arange(PROMPTS),
        "rollout_log_probs": np.array(sum(map(log_probs, replies), []), dtype=np.float32),
        "weight_versions": np.full(PROMPTS * LENGTH, int(version), dtype=np.int32),
    }


CASES = {  # weights, version, temperature of the engine
    "healthy": ("updated", "1", TEMPERATURE),
    "behind": (None, "0", TEMPERATURE),
    "corrupted": ("corrupted", "1", TEMPERATURE),
    "silently_behind": (None, "1", TEMPERATURE),
    "hot": ("updated", "1", 1.0),
    "warm": ("updated", "1", 0.8),
    "healthy_again": ("updated", "1", TEMPERATURE),
}


@pytest.fixture(scope="module")
def results(engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mismatch")
    ok(run_ranks(1, rank_update, str(engine.model), str(folder), limit=100))
    corrupt(folder / "updated", folder / "corrupted")
    try:
        for name, (weights, version, temperature) in CASES.items():
            path = engine.model if weights is None else folder / weights
            engine.admin.update_from_disk(str(path), version)
            np.savez(folder / f"{name}.npz", **sample(engine, version, temperature))
    finally:
        engine.admin.update_from_disk(str(engine.model), "0")
    ok(run_ranks(1, rank_judge, str(folder), json.dumps([*CASES]), limit=100))
    return {name: torch.load(folder / f"{name}.pt", weights_only=False) for name in CASES}


@pytest.mark.parametrize("name", ["healthy", "healthy_again"])
def test_no_alarm_without_a_fault(results, name):
    found = results[name]
    assert "alarm" not in found and found["mismatch/alarm"] == 0
    assert found["mismatch/max"] < 1e-4
    assert found["mismatch/lag_0"] == pytest.approx(found["mismatch/mean"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("behind", "100% of the tokens were sampled with weights up to 1 version behind the "
                   "trainer's version 1"),
        ("corrupted", "a tensor of an engine differs from the trainer's"),
        ("silently_behind", "a push was lost unnoticed"),
        ("hot", "fit temperature 1.00: the engine does not apply rollout.rollout_temperature 0.7"),
        ("warm", "fit temperature 0.80 instead of rollout.rollout_temperature 0.7"),
    ],
)  # fmt: skip
def test_the_alarm_names_the_cause_within_its_rollout(results, name, words):
    found = results[name]
    print(found["alarm"])
    assert found["mismatch/alarm"] == 1
    assert words in found["alarm"]
    assert found["mismatch/max"] >= found["mismatch/mean"] > 1e-3


def test_the_gap_by_position_and_lag(results):
    behind = results["behind"]
    assert behind["mismatch/lag_1"] == pytest.approx(behind["mismatch/mean"])
    assert "mismatch/lag_0" not in behind
    by_position = [behind[f"mismatch/position_{k}"] for k in (0, 1, 8)]
    mean = (by_position[0] + 7 * by_position[1] + 16 * by_position[2]) / LENGTH
    assert mean == pytest.approx(behind["mismatch/mean"])
    assert "mismatch/position_64" not in behind
