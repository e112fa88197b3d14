"""The trainer against Hugging Face transformers: logits, loss, gradients, updates, and files."""

from __future__ import annotations

import json

import pytest
import torch

from tests.models import tiny_model
from tests.ranks import run_ranks
from tests.trainer.cases import Ranks, config, ok, ragged_batch, shard_of
from tools.parity.reference import by_file_name, load

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "llama_tied": dict(family="llama", kv_heads=4, tied=True),
    "llama3_rope": dict(family="llama", kv_heads=2, tied=False),
    "qwen2_tied": dict(family="qwen2", kv_heads=1, tied=True),
    "qwen2": dict(family="qwen2", kv_heads=2, tied=False),
    "qwen3_tied": dict(family="qwen3", kv_heads=2, head_dim=24, tied=True),
    "qwen3": dict(family="qwen3", kv_heads=2, tied=False),
    "qwen3_moe": dict(family="qwen3_moe", tied=False, norm_topk_prob=False),
    "glm4": dict(family="glm4", tied=False),
    "glm4_moe": dict(family="glm4_moe", layers=3, tied=False),
    "deepseek_v3": dict(family="deepseek_v3", layers=3, tied=False),
    "moonlight": dict(
        family="deepseek_v3",
        tied=False,
        q_lora_rank=None,
        n_group=1,
        topk_group=1,
        rope_scaling=None,
    ),
}
ALGO = {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k2", "entropy_coef": 0.05}


def model_of(name: str, root) -> str:
    options = dict(MODELS[name])
    path = tiny_model(options.pop("family"), **options)
    if name != "llama3_rope":
        return str(path)
    import shutil

    copy = root / name
    shutil.copytree(path, copy)
    hf = json.loads((copy / "config.json").read_text())
    hf.pop("rope_scaling", None)
    hf["rope_parameters"] = LLAMA3_ROPE
    (copy / "config.json").write_text(json.dumps(hf))
    return str(copy)


def rank_compare(models: str, folder: str) -> None:
    """For each model: logits, one step's loss and gradients, the exported weights after it."""
    with Ranks() as ranks:
        for name, path in json.loads(models).items():
            train = {"lr": 1e-2, "clip_grad": 1.0, "use_dynamic_batch_size": True}
            cfg = config(
                path,
                algo=ALGO,
                train=train | {"max_tokens_per_gpu": 10000},
                rollout={"rollout_batch_size": 6, "n_samples_per_prompt": 2, "num_rollout": 1,
                         "rollout_temperature": 0.8},
                megatron={"weight_decay": 0.1, "use_distributed_optimizer": False},
            )  # fmt: skip
            trainer = ranks.trainer(cfg)
            logits = all_logits(trainer)
            exported = {k: v.clone() for k, v in trainer.hf_tensors()}
            metrics = ranks.train(trainer, ragged_batch())
            gradients = ranks.gradients(trainer)
            trainer.save_hf(f"{folder}/{name}-hf")
            ranks.keep(folder, name, (logits, exported, metrics, gradients, all_logits(trainer)))


def all_logits(trainer):
    """Logits of every token of the batch, sample after sample."""
    from spmd_rl.trainer.data import RolloutData

    shard = shard_of(ragged_batch(), trainer.cfg, trainer.placement, 0)
    data = RolloutData(shard, trainer.cfg, trainer.groups, trainer.device)
    (piece,) = data.forward_only()
    trainer.actor.chunks[0].output_layer.rows = None
    with torch.no_grad():
        made = piece.micro_batch
        return trainer.actor.chunks[0](
            made.tokens, made.position_ids, None, packed_seq_params=piece.packing
        )[0]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformers")
    models = {name: model_of(name, folder) for name in MODELS}
    ok(run_ranks(1, rank_compare, json.dumps(models), str(folder), limit=240))
    kept = {name: torch.load(folder / f"{name}.pt", weights_only=False) for name in MODELS}
    return folder, models, kept


def samples():
    """(tokens, response length, mask) of each sample."""
    batch = ragged_batch()
    tokens = torch.from_numpy(batch.tokens).long().split(batch.total_lengths.tolist())
    masks = torch.from_numpy(batch.loss_mask).double().split(batch.response_lengths.tolist())
    return list(zip(tokens, batch.response_lengths.tolist(), masks, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_logits(results, name):
    _, models, kept = results
    model = load(models[name])
    with torch.no_grad():
        want = torch.cat([model(tokens[None]).logits[0] for tokens, _, _ in samples()])
    assert (kept[name][0] - want).abs().max() <= 2e-5 * want.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_weights_come_out_as_they_went_in(results, name):
    _, models, kept = results
    model, exported = load(models[name]), kept[name][1]
    want = by_file_name(model.state_dict())
    if model.config.tie_word_embeddings:
        del want["lm_head.weight"]
    assert exported.keys() == want.keys()
    for key, value in want.items():
        assert torch.equal(exported[key], value), key


def plain_step(model):
    """The same optimizer step written down directly, sample by sample."""
    batch, total, grads = ragged_batch(), torch.zeros((), dtype=torch.float64), None
    siblings = {2: [2, 3], 3: [2, 3]}
    every = samples()
    for i, (tokens, size, mask) in enumerate(every):
        logits = model(tokens[None]).logits[0, len(tokens) - size - 1 : -1] / 0.8
        log_p = torch.log_softmax(logits, -1)
        log_prob = log_p.gather(-1, tokens[-size:, None])[:, 0].double()
        entropy = -(log_p.exp() * log_p).sum(-1).double()
        ratio = torch.exp(log_prob - log_prob.detach())
        kl = (log_prob - log_prob.detach()).square() / 2
        token = -ratio * float(batch.rewards[i]) - 0.05 * entropy + 0.1 * kl
        count = sum(every[j][2].sum().item() for j in siblings.get(i, [i]))
        total = total + (mask * token).sum() / max(count, 1) / 11
    total.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=1e-2
    ).step()
    return total.item(), by_file_name(grads)


@pytest.mark.parametrize("name", MODELS)
def test_loss_gradients_update_and_export(results, name):
    folder, models, kept = results
    _, _, metrics, gradients, logits = kept[name]
    model = load(models[name])
    loss, want = plain_step(model)
    assert metrics["train/loss"][0] == pytest.approx(loss, rel=1e-5)
    norm = sum(g.square().sum() for g in want.values()).sqrt()
    assert metrics["train/grad_norm"][0] == pytest.approx(norm.item(), rel=1e-5)
    scale = min(1.0, 1.0 / (norm.item() + 1e-6))
    for key, value in want.items():
        assert (gradients[key] - scale * value).norm() <= 1e-4 * scale * value.norm(), key
    saved = load(folder / f"{name}-hf")
    with torch.no_grad():
        found = torch.cat([saved(tokens[None]).logits[0] for tokens, _, _ in samples()])
        updated = torch.cat([model(tokens[None]).logits[0] for tokens, _, _ in samples()])
    assert (found - logits).abs().max() <= 1e-5
    assert (found - updated).abs().mean() <= 1e-3  # Adam's first step amplifies tiny gradients


def test_files_beside_the_weights(results):
    folder, _, _ = results
    from transformers import AutoTokenizer, GenerationConfig

    path = folder / "qwen3-hf"
    assert AutoTokenizer.from_pretrained(path).chat_template
    assert GenerationConfig.from_pretrained(path).eos_token_id is not None
