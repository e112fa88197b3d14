"""How far the engine's log-probs lie from the trainer's, where, and what that looks like.

In: for each response token [R] both log-probs under the weights that should have sampled, the
entropy, its place in the response, and how many pushes its weights lag behind. Out: sums that are
added over ranks, then metrics and, when the gap is out of line, a sentence with the likely cause.

The causes are told apart by what they leave in the data. Weights of another version: the tokens say
so themselves. A temperature: with logits z and inverse temperatures b and b', log-probs differ by
(b'/b - 1) log p + (a function of the position alone), which log p and the entropy predict nearly
all of; its slope gives the temperature. Anything else: the same weights, versions and temperature
should give these numbers and do not, so a tensor differs. A wrong weight that scales all logits
would look like a temperature; the sentence then names the temperature that it looks like.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EDGES = (0, 1, 8, 64, 512, 4096, 32768)  # positions from which a bucket runs
LAGS = 5  # the last counts all that lag more
TOLERANCE = {"float32": 1e-4}  # mean gap that rounding explains, by the trainer's numbers
OTHERWISE = 1e-2
ALARM = 10.0  # times what is usual
ALWAYS = 0.1  # slime's gate
EXPLAINED = 0.8  # share of the gap's variance that makes it a temperature

_MOMENTS = 4  # 1, log p, entropy, difference


class Sums(NamedTuple):
    """Float64, added over ranks; `largest` is maximised."""

    positions: Tensor  # [buckets, 2] count and sum of |difference|
    lags: Tensor  # [LAGS, 2]
    moments: Tensor  # [4, 4] of (1, log p, entropy, difference) over tokens that do not lag
    samples: Tensor  # [2] samples, and those whose mean |difference| is above `limit`
    largest: Tensor  # []


def sums(
    log_probs: Tensor,
    rollout_log_probs: Tensor,
    entropy: Tensor,
    positions: Tensor,
    lags: Tensor,
    ids: Tensor,
    count: int,
    limit: float,
) -> Sums:
    """Of unmasked tokens; `ids` [R] are the samples (of `count`) they belong to."""
    difference = rollout_log_probs.double() - log_probs.double()
    size = difference.abs()
    edges = torch.tensor(EDGES, device=positions.device)
    bucket = torch.bucketize(positions, edges, right=True) - 1
    lag = lags.clamp(0, LAGS - 1)
    fresh = lag == 0
    features = torch.stack(
        [torch.ones_like(size), log_probs.double(), entropy.double(), difference]
    )[:, fresh]
    of_samples = _grouped(size, ids, count)
    mean = of_samples[:, 1] / of_samples[:, 0].clamp_min(1)
    seen = of_samples[:, 0] > 0
    return Sums(
        _grouped(size, bucket, len(EDGES)),
        _grouped(size, lag, LAGS),
        features @ features.T,
        torch.stack([seen.sum(), (seen & (mean > limit)).sum()]).double(),
        size.max() if len(size) else size.new_zeros(()),
    )


def _grouped(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """[count, 2] how many, and their sum."""
    found = values.new_zeros(count, 2)
    found[:, 0].index_add_(0, groups, torch.ones_like(values))
    found[:, 1].index_add_(0, groups, values)
    return found


def metrics(found: Sums) -> dict[str, float]:
    """Mean and largest gap; means by position in the response and by pushes the weights lag."""
    count, total = found.positions.sum(0).tolist()
    values = {"mean": total / max(count, 1), "max": found.largest.item()}
    for name, table, labels in (
        ("position", found.positions, EDGES),
        ("lag", found.lags, range(LAGS)),
    ):
        for label, (number, part) in zip(labels, table.tolist(), strict=True):
            if number:
                values[f"{name}_{label}"] = part / number
    return {f"mismatch/{name}": value for name, value in values.items()}


def fit(moments: Tensor) -> tuple[float, float]:
    """Least squares of the difference on 1, log p and entropy: (share of its second moment that it
    explains, slope on log p).
    """
    known, target = moments[:-1, :-1], moments[:-1, -1]
    if moments[0, 0] < 2 * _MOMENTS or moments[-1, -1] <= 0:
        return 0.0, 0.0
    ridge = 1e-12 * torch.diag(known.diagonal())
    weights = torch.linalg.solve(known + ridge, target)
    return float(weights @ target / moments[-1, -1]), float(weights[1])


def cause(found: Sums, version: int, temperature: float, limit: float) -> str:
    """The sentence's second half: what most likely made the gap."""
    (fresh, fresh_gap), lagging = found.lags[0].tolist(), found.lags[1:].sum(0).tolist()
    fresh_mean = fresh_gap / max(fresh, 1)
    late = lagging[0] / max(fresh + lagging[0], 1)
    if lagging[0] and (not fresh or fresh_mean <= limit):
        lag = max(k for k, (number, _) in enumerate(found.lags.tolist()) if number)
        return (
            f"{late:.0%} of the tokens were sampled with weights up to {lag} "
            f"version{'s' if lag > 1 else ''} behind the trainer's version {version}, and the gap "
            "is theirs: an engine missed a push, or samples were kept over one"
        )
    explained, slope = fit(found.moments)
    if explained > EXPLAINED and slope > -1:
        looks = temperature / (1 + slope)
        if abs(looks - 1) < abs(looks - temperature) and temperature != 1:
            return (
                f"the engine's log-probs fit temperature {looks:.2f}: the engine does not apply "
                f"rollout.rollout_temperature {temperature:g}"
            )
        return (
            f"the engine's log-probs fit temperature {looks:.2f} instead of "
            f"rollout.rollout_temperature {temperature:g}: a sampling parameter is overridden, or "
            "a weight of the engine that scales the logits is wrong"
        )
    samples, apart = found.samples.tolist()
    share = f"in {apart / max(samples, 1):.0%} of the samples"
    return (
        f"it is {share} and fits neither versions nor a temperature: a tensor of an engine "
        "differs from the trainer's, or a push was lost unnoticed; "
        "debug.check_weight_update_equal: true finds which"
    )


class Watch:
    """Remembers what is usual in this run, and says when a rollout is not. `partial`: tokens of
    older weights are meant to be there (partial rollout), and those of the newest alone count.
    """

    def __init__(self, dtype: str, partial: bool = False):
        self.partial = partial
        self.expected = TOLERANCE.get(dtype, OTHERWISE)
        self.usual: list[float] = []

    @property
    def limit(self) -> float:
        """Mean gap from which it is out of line."""
        usual = sorted(self.usual)[len(self.usual) // 2] if self.usual else self.expected
        return min(ALWAYS, ALARM * max(usual, TOLERANCE["float32"]))

    def judge(self, found: Sums, version: int, temperature: float) -> str | None:
        """A sentence where the mean gap is above the limit; else the gap becomes part of what is
        usual.
        """
        count, gap = (found.lags[0] if self.partial else found.lags.sum(0)).tolist()
        mean, limit = gap / max(count, 1), self.limit
        if mean <= limit:
            self.usual = [*self.usual, mean][-32:]
            return None
        return (
            f"log-probs of engine and trainer differ by {mean:.3g} on average (up to "
            f"{found.largest.item():.3g}; {limit:.3g} would still be in line): "
            + cause(found, version, temperature, limit)
        )
