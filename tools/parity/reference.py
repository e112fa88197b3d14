"""What transformers computes: logits of every response token and gradients of one policy loss.

Each sample is run alone and unpadded. The loss is that of a first GRPO step with an entropy bonus,
written down directly: the mean over samples of the mean over unmasked tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spmd_rl.types import Batch

ENTROPY = 0.05
TEMPERATURE = 0.8
ALGO = {"entropy_coef": ENTROPY}


def load(path: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def samples(batch: Batch) -> list[tuple[Tensor, int, Tensor, float]]:
    """(tokens, response length, mask, reward) of each sample."""
    sizes = batch.response_lengths.tolist()
    tokens = torch.from_numpy(batch.tokens).long().split(batch.total_lengths.tolist())
    masks = torch.from_numpy(batch.loss_mask).double().split(sizes)
    return list(zip(tokens, sizes, masks, batch.rewards.tolist(), strict=True))


def compute(
    path: str | Path, batch: Batch, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits [R, vocabulary] of the rows that predict response tokens; gradients by the names that
    tensors have in files. float32 whatever `dtype` they were computed in.
    """
    model = load(path, dtype)
    found, total = [], torch.zeros((), dtype=torch.float64)
    for tokens, size, mask, reward in samples(batch):
        logits = model(tokens[None]).logits[0, len(tokens) - size - 1 : -1].float()
        found.append(logits.detach())
        log_p = torch.log_softmax(logits / TEMPERATURE, -1)
        log_prob = log_p.gather(-1, tokens[-size:, None])[:, 0].double()
        entropy = -(log_p.exp() * log_p).sum(-1).double()
        ratio = torch.exp(log_prob - log_prob.detach())
        token = -ratio * reward - ENTROPY * entropy
        total = total + (mask * token).sum() / max(mask.sum().item(), 1.0) / len(batch)
    total.backward()
    grads = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
    return torch.cat(found), by_file_name(grads)


def log_probs(path: str | Path, prompts: list[list[int]], outputs: list[list[int]]) -> list[Tensor]:
    """Of the output tokens, at temperature 1."""
    model, found = load(path), []
    with torch.no_grad():
        for prompt, output in zip(prompts, outputs, strict=True):
            table = torch.log_softmax(model(torch.tensor([prompt + output])).logits[0].float(), -1)
            rows = table[len(prompt) - 1 : -1]
            found.append(rows.gather(-1, torch.tensor(output)[:, None])[:, 0])
    return found


def by_file_name(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names they have in files: transformers keeps a layer's experts as one."""
    found = {}
    for name, value in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            for i, expert in enumerate(value):
                gate, up = expert.chunk(2)
                found[name.replace("gate_up_proj", f"{i}.gate_proj.weight")] = gate
                found[name.replace("gate_up_proj", f"{i}.up_proj.weight")] = up
        elif name.endswith("experts.down_proj"):
            for i, expert in enumerate(value):
                found[name.replace("down_proj", f"{i}.down_proj.weight")] = expert
        else:
            found[name] = value
    return found
