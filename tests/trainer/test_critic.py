"""PPO's critic under every layout against one plain float64 statement; its first weights; what
freezing, resuming and the critic-only rollouts leave untouched.

The critic's forward pass is Hugging Face's token classification with one label, in float64.
"""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch

from spmd_rl import architecture, planner
from spmd_rl.config import load as load_config
from tests.models import ROOT, tiny_model
from tests.ranks import run_ranks
from tests.trainer.cases import Ranks, config, ok, placement, ragged_batch
from tests.trainer.plain import MAX_RESPONSE, Known, step_loss, value_step_loss
from tests.trainer.test_families import bytes_held
from tests.trainer.test_plain import GROUPS, batch_for, load, values_of

PPO = {"advantage_estimator": "ppo", "use_rollout_logprobs": True, "kl_coef": 0.1}
DISCOUNT = {"gamma": 0.9, "lambd": 0.95}
CASES = {  # and how far the old values lie above the critic's, as if a step had been taken
    "sample": (PPO | DISCOUNT | {"value_clip": 10.0}, 0.0),
    "token": (PPO | {"normalize_advantages": True, "calculate_per_token_loss": True,
                     "value_clip": 10.0}, 0.0),
    "clipped": (PPO | DISCOUNT | {"value_clip": 0.1}, 0.2),
}  # fmt: skip
LAYOUTS = {
    1: {"dp1": {}},
    2: {"dp2": {}, "cp2": {"cp": 2}, "tp2": {"tp": 2}, "sp2": {"tp": 2}, "pp2": {"pp": 2}},
}
EXPERTS = {"dp2": {}, "ep2": {"ep": 2}, "tp2": {"tp": 2}}


def config_of(model: str, algo: dict, critic: str | None = None, **sections):
    megatron = {"use_distributed_optimizer": False} | sections.pop("megatron", {})
    made = config(
        model,
        algo=algo,
        megatron=megatron,
        rollout={"rollout_batch_size": 6, "n_samples_per_prompt": 2, "num_rollout": 4,
                 "rollout_max_response_len": MAX_RESPONSE, "rollout_temperature": 0.9},
        **sections,
    )  # fmt: skip
    made.model.critic_load = critic
    return made


def shift_values(critic, by: float) -> None:
    """Old values that are not those of the step."""
    forward = type(critic.passes).forward

    def shifted(data):
        return [column + by for column in forward(critic.passes, data)]

    critic.passes.forward = shifted


def rank_cases(model: str, critic: str, experts: str, folder: str) -> None:
    with Ranks() as ranks:
        sampled = np.load(f"{folder}/sampled.npy")
        for layout, sizes in LAYOUTS[ranks.world].items():
            megatron = {"sequence_parallel": layout == "sp2"}
            trainer = ranks.trainer(config_of(model, PPO, critic, megatron=megatron), **sizes)
            for name, (algo, shift) in CASES.items():
                trainer.cfg = trainer.loss.cfg = config_of(model, algo, critic)
                shift_values(trainer.critic, shift)
                metrics = ranks.train(trainer, batch_for(algo, sampled))
                held = bytes_held(trainer.critic)
                torch.save(held, f"{folder}/held-{layout}-{ranks.rank}.pt")
                both = [ranks.gradients(trainer, critic=of) for of in (False, True)]
                ranks.keep(folder, f"{layout}-{name}", (metrics, *both))
        for layout, sizes in (EXPERTS if ranks.world > 1 else {}).items():
            cfg = config_of(experts, PPO, megatron={"expert_tensor_parallel_size": 1})
            trainer = ranks.trainer(cfg, **sizes)
            metrics = ranks.train(trainer, batch_for(PPO, sampled))
            ranks.keep(folder, f"experts-{layout}", metrics)


