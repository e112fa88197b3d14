"""Going on from a checkpoint, bitwise; in another layout; weights alone. Two runs are one run."""

from __future__ import annotations

import os

import pytest
import torch

from tests.models import tiny_model
from tests.ranks import run_ranks
from tests.trainer.cases import Ranks, config, ok, ragged_batch

TRAIN = {
    "lr": 3e-3,
    "clip_grad": 1.0,
    "use_dynamic_batch_size": True,
    "max_tokens_per_gpu": 128,
    "global_batch_size": 6,
    "lr_decay_style": "cosine",
    "lr_warmup_iters": 2,
}
ALGO = {"use_kl_loss": True, "kl_loss_coef": 0.1}


def settings(model: str, **more):
    train = TRAIN | more.pop("train", {})
    return config(model, algo=ALGO | more.pop("more", {}), train=train, **more)


def weights(trainer):
    return {name: value.clone() for name, value in trainer.hf_tensors()}


def rollouts(ranks, trainer, numbers):
    batches = [ragged_batch(seed=k, siblings=False) for k in numbers]
    return [ranks.train(trainer, b, k)["train/loss"] for k, b in zip(numbers, batches, strict=True)]


def finish(trainer) -> None:
    assert "failure" not in trainer.finish_save()
    torch.distributed.barrier()


def save(trainer, path: str) -> None:
    os.makedirs(path, exist_ok=True)
    trainer.begin_save(path)
    finish(trainer)


def rank_resume(model: str, folder: str) -> None:
    with Ranks() as ranks:
        kinds = {"fp32": {}, "bf16": {"bf16": True}}
        for kind, megatron in kinds.items():
            case = f"{kind}-{ranks.world}"
            cfg = settings(model, megatron=megatron)
            for name in ("once", "again"):
                trainer = ranks.trainer(cfg, num_steps=8)
                losses = rollouts(ranks, trainer, (0, 1))
                path = f"{folder}/{case}-{name}"
                os.makedirs(path, exist_ok=True)
                trainer.begin_save(path)
                if name == "once":
                    finish(trainer)
                losses += rollouts(ranks, trainer, (2, 3))
                if name == "again":  # asynchronous: what was trained since is not in it
                    finish(trainer)
                ranks.keep(folder, f"{case}-{name}", (losses, weights(trainer)))
            overlapped = {"overlap_grad_reduce": True, "overlap_param_gather": True}
            trainer = ranks.trainer(settings(model, megatron=megatron | overlapped), num_steps=8)
            losses = rollouts(ranks, trainer, (0, 1, 2, 3))
            ranks.keep(folder, f"{case}-overlapped", (losses, weights(trainer)))
            trainer = ranks.trainer(cfg, num_steps=8)
            trainer.load_checkpoint(f"{folder}/{case}-again")
            losses = rollouts(ranks, trainer, (2, 3))
            ranks.keep(folder, f"{case}-resumed", (losses, weights(trainer)))
        keep_moving_reference(ranks, model, folder)


def keep_moving_reference(ranks, model: str, folder: str) -> None:
    """The reference follows every two rollouts; a part of the model is frozen."""
    frozen = {"freeze_params_name_list": ["embedding", "layers.0.mlp"]}
    cfg = settings(model, train=frozen, more={"ref_update_interval": 2})
    trainer = ranks.trainer(cfg, num_steps=8)
    rollouts(ranks, trainer, (0, 1))
    path = f"{folder}/moving-{ranks.world}"
    save(trainer, path)
    once = rollouts(ranks, trainer, (2, 3)), weights(trainer)
    trainer = ranks.trainer(cfg, num_steps=8)
    trainer.load_checkpoint(path)
    again = rollouts(ranks, trainer, (2, 3)), weights(trainer)
    trainer = ranks.trainer(cfg, num_steps=8)
    trainer.load_checkpoint(path, optimizer=False, random=False)
    other = rollouts(ranks, trainer, (2, 3)), weights(trainer)
    ranks.keep(folder, f"moving-{ranks.world}", (once, again, other))


