"""Every estimator, loss and aggregation under every layout against one plain float64 statement.

The model's forward pass is Hugging Face's in float64, the loss is tests/trainer/plain.py; loss and
gradients of all parameters agree to 1e-6 of their scale. One start of two ranks (and one of one
rank) goes through all layouts and cases, with one trainer a layout.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from tests.models import tiny_model
from tests.ranks import run_ranks
from tests.trainer.cases import Ranks, config, ok, ragged_batch
from tests.trainer.plain import MAX_RESPONSE, Known, step_loss

ESTIMATORS = {
    "grpo": {},
    "gspo": {"advantage_estimator": "gspo", "eps_clip": 0.01, "eps_clip_high": 0.02},
    "cispo": {"advantage_estimator": "cispo", "eps_clip": 1.0, "eps_clip_high": 0.2},
    "rloo": {"advantage_estimator": "rloo"},
    "reinforce_plus_plus": {
        "advantage_estimator": "reinforce_plus_plus",
        "normalize_advantages": True,
        "kl_coef": 0.1,
        "gamma": 0.9,
    },
    "baseline": {
        "advantage_estimator": "reinforce_plus_plus_baseline",
        "normalize_advantages": True,
        "kl_coef": 0.1,
        "kl_loss_type": "k2",
    },
}
AGGREGATIONS = {
    "sample": {},
    "token": {"calculate_per_token_loss": True},
    "dr_grpo": {"custom_pg_loss_reducer_function_path": "spmd_rl.algo.dr_grpo.reducer"},
}
OFF_POLICY = {"use_rollout_logprobs": True, "entropy_coef": 0.01}  # else every ratio is 1
KL = {"use_kl_loss": True, "kl_loss_coef": 0.1}  # more, and gradients nearly cancel: rounding shows
TERMS = {
    "dual_clip": OFF_POLICY | {"eps_clip_c": 1.1},
    "opsm": OFF_POLICY | {"use_opsm": True, "opsm_delta": 0.01},
    "dr_std": OFF_POLICY | {"disable_grpo_std_normalization": True},
    "k1": KL | {"kl_loss_type": "k1"},
    "k2_unbiased": KL | OFF_POLICY | {"kl_loss_type": "k2", "use_unbiased_kl": True},
    "k3": KL | {"kl_loss_type": "k3"},
    "low_var_unbiased": KL | OFF_POLICY | {"kl_loss_type": "low_var_kl", "use_unbiased_kl": True},
    "tis": {"use_tis": True, "tis_clip": 1.2},
    "icepop": {"use_tis": True, "tis_mode": "mask", "tis_clip_low": 0.8, "tis_clip": 1.2},
    "mis_sequence": {
        "use_tis": True,
        "tis_level": "sequence",
        "tis_mode": "truncate",
        "tis_upper_bound": 3.0,
        "use_rs": True,
        "rs_veto_threshold": 0.6,
        "rs_lower_bound": 0.5,
    },
    "mis_geometric": {
        "use_tis": True,
        "tis_level": "geometric",
        "tis_upper_bound": 1.05,
        "use_rs": True,
        "rs_level": "geometric",
        "rs_upper_bound": 1.1,
        "entropy_coef": 0.01,
    },
    "normalised": {"use_tis": True, "tis_batch_normalize": True, "tis_upper_bound": 1.5},
    "rejected_only": OFF_POLICY | {"use_rs": True, "rs_upper_bound": 1.3},
}
CASES = {
    f"{name}-{how}": OFF_POLICY | algo | more
    for name, algo in ESTIMATORS.items()
    for how, more in AGGREGATIONS.items()
}
CASES |= {
    f"{name}-{how}": algo | AGGREGATIONS[how]
    for (name, algo), how in zip(TERMS.items(), [*AGGREGATIONS] * 5, strict=False)
}
LAYOUTS = {1: {"dp1": {}}, 2: {"dp2": {}, "cp2": {"cp": 2}, "tp2": {"tp": 2}, "pp2": {"pp": 2}}}
AWAY = 0.3  # of the way to another model is where the reference model stands
GROUPS = [0, 0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 3]  # of unequal size; samples 2 and 3 are one rollout


def batch_for(algo: dict, sampled: np.ndarray):
    """Masked tokens, a fully masked sample (not where that is an error), one-token responses."""
    from spmd_rl.algo.rewards import normalise

    batch = ragged_batch(longest=24)
    estimator = algo.get("advantage_estimator", "grpo")
    if estimator == "reinforce_plus_plus":
        ends = batch.response_lengths.cumsum()
        batch.loss_mask[ends - 1] = 1
    batch.raw_rewards[3] = batch.raw_rewards[2]
    rewards = normalise(
        batch.raw_rewards,
        np.array(GROUPS),
        estimator,
        rollout_ids=batch.rollout_ids,
        use_std=not algo.get("disable_grpo_std_normalization"),
    )
    return dataclasses.replace(batch, rewards=rewards, rollout_log_probs=sampled)


def rank_cases(model: str, other: str, folder: str) -> None:
    from spmd_rl.trainer.loss import Loss
    from spmd_rl.weights import export, hf

    with Ranks() as ranks:
        sampled = np.load(f"{folder}/sampled.npy")
        for layout, sizes in LAYOUTS[ranks.world].items():
            trainer = ranks.trainer(config_of(model, KL), **sizes)
            parameters = export.named_parameters(trainer.actor.chunks)
            split = trainer.groups.tp_rank, trainer.groups.tp_size
            hf.load(other, parameters, trainer.actor.names, split)
            reference = trainer.reference
            for kept, (_, parameter) in zip(reference.weights, parameters, strict=True):
                kept.lerp_(parameter.detach(), AWAY)
            hf.load(model, parameters, trainer.actor.names, split)
            for name, algo in CASES.items():
                trainer.cfg = config_of(model, algo)
                trainer.loss = Loss(trainer.cfg)
                uses = algo.get("use_kl_loss") or algo.get("kl_coef")
                trainer.reference = reference if uses else None
                metrics = ranks.train(trainer, batch_for(algo, sampled))
                gradients = ranks.gradients(trainer)
                ranks.keep(folder, f"{layout}-{name}", (metrics["train/loss"], gradients))


def config_of(model: str, algo: dict):
    return config(
        model,
        algo=algo,
        megatron={"use_distributed_optimizer": False},
        rollout={"rollout_batch_size": 6, "n_samples_per_prompt": 2, "num_rollout": 4,
                 "rollout_max_response_len": MAX_RESPONSE, "rollout_temperature": 0.9},
    )  # fmt: skip


def load(path, towards=None):
    """The model in float64, perhaps part of the way to another one."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    if towards is not None:
        others = AutoModelForCausalLM.from_pretrained(towards, dtype=torch.float32).parameters()
        with torch.no_grad():
            for parameter, other in zip(model.parameters(), others, strict=True):
                parameter.lerp_(other, AWAY)
    return model.double()