def critic_model(folder):
    """A directory of a critic with a value layer of its own, and the model in float64."""
    from transformers import AutoModelForTokenClassification

    trunk = tiny_model("qwen3", kv_heads=2, tied=False, seed=1)
    model = AutoModelForTokenClassification.from_pretrained(trunk, num_labels=1).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        model.score.weight.normal_(0, 0.1)
        model.score.bias.fill_(0.3)
    model.save_pretrained(folder)
    return model.double()


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Folder; of a case the plain losses and gradients of actor and critic."""
    folder = tmp_path_factory.mktemp("critic")
    path = tiny_model("qwen3", kv_heads=2, tied=False, seed=0)
    critic = critic_model(folder / "critic")
    batch = ragged_batch(longest=24)
    totals, sizes = batch.total_lengths.tolist(), batch.response_lengths.tolist()
    actor = load(path)
    log_probs, entropies = values_of(actor, batch, True)
    own = [p.detach() for p in log_probs]
    noise = np.random.default_rng(5).normal(0, 0.25, len(batch.loss_mask))
    sampled = np.minimum(torch.cat(own).numpy() + noise, -1e-3).astype(np.float32)
    np.save(folder / "sampled.npy", sampled)
    engine = torch.from_numpy(sampled).double().split(sizes)
    values = [
        critic(tokens[None]).logits[0, len(tokens) - size - 1 : -1, 0]
        for tokens, size in zip(
            torch.from_numpy(batch.tokens).long().split(totals), sizes, strict=True
        )
    ]

    def plain(name: str):
        algo, shift = CASES[name]
        made = batch_for(algo, sampled)
        masks = torch.from_numpy(made.loss_mask).split(sizes)
        known = [
            Known(masks[i].tolist(), float(made.raw_rewards[i]), GROUPS[i],
                  int(made.rollout_ids[i]), engine[i], own[i], values[i].detach() + shift)
            for i in range(len(sizes))
        ]  # fmt: skip
        loss, scale = step_loss(log_probs, entropies, known, algo)
        ours = value_step_loss(values, list(engine), known, algo)
        return (loss.item(), scale, gradients(loss, actor)), (ours.item(), gradients(ours, critic))

    for world in LAYOUTS:
        args = (str(path), str(folder / "critic"), str(tiny_model("qwen3_moe")), str(folder))
        ok(run_ranks(world, rank_cases, *args, limit=240))
    return folder, plain


def gradients(loss, model):
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, retain_graph=True)
    return dict(zip(names, found, strict=True))


def distance(got, wanted) -> float:
    off = torch.stack([(got[k].double() - g).norm() for k, g in wanted.items()]).norm()
    return (off / torch.stack([g.norm() for g in wanted.values()]).norm()).item()


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_of_both_models(expected, case):
    folder, plain = expected
    (loss, scale, of_actor), (value_loss, of_critic) = plain(case)
    found = {}
    for layout in (name for layouts in LAYOUTS.values() for name in layouts):
        metrics, actor, critic = torch.load(folder / f"{layout}-{case}.pt", weights_only=False)
        assert critic.keys() == of_critic.keys()
        found[layout] = (
            abs(metrics["train/loss"][0] - loss) / scale,
            distance(actor, of_actor),
            abs(metrics["train/critic-value_loss"][0] - value_loss) / value_loss,
            distance(critic, of_critic),
        )
        assert (metrics["train/critic-value_clipfrac"][0] > 0.2) == (case == "clipped")
    print(case, json.dumps(found))
    for layout, figures in found.items():
        assert max(figures) <= 1e-6, (layout, figures)


def test_a_critic_of_experts_is_the_same_under_any_layout(expected):
    folder, _ = expected
    names = ("train/critic-value_loss", "train/critic-grad_norm", "rollout/values")
    found = [torch.load(folder / f"experts-{layout}.pt") for layout in EXPERTS]
    for name in names:
        first, *others = [metrics[name] for metrics in found]
        for other in others:
            assert other == pytest.approx(first, rel=1e-5), name
    assert abs(found[0]["rollout/values"]) < 0.5  # a new value layer begins near 0


def test_the_planner_foretells_the_critics_bytes(expected):
    folder, _ = expected
    model = str(tiny_model("qwen3", kv_heads=2, tied=False, seed=0))
    for world, layouts in LAYOUTS.items():
        for layout, sizes in layouts.items():
            made = planner.plan(
                config_of(model, PPO),
                placement(world, **sizes),
                architecture.read(model),
                planner.GPUS["h100"],
            )
            for rank in range(world):
                stage, *held = torch.load(folder / f"held-{layout}-{rank}.pt")
                assert made.stages[stage].critic == sum(held), layout


def test_planned_models_take_turns_only_where_the_trainer_is_offloaded():
    path = ROOT / "configs" / "qwen3-4b.yaml"
    totals = []
    for overrides in (["advantage_estimator=grpo"], ["advantage_estimator=ppo"],
                      ["advantage_estimator=ppo", "offload_train=false"]):  # fmt: skip
        cfg, place = load_config(path, overrides, 8, check_files=False)
        made = planner.plan(cfg, place, planner.find_architecture(cfg, path), planner.GPUS["h100"])
        totals.append(made.stages[0].phases["train"])
    assert totals[0] == totals[1] < totals[2]


RESUMED = {
    "lr": 3e-3,
    "critic_lr": 1e-2,
    "critic_lr_warmup_iters": 2,
    "clip_grad": 1.0,
    "global_batch_size": 6,
    "lr_decay_style": "cosine",
    "freeze_params_name_list": [r"layers\.0\."],
}


def rank_resume(model: str, folder: str) -> None:
    """Rollout 0 is the critic's alone; saved after rollout 1, asynchronously; resumed."""
    with Ranks() as ranks:
        algo = PPO | {"num_critic_only_steps": 1}
        cfg = config_of(model, algo, train=RESUMED, checkpoint={"async_save": True})
        cfg.rollout.num_steps_per_rollout = 2
        path = f"{folder}/saved"
        os.makedirs(path, exist_ok=True)
        trainer = ranks.trainer(cfg, num_steps=8)
        found = [weights(trainer)]
        rates = []
        for rollout in range(4):
            metrics = ranks.train(trainer, batch_of(rollout), rollout)
            rates.append([metrics.get(f"train/{who}lr-pg_0") for who in ("", "critic-")])
            found.append(weights(trainer))
            if rollout == 1:
                trainer.begin_save(path)
        assert "failure" not in trainer.finish_save()
        torch.distributed.barrier()
        resumed = ranks.trainer(cfg, num_steps=8)
        resumed.load_checkpoint(path)
        later = []
        for rollout in (2, 3):
            ranks.train(resumed, batch_of(rollout), rollout)
            later.append(weights(resumed))
        ranks.keep(folder, "resumed", (found, later, rates))
        # another layout: the same two models, and a run without a critic reads the actor's
        other = ranks.trainer(cfg, num_steps=8, tp=2)
        other.load_checkpoint(path)
        ranks.keep(folder, "tp2", weights(other))
        alone = ranks.trainer(config_of(model, {}, train=RESUMED), num_steps=8)
        alone.load_checkpoint(path)
        ranks.keep(folder, "alone", weights(alone))


