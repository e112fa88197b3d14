"""PPO's critic under every layout against one plain float64 statement; its first weights; what
freezing, resuming and the critic-only rollouts leave untouched.

The critic's forward pass is Hugging Face's token classification with one label, in float64.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.models import tiny_model
from tests.ranks import run_ranks
from tests.trainer.cases import Ranks, config, ok, ragged_batch
from tests.trainer.plain import MAX_RESPONSE, Known, step_loss, value_step_loss
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