def rank_other_layout(model: str, folder: str) -> None:
    """What two data-parallel ranks saved, read by two tensor-parallel ranks; and weights alone."""
    with Ranks() as ranks:
        cfg = settings(model)
        trainer = ranks.trainer(cfg, num_steps=8, tp=2)
        before = weights(trainer)
        trainer.load_checkpoint(f"{folder}/fp32-2-once")
        loaded = weights(trainer)
        losses = rollouts(ranks, trainer, (2, 3))
        trainer.save_hf(f"{folder}/hf-tp2")
        ranks.keep(folder, "tp2", (before, loaded, losses, weights(trainer)))

        no_optimizer = {"no_save_optim": True}
        plain = ranks.trainer(settings(model, checkpoint=no_optimizer), num_steps=8)
        plain.load_checkpoint(f"{folder}/fp32-2-once", optimizer=False)
        save(plain, f"{folder}/weights-only")
        again = ranks.trainer(settings(model, checkpoint=no_optimizer), num_steps=8)
        again.load_checkpoint(f"{folder}/weights-only", optimizer=False)
        ranks.keep(folder, "weights_only", weights(again))
        with pytest.raises(ValueError, match="no optimizer state"):
            ranks.trainer(cfg, num_steps=8).load_checkpoint(f"{folder}/weights-only")


def rank_megatron(model: str, folder: str) -> None:
    """Megatron's own loader reads what we wrote, and we read the weights that it wrote."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    with Ranks() as ranks:
        ours = ranks.trainer(settings(model), num_steps=8)
        [chunk] = ours.actor.chunks
        metadata = {"dp_cp_group": ours.groups.dp_cp}

        def sharded():
            return {"model": chunk.sharded_state_dict(metadata=metadata)}

        # log_all: as --dist-ckpt-strictness; the extra states that Megatron wants hold nothing
        loaded = dist_checkpointing.load(
            sharded(), f"{folder}/fp32-2-once", strict=StrictHandling.LOG_ALL
        )
        chunk.load_state_dict(loaded["model"], strict=False)
        read_by_megatron = weights(ours)
        theirs = f"{folder}/megatron/iter_0000007"
        os.makedirs(theirs, exist_ok=True)
        dist_checkpointing.save(sharded(), theirs)
        fresh = ranks.trainer(settings(model), num_steps=8)
        fresh.load_checkpoint(theirs, optimizer=False, random=False)
        ranks.keep(folder, "megatron", (read_by_megatron, weights(fresh)))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = str(tiny_model("qwen3", kv_heads=2, tied=True))
    for world in (1, 2):
        ok(run_ranks(world, rank_resume, model, str(folder), limit=200))
    ok(run_ranks(2, rank_other_layout, model, str(folder), limit=200))
    ok(run_ranks(1, rank_megatron, model, str(folder), limit=200))
    kept = {p.stem: torch.load(p, weights_only=False) for p in folder.glob("*.pt")}
    return folder, model, kept


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("case", ["fp32-1", "fp32-2", "bf16-1", "bf16-2"])
def test_two_runs_and_a_resumed_one_end_bitwise_equal(results, case):
    _, _, kept = results
    (losses, want), (again, repeated), (later, resumed), (_, overlapped) = (
        kept[f"{case}-{name}"] for name in ("once", "again", "resumed", "overlapped")
    )
    assert losses == again and losses[2:] == later
    assert same(want, repeated)
    assert same(want, resumed)
    assert same(want, overlapped)  # communication beside computation changes no bit
    assert len({float(x) for step in losses for x in step}) == 8  # two different steps a rollout


@pytest.mark.parametrize("world", [1, 2])
def test_a_reference_that_moved_and_frozen_parts_are_gone_on_with(results, world):
    _, _, kept = results
    (losses, want), (again, resumed), (other, _) = kept[f"moving-{world}"]
    assert losses == again and same(want, resumed)
    assert losses != other  # weights alone: compared with the first model again


def test_data_parallel_is_the_same_run(results):
    _, _, kept = results
    (one, alone), (two, both) = kept["fp32-1-once"], kept["fp32-2-once"]
    assert sum(one, []) == pytest.approx(sum(two, []), rel=1e-4)
    for name, value in alone.items():
        assert (both[name] - value).abs().max() <= 1e-4, name


def test_another_layout_goes_on_where_the_first_stopped(results):
    folder, model, kept = results
    from safetensors.torch import load_file

    before, loaded, losses, after = kept["tp2"]
    start = load_file(f"{model}/model.safetensors")
    assert same(before, start)
    assert not same(loaded, start)
    assert sum(losses, []) == pytest.approx(sum(kept["fp32-2-once"][0][2:], []), rel=1e-4)
    assert same(load_file(folder / "hf-tp2" / "model.safetensors"), after)


def test_weights_without_an_optimizer(results):
    _, _, kept = results
    assert same(kept["weights_only"], kept["tp2"][1])


def test_the_files_are_megatron_s(results):
    _, _, kept = results
    by_megatron, from_megatron = kept["megatron"]
    assert same(by_megatron, kept["tp2"][1])
    assert same(from_megatron, kept["tp2"][1])