def batch_of(rollout: int):
    return ragged_batch(seed=rollout, siblings=False)


def weights(trainer):
    both = {"actor": trainer.actor} | ({"critic": trainer.critic} if trainer.critic else {})
    return {
        who: {name: value.clone() for name, value in learner.hf_tensors()}
        for who, learner in both.items()
    }


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumed")
    model = str(tiny_model("qwen3", kv_heads=2, tied=True))
    ok(run_ranks(2, rank_resume, model, str(folder), limit=240))
    return folder


def same(ours, theirs) -> bool:
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_critic_only_rollouts_leave_the_actor_untouched(resumed):
    found, _, rates = torch.load(resumed / "resumed.pt")
    actors, critics = ([state[who] for state in found] for who in ("actor", "critic"))
    assert same(actors[0], actors[1]) and not same(actors[1], actors[2])
    assert not same(critics[0], critics[1])
    assert rates[0][0] is None  # and its schedule begins, and ends, as if it had not been there
    assert rates[1][0][0] == pytest.approx(3e-3) and rates[3][0][1] > 0
    assert [rate[1][0] for rate in rates[:2]] == pytest.approx([0.0, 1e-2])
    trunk = {name: value for name, value in critics[0].items() if not name.startswith("score.")}
    assert same(trunk, {n: v for n, v in actors[0].items() if n != "lm_head.weight"})
    for states in (actors, critics):  # frozen
        for name in states[0]:
            moved = not torch.equal(states[0][name], states[-1][name])
            assert moved == ("layers.0." not in name), name


def test_both_models_resume_bitwise_and_in_another_layout(resumed):
    found, later, _ = torch.load(resumed / "resumed.pt")
    for who in ("actor", "critic"):
        for ours, theirs in zip(later, found[3:], strict=True):
            assert same(ours[who], theirs[who])
        assert same(torch.load(resumed / "tp2.pt")[who], found[2][who])
    alone = torch.load(resumed / "alone.pt")
    assert alone.keys() == {"actor"} and same(alone["actor"], found[2]["actor"])
