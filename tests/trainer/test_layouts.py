"""One ragged batch under many layouts and splits: the same loss, gradients and metrics."""

from __future__ import annotations

import pytest
import torch

from tests.models import tiny_model
from tests.ranks import run_ranks
from tests.trainer.cases import Ranks, config, ok, ragged_batch

# The step's algorithm: everything at once, so that one comparison covers all terms.
ALGO = {
    "use_kl_loss": True,
    "kl_loss_coef": 0.2,
    "kl_loss_type": "low_var_kl",
    "entropy_coef": 0.01,
    "normalize_advantages": True,
    "use_tis": True,
}
SPLITS = {
    "dynamic": {},
    "one_each": {"use_dynamic_batch_size": False, "micro_batch_size": 1},
    "long": {"max_tokens_per_gpu": 400, "log_probs_chunk_size": 7},
}
LAYOUTS: dict[int, dict[str, dict[str, int]]] = {
    1: {"tp1": {}},
    2: {"tp2": {"tp": 2}, "tp2_sp": {"tp": 2}, "dp2": {}, "pp2": {"pp": 2}, "cp2": {"cp": 2}},
    4: {"tp2_dp2": {"tp": 2}},
}
TIED: dict[int, dict[str, dict[str, int]]] = {
    1: {"tp1": {}},
    2: {"tp2": {"tp": 2}, "pp2": {"pp": 2}},
}


def rank_layouts(model: str, tied: str, folder: str) -> None:
    with Ranks() as ranks:
        for name, sizes in TIED.get(ranks.world, {}).items():  # a smaller model, one split
            keys = {"use_distributed_optimizer": False}
            trainer = ranks.trainer(config(tied, algo=ALGO, megatron=keys), **sizes)
            metrics = ranks.train(trainer, ragged_batch())
            ranks.keep(folder, f"{name}_tied", (metrics, ranks.gradients(trainer)))
        for name, sizes in LAYOUTS[ranks.world].items():
            megatron = {"use_distributed_optimizer": False}
            megatron["sequence_parallel"] = name.endswith("_sp")
            for split, train in SPLITS.items():
                for per_token in (False, True):
                    cfg = config(
                        model,
                        algo=ALGO | {"calculate_per_token_loss": per_token},
                        train={"lr": 0.0, "clip_grad": 1e9, "use_dynamic_batch_size": True,
                               "max_tokens_per_gpu": 64} | train,
                        megatron=megatron,
                    )  # fmt: skip
                    trainer = ranks.trainer(cfg, **sizes)
                    metrics = ranks.train(trainer, ragged_batch())
                    case = f"{name}-{split}-{'token' if per_token else 'sample'}"
                    ranks.keep(folder, case, (metrics, ranks.gradients(trainer)))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    model = tiny_model("qwen3", kv_heads=2, vocab=275, tied=False)  # odd: padded over tp
    tied = tiny_model("qwen2", kv_heads=1, tied=True)
    for world in LAYOUTS:
        ok(run_ranks(world, rank_layouts, str(model), str(tied), str(folder), limit=240))
    return {path.stem: torch.load(path, weights_only=False) for path in folder.glob("*.pt")}


CASES = [
    f"{name}-{split}"
    for layouts in LAYOUTS.values()
    for name in layouts
    for split in SPLITS
    if f"{name}-{split}" != "tp1-dynamic"
]


def size(tensors):
    return torch.stack([t.norm() for t in tensors]).norm()


@pytest.mark.parametrize("per_token", ["sample", "token"])
@pytest.mark.parametrize("case", CASES)
def test_loss_gradients_and_metrics_do_not_depend_on_the_split(results, case, per_token):
    check_equal(results[f"{case}-{per_token}"], results[f"tp1-dynamic-{per_token}"])


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_tied_embeddings(results, layout):
    """With fewer query groups than tensor-parallel ranks, too."""
    check_equal(results[f"{layout}_tied"], results["tp1_tied"])


def check_equal(found, expected):
    (metrics, gradients), (want_metrics, want) = found, expected
    assert gradients.keys() == want.keys()
    off = {name: gradients[name] - gradient for name, gradient in want.items()}
    assert size(off.values()) <= 1e-6 * size(want.values())
    for name, gradient in want.items():  # small ones are differences of large terms
        assert off[name].norm() <= 2e-6 * gradient.norm(), name
    assert metrics.keys() == want_metrics.keys()
    for name, value in want_metrics.items():
        if name != "alarm" and not name.startswith("perf/"):  # a sentence with the same numbers
            assert metrics[name] == pytest.approx(value, rel=2e-6, abs=2e-7), name


def test_the_metrics_are_all_there(results):
    metrics, _ = results["tp1-dynamic-sample"]
    train = (
        "loss pg_loss entropy_loss pg_clipfrac ppo_kl kl_loss train_rollout_logprob_abs_diff "
        "train_rollout_logprob_abs_diff_max ois tis tis_clipfrac tis_abs grad_norm lr-pg_0"
    )
    rollout = (
        "log_probs ref_log_probs rollout_log_probs advantages returns rewards raw_reward "
        "response_lengths total_lengths truncated"
    )
    names = [f"train/{n}" for n in train.split()] + [f"rollout/{n}" for n in rollout.split()]
    assert not set(names) - set(metrics)
    assert metrics["train/ppo_kl"] == [0.0] and metrics["train/kl_loss"] == [0.0]
    assert metrics["rollout/log_probs"] == metrics["rollout/ref_log_probs"]
    assert metrics["perf/actor_train_tok_per_s"] > 0
