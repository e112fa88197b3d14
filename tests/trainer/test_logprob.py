"""Log-probs and entropy of rows: against log_softmax, in chunks, with padding columns, split."""

from __future__ import annotations

import pytest
import torch

from spmd_rl.trainer.logprob import log_probs_and_entropy
from tests.ranks import run_ranks
from tests.trainer.cases import Ranks, ok
from tools.bench_logprob import measure

ROWS, VOCAB, PADDED = 37, 61, 64


def inputs(dtype=torch.float32):
    make = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, PADDED, generator=make).mul(3).to(dtype)
    targets = torch.randint(0, VOCAB, (ROWS,), generator=make)
    weights = torch.randn(2, ROWS, generator=make)
    return logits, targets, weights


def expected(logits, targets, weights, temperature):
    leaf = logits.double().requires_grad_()
    log_p = torch.log_softmax(leaf[:, :VOCAB] / temperature, -1)
    log_prob = log_p.gather(1, targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    (weights[0] * log_prob + weights[1] * entropy).sum().backward()
    return log_prob.detach(), entropy.detach(), leaf.grad


def found(logits, targets, weights, temperature, chunk, group=None):
    leaf = logits.clone().requires_grad_()
    log_prob, entropy = log_probs_and_entropy(leaf, targets, VOCAB, temperature, chunk, group)
    assert log_prob.dtype == entropy.dtype == torch.float32
    (weights[0] * log_prob + weights[1] * entropy).sum().backward()
    return log_prob.detach(), entropy.detach(), leaf.grad


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [-1, 1, 5, 1000])
def test_values_and_gradients(chunk, temperature):
    case = inputs()
    for got, want in zip(found(*case, temperature, chunk), expected(*case, temperature),
                         strict=True):  # fmt: skip
        assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-5)


def test_chunks_change_no_bit_and_bf16_is_accumulated_in_float32():
    case = inputs(torch.bfloat16)
    whole, chunked = found(*case, 0.7, -1), found(*case, 0.7, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole, chunked, strict=True))
    want = expected(*case, 0.7)
    assert torch.allclose(whole[0].double(), want[0], rtol=1e-5, atol=1e-5)
    assert whole[2].dtype == torch.bfloat16
    assert torch.allclose(whole[2].double(), want[2], rtol=1e-2, atol=1e-2)


def test_only_the_log_prob_has_a_gradient_where_only_it_is_used():
    logits, targets, weights = inputs()
    leaf = logits.clone().requires_grad_()
    log_prob, _ = log_probs_and_entropy(leaf, targets, VOCAB)
    (weights[0] * log_prob).sum().backward()
    weights[1] = 0
    assert torch.allclose(leaf.grad.double(), expected(logits, targets, weights, 1.0)[2], atol=1e-5)
    assert (leaf.grad[:, VOCAB:] == 0).all()


def test_no_rows():
    leaf = torch.zeros(0, PADDED, requires_grad=True)
    log_prob, entropy = log_probs_and_entropy(leaf, torch.zeros(0, dtype=torch.int64), VOCAB)
    (log_prob.sum() + entropy.sum()).backward()
    assert leaf.grad.shape == (0, PADDED)


def rank_split(_: str) -> None:
    """Each rank holds a part of the vocabulary; the last has padding, or nothing but padding."""
    import torch.distributed as dist

    with Ranks() as ranks:
        for width in (PADDED // ranks.world, VOCAB - 1):
            logits, targets, weights = inputs()
            wide = torch.cat([logits[:, :VOCAB], torch.full((ROWS, 2 * width), 9.0)], 1)
            part = wide[:, width * ranks.rank : width * (ranks.rank + 1)].contiguous()
            for chunk in (-1, 7):
                got = found(part, targets, weights, 0.7, chunk, dist.group.WORLD)
                want = expected(logits, targets, weights, 0.7)
                assert torch.allclose(got[0].double(), want[0], rtol=1e-5, atol=1e-5)
                assert torch.allclose(got[1].double(), want[1], rtol=1e-5, atol=1e-5)
                whole = torch.zeros(ROWS, 3 * PADDED)
                whole[:, :VOCAB] = want[2][:, :VOCAB]
                mine = whole[:, width * ranks.rank : width * (ranks.rank + 1)]
                assert torch.allclose(got[2], mine, rtol=1e-5, atol=1e-5)


def test_a_vocabulary_split_over_ranks():
    ok(run_ranks(2, rank_split, "", limit=60))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_beyond_the_logits_is_a_chunk_of_float32(dtype):
    """By the allocator's own events: forward and backward, also where rows are no multiple."""
    rows, vocab, chunk = 1500, 3000, 64
    result = measure(rows, vocab, dtype, chunk, torch.device("cpu"))
    of_rows = 10 * rows * 8  # a few numbers a row: targets, log-probs, entropies, their gradients
    for name, peak in result["peaks"].items():
        assert peak <= result["bound"] + of_rows, name
        assert peak >= result["bound"] / 2, name  # the events were seen
