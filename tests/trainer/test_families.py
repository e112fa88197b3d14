"""Every family beyond the Llama layout under splits of all kinds: gradients, loss and files are one
rank's, which tests/trainer/test_against_transformers.py compares with transformers.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spmd_rl import architecture, planner
from tests.models import tiny_model
from tests.ranks import run_ranks
from tests.trainer.cases import Ranks, config, ok, placement, ragged_batch
from tests.trainer.test_layouts import size

MODELS = {
    "qwen3_moe": dict(experts=6),
    "glm4": dict(),
    "glm4_moe": dict(),
    "deepseek_v3": dict(),
    "qwen2": dict(layers=4),
}
SIZES: dict[int, dict[str, dict[str, int]]] = {
    1: {"one": {}},
    2: {"tp2": {"tp": 2}, "pp2": {"pp": 2}, "cp2": {"cp": 2}, "ep2": {"ep": 2}},
    4: {"tp2_ep2": {"tp": 2, "ep": 2}, "pp2_ep2": {"pp": 2, "ep": 2}},
}
UNEVEN = {"num_layers_in_first_pipeline_stage": 2}  # of three
# Other ways to compute the same, of the model with four layers.
KEYS: dict[str, dict[str, Any]] = {
    "uniform": {"recompute_granularity": "full", "recompute_method": "uniform",
                "recompute_num_layers": 2},
    "block": {"recompute_granularity": "full", "recompute_method": "block",
              "recompute_num_layers": 1},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    "pp2_vpp2": {"virtual_pipeline_model_parallel_size": 2},
}  # fmt: skip
SIZES[1] |= {name: {} for name in ("uniform", "block", "selective")}
SIZES[2] |= {"pp2_vpp2": {"pp": 2}}


def layouts(model: str, world: int) -> dict[str, dict[str, int]]:
    def suits(name: str, sizes: dict[str, int]) -> bool:
        if model == "qwen2":
            return name in (*KEYS, "one")
        return name not in KEYS and not (model == "glm4" and "ep" in sizes)  # that one is dense

    return {name: sizes for name, sizes in SIZES[world].items() if suits(name, sizes)}


def keys(layout: str, sizes: dict[str, int]) -> dict[str, Any]:
    fixed = {"use_distributed_optimizer": False, "expert_tensor_parallel_size": 1}
    if layout in KEYS:
        return fixed | KEYS[layout]
    return fixed | (UNEVEN if "pp" in sizes else {})


def rank_families(models: str, folder: str) -> None:
    with Ranks() as ranks:
        for name, path in json.loads(models).items():
            for layout, sizes in layouts(name, ranks.world).items():
                trainer = ranks.trainer(config(path, megatron=keys(layout, sizes)), **sizes)
                trainer.save_hf(f"{folder}/{name}-{layout}")
                metrics = ranks.train(trainer, ragged_batch())
                ranks.keep(folder, f"{name}-{layout}", (metrics, ranks.gradients(trainer)))
                held = bytes_held(trainer.actor)
                torch.save(held, f"{folder}/held-{name}-{layout}-{ranks.rank}.pt")


def bytes_held(learner) -> tuple[int, int, int, int]:
    """This rank's pipeline stage; bytes of the weights, gradients and Adam's moments."""
    from spmd_rl.trainer.optimizer import torch_adams

    parameters = [p for chunk in learner.chunks for p in chunk.parameters()]
    states = [s for adam in torch_adams(learner.optimizer) for s in adam.state.values()]
    moments = [s[name] for s in states for name in ("exp_avg", "exp_avg_sq")]
    weights = sum(p.nbytes for p in parameters)
    gradients = sum(p.main_grad.nbytes for p in parameters)
    return learner.groups.pp_rank, weights, gradients, sum(m.nbytes for m in moments)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    made = {
        name: str(tiny_model(name, **dict(layers=3, vocab=275, tied=False) | options))
        for name, options in MODELS.items()
    }
    for world in SIZES:
        ok(run_ranks(world, rank_families, json.dumps(made), str(folder), limit=240))
    return folder, made


CASES = [(m, name) for m in MODELS for world in SIZES for name in layouts(m, world)]


@pytest.mark.parametrize("model,layout", [case for case in CASES if case[1] != "one"])
def test_loss_and_gradients_do_not_depend_on_the_layout(results, model, layout):
    folder, _ = results
    metrics, gradients = torch.load(folder / f"{model}-{layout}.pt", weights_only=False)
    want_metrics, want = torch.load(folder / f"{model}-one.pt", weights_only=False)
    assert gradients.keys() == want.keys()
    off = [gradients[name] - value for name, value in want.items()]
    assert size(off) <= 2e-6 * size(want.values())
    for name in ("train/loss", "train/grad_norm", "rollout/log_probs"):
        assert metrics[name] == pytest.approx(want_metrics[name], rel=2e-6, abs=2e-7), name


@pytest.mark.parametrize("model,layout", CASES)
def test_files_are_bitwise_those_that_were_loaded(results, model, layout):
    folder, made = results
    saved = load_file(folder / f"{model}-{layout}" / "model.safetensors")
    want = load_file(f"{made[model]}/model.safetensors")
    assert saved.keys() == want.keys()
    assert all(torch.equal(saved[name], value) for name, value in want.items())


@pytest.mark.parametrize("model,layout", CASES)
def test_the_planner_foretells_bytes_exactly(results, model, layout):
    folder, made = results
    world, sizes = next((w, named[layout]) for w, named in SIZES.items() if layout in named)
    found = planner.plan(
        config(made[model], megatron=keys(layout, sizes)),
        placement(world, **sizes),
        architecture.read(made[model]),
        planner.GPUS["h100"],
    )
    for rank in range(world):
        stage, *held = torch.load(folder / f"held-{model}-{layout}-{rank}.pt")
        foretold = found.stages[stage]
        assert held == [foretold.weights, foretold.gradients, foretold.optimizer]
