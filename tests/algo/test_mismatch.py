"""Sums of the gap over any split, the fit of a temperature, and when a gap is out of line."""

from __future__ import annotations

import pytest
import torch

from spmd_rl.algo.mismatch import Sums, Watch, fit, metrics, sums

VOCAB, TOKENS, SAMPLES = 50, 400, 20


def rollout(engine, temperature=1.0, lag=0, seed=0):
    """(log-probs of the trainer, of the engine, entropies, positions, lags, ids) of tokens that
    the engine has sampled; `engine` makes its logits of the trainer's."""
    make = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(TOKENS, VOCAB, generator=make)
    mine = torch.log_softmax(logits / temperature, -1)
    other = torch.log_softmax(engine(logits, make) / temperature, -1)
    chosen = torch.multinomial(other.exp(), 1, generator=make)
    per_sample = TOKENS // SAMPLES
    return (
        mine.gather(1, chosen)[:, 0],
        other.gather(1, chosen)[:, 0],
        -(mine.exp() * mine).sum(-1),
        torch.arange(TOKENS) % per_sample,
        torch.full((TOKENS,), lag),
        torch.arange(TOKENS) // per_sample,
    )


def same(logits, make):
    return logits


def scaled(by):
    return lambda logits, make: logits * by


def noisy(size):
    return lambda logits, make: logits + size * torch.randn(logits.shape, generator=make)


def found(columns, limit=1e-3):
    return sums(*columns, SAMPLES, limit)


def judged(columns, version=3, temperature=1.0, dtype="float32"):
    return Watch(dtype).judge(found(columns), version, temperature)


def test_sums_do_not_depend_on_the_split():
    columns = rollout(noisy(0.3))
    whole = found(columns)
    at = columns[-1] < 7
    parts = [found([c[at] for c in columns]), found([c[~at] for c in columns])]
    joined = Sums(*(torch.maximum(a, b) if a.dim() == 0 else a + b
                    for a, b in zip(*parts, strict=True)))  # fmt: skip
    for name, value in metrics(whole).items():
        assert metrics(joined)[name] == pytest.approx(value), name
    torch.testing.assert_close(whole.moments, joined.moments)


def test_a_rank_without_tokens_adds_nothing():
    empty = [c[:0] for c in rollout(same)]
    assert all((values == 0).all() for values in found(empty))


@pytest.mark.parametrize("factor", [0.6, 0.8, 1.3])
def test_a_temperature_is_recognised_and_measured(factor):
    explained, slope = fit(found(rollout(scaled(factor))).moments)
    assert explained > 0.9 and 1 + slope == pytest.approx(factor, rel=0.1)
    sentence = str(judged(rollout(scaled(factor))))
    looks = float(sentence.split("fit temperature ")[1].split()[0])
    assert looks == pytest.approx(1 / factor, rel=0.1)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("size", [0.05, 0.3, 1.0])
def test_other_weights_are_no_temperature(size, seed):
    columns = rollout(noisy(size), seed=seed)
    assert fit(found(columns).moments)[0] < 0.5
    assert "a tensor of an engine differs" in str(judged(columns))
    assert "1 version behind the trainer's version 3" in str(
        judged(rollout(noisy(size), lag=1, seed=seed))
    )


def test_a_gap_in_fresh_tokens_is_not_blamed_on_late_ones():
    fresh, late = rollout(noisy(0.3)), rollout(noisy(0.3), lag=2, seed=1)
    late = [*late[:5], late[5] + SAMPLES]
    columns = [torch.cat(pair) for pair in zip(fresh, late, strict=True)]
    sentence = Watch("float32").judge(sums(*columns, 2 * SAMPLES, 1e-3), 3, 1.0)
    assert "a tensor of an engine differs" in str(sentence)
    assert Watch("float32", True).judge(sums(*columns, 2 * SAMPLES, 1e-3), 3, 1.0) is not None
    fine = rollout(same)
    columns = [torch.cat(pair) for pair in zip(fine, late, strict=True)]
    sentence = Watch("float32").judge(sums(*columns, 2 * SAMPLES, 1e-3), 3, 1.0)
    assert "50% of the tokens were sampled with weights up to 2 versions behind" in str(sentence)
    # In partial rollout they are there on purpose.
    assert Watch("float32", True).judge(sums(*columns, 2 * SAMPLES, 1e-3), 3, 1.0) is None


def test_what_is_usual_decides_what_is_out_of_line():
    watch = Watch("bfloat16")
    assert watch.limit == pytest.approx(0.1)  # before anything is known: slime's gate
    for _ in range(3):
        assert watch.judge(found(rollout(noisy(0.004))), 1, 1.0) is None
    assert 0.01 < watch.limit < 0.06
    assert watch.judge(found(rollout(noisy(0.3))), 1, 1.0) is not None
    assert watch.limit < 0.06  # an alarm does not become usual
    assert Watch("float32").judge(found(rollout(noisy(1e-5))), 1, 1.0) is None
