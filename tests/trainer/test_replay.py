"""Routing replay: given experts are followed by every layout alike; recorded ones serve again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from spmd_rl import architecture, planner
from tests.models import tiny_model
from tests.ranks import run_ranks
from tests.trainer.cases import Ranks, config, ok, placement, ragged_batch
from tests.trainer.test_layouts import size

EXPERTS, TOPK, LAYERS = 8, 2, 4
SIZES: dict[int, dict[str, dict[str, int]]] = {
    1: {"one": {}, "full": {}, "moe": {}, "forward": {}},
    2: {"tp2": {"tp": 2}, "pp2": {"pp": 2}, "cp2": {"cp": 2}, "ep2": {"ep": 2}, "dp2": {},
        "vpp2": {"pp": 2}, "pp2_moe": {"pp": 2}},
    4: {"tp2_ep2": {"tp": 2, "ep": 2}, "tp2_cp2": {"tp": 2, "cp": 2}},
}  # fmt: skip
KEYS: dict[str, dict[str, Any]] = {
    "full": {"recompute_granularity": "full", "recompute_method": "uniform",
             "recompute_num_layers": 1},
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "vpp2": {"virtual_pipeline_model_parallel_size": 2},
}  # fmt: skip
KEYS["pp2_moe"] = KEYS["moe"]


def routed_batch():
    """Experts at random for all but the last token of each sample; of one sample, for half."""
    batch, rng = ragged_batch(), np.random.default_rng(3)
    lengths = batch.total_lengths - 1
    lengths[4] //= 2
    scores = rng.random((lengths.sum(), LAYERS, EXPERTS))
    experts = scores.argsort(-1)[..., :TOPK].astype(np.uint8)
    return replace(
        batch,
        routed_experts=experts.reshape(len(experts), -1),
        routed_lengths=lengths.astype(np.int32),
    )


def configuration(model: str, layout: str, **algo: Any):
    keys = {"use_distributed_optimizer": False, "expert_tensor_parallel_size": 1}
    train: dict[str, Any] = {"lr": 1e-3} if "use_routing_replay" in algo else {}
    if layout == "forward":  # the log-prob pass has other micro-batches than the updates
        train["log_probs_max_tokens_per_gpu"] = 90
    return config(
        model,
        rollout={"rollout_temperature": 0.8},
        algo=algo,
        megatron=keys | KEYS.get(layout, {}),
        train=train,
    )


def rank_replay(model: str, folder: str) -> None:
    with Ranks() as ranks:
        for layout, sizes in SIZES[ranks.world].items():
            cfg = configuration(model, layout, use_rollout_routing_replay=True)
            trainer = ranks.trainer(cfg, **sizes)
            metrics = ranks.train(trainer, routed_batch())
            ranks.keep(folder, f"told-{layout}", (metrics, ranks.gradients(trainer)))
            held = trainer.replay
            size = held.known.nbytes + held.chosen.nbytes
            ranks.keep(folder, f"bytes-{layout}", (len(held.known), size))

            cfg = configuration(model, layout, use_routing_replay=True)
            cfg.train.global_batch_size = 5  # several steps: routes would move between them
            trainer = ranks.trainer(cfg, **sizes)
            batch = replace(ragged_batch(siblings=False, count=10), rewards=np.ones(10, np.float32))
            metrics = ranks.train(trainer, batch)
            ranks.keep(folder, f"own-{layout}", (metrics, ranks.gradients(trainer)))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay")
    model = tiny_model("qwen3_moe", tied=False, layers=LAYERS, hidden=32)
    for world in SIZES:
        ok(run_ranks(world, rank_replay, str(model), str(folder), limit=240))
    kept = {path.stem: torch.load(path, weights_only=False) for path in folder.glob("*.pt")}
    return model, kept


LAYOUTS = [layout for sizes in SIZES.values() for layout in sizes if layout != "one"]


@pytest.mark.parametrize("layout", ["one", "pp2", "dp2", "tp2_ep2"])
def test_the_planner_foretells_the_bytes_of_experts(results, layout):
    model, kept = results
    tokens, size = kept[f"bytes-{layout}"]
    [(world, sizes)] = [(world, of[layout]) for world, of in SIZES.items() if layout in of]
    cfg, where = (
        configuration(str(model), layout, use_routing_replay=True),
        placement(world, **sizes),
    )
    cfg.rollout.rollout_batch_size, cfg.rollout.n_samples_per_prompt = where.dp, 1
    found = planner.plan(cfg, where, architecture.read(model), planner.GPUS["h100"], tokens)
    assert found.stages[0].replay == size
    told = configuration(str(model), layout, use_rollout_routing_replay=True)
    told.rollout = cfg.rollout
    more = planner.plan(told, where, architecture.read(model), planner.GPUS["h100"], tokens)
    assert more.stages[0].host - found.stages[0].host == tokens * LAYERS * TOPK


@pytest.mark.parametrize("kind", ["told", "own"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_do_not_depend_on_the_layout(results, layout, kind):
    _, kept = results
    (metrics, gradients), (want_metrics, want) = kept[f"{kind}-{layout}"], kept[f"{kind}-one"]
    off = [gradients[name] - value for name, value in want.items()]
    # Of own routes the second step is compared: an update of Adam's, which amplifies, is between.
    limit = {"told": 2e-6, "own": 5e-6}[kind]
    assert size(off) <= limit * size(want.values())
    for name in ("train/loss", "train/grad_norm", "rollout/log_probs"):
        assert metrics[name] == pytest.approx(want_metrics[name], rel=limit, abs=2e-7), name
    changed = "train/routing_replay_changed"
    assert metrics[changed] == pytest.approx(want_metrics[changed], rel=1e-2)


def test_the_experts_are_those_that_were_told(results, monkeypatch):
    """transformers' model with the same experts: its loss and its gradients."""
    from transformers import AutoModelForCausalLM
    from transformers.models.qwen3_moe import modeling_qwen3_moe as modeling

    model_path, kept = results
    metrics, gradients = kept["told-one"]
    batch = routed_batch()
    told = batch.routed_experts.reshape(-1, LAYERS, TOPK)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    routers = [layer.mlp.gate for layer in model.model.layers]
    at: dict[str, Any] = {}

    def forward(self, hidden):
        logits = torch.nn.functional.linear(hidden.reshape(-1, hidden.size(-1)), self.weight)
        scores = logits.softmax(-1)
        chosen = scores.topk(TOPK).indices
        rows = torch.from_numpy(told[at["rows"], routers.index(self)].astype(np.int64))
        chosen = torch.cat([rows, chosen[len(rows) :]])
        values = scores.gather(1, chosen)
        return logits, values / values.sum(-1, keepdim=True), chosen

    monkeypatch.setattr(modeling.Qwen3MoeTopKRouter, "forward", forward)
    tokens = torch.from_numpy(batch.tokens).long().split(batch.total_lengths.tolist())
    masks = torch.from_numpy(batch.loss_mask).double().split(batch.response_lengths.tolist())
    siblings, total, start = {2: [2, 3], 3: [2, 3]}, torch.zeros((), dtype=torch.float64), 0
    for i, row in enumerate(tokens):
        at["rows"] = slice(start, start + batch.routed_lengths[i])
        start += batch.routed_lengths[i]
        size_of = batch.response_lengths[i]
        logits = model(row[None]).logits[0, len(row) - size_of - 1 : -1] / 0.8
        log_prob = torch.log_softmax(logits, -1).gather(-1, row[-size_of:, None])[:, 0].double()
        ratio = torch.exp(log_prob - log_prob.detach())
        count = sum(masks[j].sum().item() for j in siblings.get(i, [i]))
        total = total - (masks[i] * ratio).sum() * float(batch.rewards[i]) / max(count, 1) / 11
    total.backward()
    assert metrics["train/loss"][0] == pytest.approx(total.item(), rel=1e-5)
    norm = sum(p.grad.square().sum() for p in model.parameters()).sqrt().item()
    assert metrics["train/grad_norm"][0] == pytest.approx(norm, rel=1e-5)
    for name in ("lm_head.weight", "model.layers.0.mlp.gate.weight"):
        want = model.get_parameter(name).grad
        assert (gradients[name] - want).norm() <= 1e-4 * want.norm(), name


def test_what_following_changed_is_told(results):
    _, kept = results
    # Two of eight at random are the router's own in a quarter of the cases.
    assert kept["told-one"][0]["train/routing_replay_changed"] == pytest.approx(0.75, abs=0.05)
    # The first step has the weights that recorded; the second would choose a little otherwise.
    assert 0 < kept["own-one"][0]["train/routing_replay_changed"] < 0.2
