"""On-policy distillation: the teacher's log-probs, and what they do to the loss."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spmd_rl import architecture, planner
from tests.models import tiny_model
from tests.ranks import run_ranks
from tests.trainer.cases import Ranks, config, ok, placement, ragged_batch
from tests.trainer.test_layouts import size

COEF = 0.5
LAYOUTS: dict[int, dict[str, dict[str, int]]] = {
    1: {"one": {}},
    2: {"tp2": {"tp": 2}, "pp2": {"pp": 2}, "cp2": {"cp": 2}},
}


STEP = 7


def configuration(student: str, teacher: str):
    algo: dict[str, Any] = {"use_opd": True, "opd_type": "megatron", "opd_kl_coef": COEF}
    if Path(teacher).name == "stored":
        algo["opd_teacher_ckpt_step"] = STEP
    return config(
        student,
        algo=algo | {"opd_teacher_load": teacher},
        megatron={"use_distributed_optimizer": False},
    )


def store(ranks: Ranks, model: str, root: Path) -> None:
    """As a training of Megatron's would leave it; its newest checkpoint is another."""
    from spmd_rl.trainer import checkpoint

    made = ranks.trainer(config(model, megatron={"use_distributed_optimizer": False}))
    nothing = SimpleNamespace(state_dict=dict)
    checkpoint.save(root / f"iter_{STEP:07d}", made.actor.chunks, None, nothing, made.groups)
    (root / "latest_checkpointed_iteration.txt").write_text("9")


def rank_teachers(student: str, teachers: str, folder: str) -> None:
    with Ranks() as ranks:
        if ranks.world == 1:
            store(ranks, json.loads(teachers)["same"], Path(folder, "stored"))
        for name, teacher in json.loads(teachers).items():
            for layout, sizes in LAYOUTS[ranks.world].items():
                trainer = ranks.trainer(configuration(student, teacher), **sizes)
                metrics = ranks.train(trainer, ragged_batch(siblings=False))
                ranks.keep(folder, f"{name}-{layout}", (metrics, ranks.gradients(trainer)))
                chunks = trainer.teacher.passes.chunks
                held = sum(p.nbytes for chunk in chunks for p in chunk.parameters())
                ranks.keep(folder, f"bytes-{name}-{layout}", held)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    student = str(tiny_model("qwen3", tied=False, vocab=275))
    teachers = {
        "same": str(tiny_model("qwen3", tied=False, vocab=275, seed=1)),
        "larger": str(tiny_model("qwen3", tied=False, vocab=275, hidden=96, layers=4, seed=1)),
    }
    teachers["stored"] = str(folder / "stored")
    for world in LAYOUTS:
        ok(run_ranks(world, rank_teachers, student, json.dumps(teachers), str(folder), limit=240))
    kept = {path.stem: torch.load(path, weights_only=False) for path in folder.glob("*.pt")}
    return student, teachers, kept


def plain(student: str, teacher: str):
    """Loss, reverse KL and gradients of the same step, sample by sample."""
    from transformers import AutoModelForCausalLM

    models = [
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (student, teacher)
    ]
    batch = ragged_batch(siblings=False)
    tokens = torch.from_numpy(batch.tokens).long().split(batch.total_lengths.tolist())
    masks = torch.from_numpy(batch.loss_mask).double().split(batch.response_lengths.tolist())
    total = reverse = torch.zeros((), dtype=torch.float64)
    for i, row in enumerate(tokens):
        count = int(batch.response_lengths[i])
        ours, theirs = (
            torch.log_softmax(model(row[None]).logits[0, len(row) - count - 1 : -1], -1)
            .gather(-1, row[-count:, None])[:, 0]
            .double()
            for model in models
        )
        apart = (ours - theirs).detach()
        advantage = float(batch.rewards[i]) - COEF * apart
        weight = masks[i] / masks[i].sum().clamp_min(1) / len(tokens)
        total = total - (weight * advantage * torch.exp(ours - ours.detach())).sum()
        reverse = reverse + (weight * apart).sum()
    total.backward()
    return total.item(), reverse.item(), {n: p.grad for n, p in models[0].named_parameters()}


@pytest.mark.parametrize("name", ["same", "stored", "larger"])
def test_loss_and_gradients_are_those_written_down(results, name):
    student, teachers, kept = results
    loss, reverse, want = plain(student, teachers["same" if name == "stored" else name])
    for layout in (layout for sizes in LAYOUTS.values() for layout in sizes):
        metrics, gradients = kept[f"{name}-{layout}"]
        assert metrics["train/loss"][0] == pytest.approx(loss, rel=1e-5), layout
        assert metrics["train/opd_reverse_kl"][0] == pytest.approx(reverse, rel=1e-5), layout
        off = [gradients[key] - value for key, value in want.items()]
        assert size(off) <= 1e-5 * size(want.values()), layout


def test_the_planner_foretells_the_teachers_bytes(results):
    """One of another shape is on the device; one of the policy's waits on the host."""
    student, teachers, kept = results
    for world, layouts in LAYOUTS.items():
        for layout, sizes in layouts.items():
            found = {}
            for name, teacher in {**teachers, "none": None}.items():
                cfg = configuration(student, teacher or student)
                cfg.algo.use_opd = teacher is not None
                found[name] = planner.plan(
                    cfg,
                    placement(world, **sizes),
                    architecture.read(student),
                    planner.GPUS["h100"],
                    teacher=planner.find_teacher(cfg),
                ).stages[0]
            assert found["larger"].teacher == kept[f"bytes-larger-{layout}"], layout
            more = found["larger"].phases["train"] - found["none"].phases["train"]
            assert more == found["larger"].teacher
            assert found["same"].teacher == 0
            assert found["same"].host - found["none"].host == 2 * found["same"].weights