def values_of(model, batch, gradient: bool):
    """(log-probs, entropies) of each sample, in float64."""
    log_probs, entropies = [], []
    with torch.set_grad_enabled(gradient):
        lengths = batch.total_lengths.tolist(), batch.response_lengths.tolist()
        tokens = torch.from_numpy(batch.tokens).long().split(lengths[0])
        for sample, size in zip(tokens, lengths[1], strict=True):
            logits = model(sample[None]).logits[0, len(sample) - size - 1 : -1] / 0.9
            log_p = torch.log_softmax(logits.double(), -1)
            log_probs.append(log_p.gather(-1, sample[-size:, None])[:, 0])
            entropies.append(-(log_p.exp() * log_p).sum(-1))
    return log_probs, entropies


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Folder, and a function that gives the plain loss, its scale and its gradients of a case."""
    folder = tmp_path_factory.mktemp("plain")
    paths = [tiny_model("qwen3", kv_heads=2, tied=False, seed=seed) for seed in (0, 1)]
    batch = ragged_batch(longest=24)
    model = load(paths[0])
    log_probs, entropies = values_of(model, batch, True)
    reference, _ = values_of(load(paths[0], paths[1]), batch, False)
    noise = np.random.default_rng(5).normal(0, 0.25, len(batch.loss_mask))
    whole = torch.cat(log_probs).detach().numpy() + noise
    sampled = np.minimum(whole, -1e-3).astype(np.float32)
    np.save(folder / "sampled.npy", sampled)

    def plain(name: str):
        algo = CASES[name]
        made = batch_for(algo, sampled)
        lengths = made.response_lengths.tolist()
        masks = torch.from_numpy(made.loss_mask).split(lengths)
        engine = torch.from_numpy(sampled).double().split(lengths)
        known = [
            Known(masks[i].tolist(), float(made.raw_rewards[i]), GROUPS[i],
                  int(made.rollout_ids[i]), engine[i], reference[i])
            for i in range(len(lengths))
        ]  # fmt: skip
        loss, scale = step_loss(log_probs, entropies, known, algo)
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        return loss.item(), scale, dict(zip(names, gradients, strict=True))

    for world in LAYOUTS:
        args = (str(paths[0]), str(paths[1]), str(folder))
        ok(run_ranks(world, rank_cases, *args, limit=240))
    return folder, plain


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(expected, case):
    folder, plain = expected
    loss, scale, gradients = plain(case)
    size = torch.stack([g.norm() for g in gradients.values()]).norm()
    found = {}
    for layout in (name for layouts in LAYOUTS.values() for name in layouts):
        (value,), got = torch.load(folder / f"{layout}-{case}.pt", weights_only=False)
        off = torch.stack([(got[k].double() - g).norm() for k, g in gradients.items()]).norm()
        found[layout] = (abs(value - loss) / scale, (off / size).item())
    print(case, json.dumps(found))
    for layout, (of_loss, of_gradients) in found.items():
        assert of_loss <= 1e-6, layout
        assert of_gradients <= 1e-6, layout


def test_the_cases_are_hard_enough(expected):
    """Something is clipped, masked, dropped: no two cases of one estimator have the same loss."""
    _, plain = expected
    losses = [plain(case)[0] for case in CASES]
    assert len({round(value, 9) for value in losses}) == len(losses)
    batch = ragged_batch(longest=24)
    first = batch.response_lengths[0]
    assert not batch.loss_mask[:first].any() and 1 in batch.response_lengths
