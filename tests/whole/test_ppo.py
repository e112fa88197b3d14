"""PPO as a whole job: first the critic alone, then both models; killed and resumed bitwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from spmd_rl import architecture
from spmd_rl.weights.names import NameMap
from tests.models import tiny_model
from tests.whole.jobs import metrics, run_job, succeed, weights, write_config
from tests.whole.test_resume import kill_at
from tools.compare_runs import lasting

ROLLOUTS = 3


def config(folder: Path) -> None:
    write_config(
        folder,
        rollout={"num_rollout": ROLLOUTS, "n_samples_per_prompt": 2, "num_steps_per_rollout": 2},
        algo={"advantage_estimator": "ppo", "num_critic_only_steps": 1, "kl_coef": 0.01},
        train={"critic_lr": 3.0e-3},
        checkpoint={"save_interval": 1, "keep_last": None, "async_save": True},
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ppo")
    config(folder)
    return succeed(folder)


def saved(run: Path, rollouts: int) -> dict[str, dict[str, Tensor]]:
    """Both models' tensors after so many rollouts, under their names in Hugging Face files."""
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    path = run / "checkpoints" / f"rollout_{rollouts:06d}" / "model"
    found: dict[str, dict[str, Tensor]] = {"actor": {}, "critic": {}}
    shape = architecture.read(tiny_model("qwen3"))
    for key, value in _load_state_dict_from_keys(checkpoint_id=path).items():
        who, name = ("critic", key[7:]) if key.startswith("critic.") else ("actor", key)
        if name.startswith(("decoder.", "embedding.", "output_layer.")):
            for layer in _layers(name, value):
                found[who] |= NameMap(shape, who == "critic").to_hf(*layer)
    return found


def _layers(name: str, value: Tensor) -> list[tuple[str, Tensor]]:
    """Megatron's checkpoints hold all layers' weights of one kind as one tensor."""
    if not name.startswith("decoder.layers."):
        return [(name, value)]
    rest = name.removeprefix("decoder.layers.")
    return [(f"decoder.layers.{i}.{rest}", layer) for i, layer in enumerate(value)]


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_the_actor_waits_while_the_critic_begins(unbroken: Path) -> None:
    start = load_file(tiny_model("qwen3") / "model.safetensors")
    first, second = saved(unbroken, 1), saved(unbroken, 2)
    assert same(first["actor"], start)
    assert not same(second["actor"], start)
    trunk = {name: value for name, value in start.items() if name != "lm_head.weight"}
    assert not same(first["critic"], trunk)
    lines = metrics(unbroken)
    assert ["train/loss" in line for line in lines] == [False, True, True]
    for line in lines:
        assert len(line["train/critic-value_loss"]) == 2  # one for each step
        assert line["rollout/values"] != line["rollout/returns"] != line["rollout/advantages"]
    of_actor, of_critic = lines[-1]["train/lr-pg_0"], lines[-1]["train/critic-lr-pg_0"]
    assert (of_actor[0], of_critic[0]) == pytest.approx((1e-3, 3e-3))


def test_killed_and_resumed_both_models_end_bitwise_equal(unbroken: Path, tmp_path: Path) -> None:
    config(tmp_path)
    killed = run_job(tmp_path, act=kill_at(tmp_path, 2, "train", 1))
    assert killed.statuses[0] not in (0, None), killed.output
    run = succeed(tmp_path)
    assert weights(run) == weights(unbroken)
    ours, theirs = saved(run, ROLLOUTS), saved(unbroken, ROLLOUTS)
    assert same(ours["actor"], theirs["actor"]) and same(ours["critic"], theirs["critic"])
    assert [lasting(line) for line in metrics(run)] == [lasting(line) for line in metrics(unbroken)]
