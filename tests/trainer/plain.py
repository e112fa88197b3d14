"""One optimizer step's loss, written down directly in float64, sample by sample and token by token.

Comes in: each sample's log-probs and entropies (with gradient) and what else is known of it, and
the `algo:` section; goes out: the loss. An independent statement of what spmd_rl/algo does: it
shares no code with it, and is as slow as it looks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_RESPONSE = 50  # rollout_max_response_len, Dr.GRPO's constant


@dataclass
class Known:
    """A sample; tensors are float64, one entry a response token."""

    mask: list[int]
    reward: float  # raw
    group: int
    rollout: int
    sampled: Tensor  # the engine's log-probs
    reference: Tensor  # the reference model's
    values: Tensor | None = None  # the critic's, before the step


def step_loss(
    log_probs: list[Tensor], entropies: list[Tensor], known: list[Known], algo: dict
) -> tuple[Tensor, float]:
    """The step's loss, and the sum of its terms' sizes: the scale of its rounding."""
    estimator = algo.get("advantage_estimator", "grpo")
    old = [s.sampled if algo.get("use_rollout_logprobs") else p.detach()
           for s, p in zip(known, log_probs, strict=True)]  # fmt: skip
    advantages = advantages_of(old, known, algo, estimator)
    weights, kept = correction([p.detach() for p in log_probs], known, algo)
    rollouts = len({s.rollout for s in known})
    tokens = sum(max(sum(s.mask), 1) for s in known)
    total, scale = torch.zeros((), dtype=torch.float64), 0.0
    for i, sample in enumerate(known):
        ratios = ratios_of(log_probs[i], old[i], sample.mask, estimator)
        drift = masked_mean(old[i] - log_probs[i].detach(), sample.mask)
        siblings = sum(sum(s.mask) for s in known if s.rollout == sample.rollout)
        for t, kept_token in enumerate(kept[i]):
            if not kept_token:
                continue
            advantage = advantages[i][t]
            token = policy_loss(ratios[t], log_probs[i][t], advantage, estimator, algo)
            if algo.get("use_opsm") and advantage < 0 and drift > algo.get("opsm_delta", 1e-4):
                token = token * 0
            token = token * weights[i][t]
            term = -algo.get("entropy_coef", 0) * entropies[i][t]
            if algo.get("kl_loss_coef"):
                term = term + algo["kl_loss_coef"] * kl(
                    log_probs[i][t], sample.reference[t], algo["kl_loss_type"],
                    old[i][t] if algo.get("use_unbiased_kl") else None,
                )  # fmt: skip
            if algo.get("calculate_per_token_loss"):
                share = policy_share = 1 / tokens
            else:
                share = policy_share = 1 / max(siblings, 1) / rollouts
            if algo.get("custom_pg_loss_reducer_function_path"):
                policy_share = 1 / MAX_RESPONSE
                policy_share /= tokens if algo.get("calculate_per_token_loss") else rollouts
            total = total + policy_share * token + share * term
            scale += policy_share * abs(token.item()) + share * abs(float(term))
    return total, scale


def masked_mean(values: Tensor, mask: list[int]) -> Tensor:
    chosen = [value for value, m in zip(values, mask, strict=True) if m]
    return sum(chosen, torch.zeros((), dtype=torch.float64)) / max(len(chosen), 1)


def ratios_of(new: Tensor, old: Tensor, mask: list[int], estimator: str) -> list[Tensor]:
    if estimator == "gspo":
        return [torch.exp(masked_mean(new - old, mask))] * len(mask)
    return [torch.exp(a - b) for a, b in zip(new, old, strict=True)]


def policy_loss(ratio: Tensor, log_prob: Tensor, advantage: float, estimator: str, algo: dict):
    low, high = algo.get("eps_clip", 0.2), algo.get("eps_clip_high", algo.get("eps_clip", 0.2))
    clipped = min(max(ratio.item(), 1 - low), 1 + high)
    if estimator == "cispo":
        return -clipped * advantage * log_prob
    plain, bounded = -ratio * advantage, -clipped * advantage
    if 1 - low <= ratio.item() <= 1 + high:
        return plain if "eps_clip_c" not in algo else dual(plain, advantage, algo)
    loss = plain if plain.item() >= bounded else torch.tensor(bounded, dtype=torch.float64)
    return loss if "eps_clip_c" not in algo else dual(loss, advantage, algo)


def dual(loss: Tensor, advantage: float, algo: dict) -> Tensor:
    most = -algo["eps_clip_c"] * advantage
    if advantage < 0 and loss.item() > most:
        return torch.tensor(most, dtype=torch.float64)
    return loss


def kl(new: Tensor, reference: Tensor, kind: str, old: Tensor | None = None) -> Tensor:
    d = new - reference
    value = {"k1": d, "k2": d * d / 2}.get(kind, torch.exp(-d) - 1 + d)
    if old is not None:
        value = torch.exp(new - old) * value
    if kind == "low_var_kl" and abs(value.item()) > 10:
        value = torch.tensor(math.copysign(10.0, value.item()), dtype=torch.float64)
    return value


def rewards_of(known: list[Known], estimator: str, use_std: bool) -> list[float]:
    """Centred (and scaled) within groups; a rollout of several samples counts once."""
    if estimator in ("reinforce_plus_plus", "ppo"):
        return [s.reward for s in known]
    found = []
    for sample in known:
        members = {s.rollout: s.reward for s in known if s.group == sample.group}
        n, mean = len(members), sum(members.values()) / len(members)
        value = sample.reward - mean
        if estimator == "rloo" and n > 1:
            others = sum(members.values()) - sample.reward
            value = sample.reward - others / (n - 1)
        if estimator in ("grpo", "gspo", "cispo") and use_std and n > 1:
            deviation = math.sqrt(sum((r - mean) ** 2 for r in members.values()) / (n - 1))
            value /= deviation + 1e-6
        found.append(value)
    return found


def advantages_of(old: list[Tensor], known: list[Known], algo: dict, estimator: str):
    use_std = not algo.get("disable_grpo_std_normalization")
    rewards = rewards_of(known, estimator, use_std)
    coef, gamma = algo.get("kl_coef", 0.0), algo.get("gamma", 1.0)
    found: list[list[float]] = []
    for reward, before, sample in zip(rewards, old, known, strict=True):
        size = len(sample.mask)
        penalty = [0.0] * size
        if coef:
            kinds = (algo.get("kl_loss_type", "k1"), None)
            penalty = [
                -coef * kl(before[t], sample.reference[t], *kinds).item() for t in range(size)
            ]
        if estimator == "reinforce_plus_plus":
            last = max(t for t in range(size) if sample.mask[t])
            own = [p * m for p, m in zip(penalty, sample.mask, strict=True)]
            own[last] += reward
            values, following = [0.0] * size, 0.0
            for t in reversed(range(size)):
                values[t] = following = own[t] + gamma * following
        elif estimator == "ppo":
            assert sample.values is not None
            penalty[-1] += reward
            values = gae(penalty, sample.values.tolist(), gamma, algo.get("lambd", 1.0))
        elif estimator == "reinforce_plus_plus_baseline":
            values = [reward + p for p in penalty]
        else:
            values = [reward] * size
        found.append(values)
    if algo.get("normalize_advantages"):
        pairs = [(a, m) for values, s in zip(found, known, strict=True)
                 for a, m in zip(values, s.mask, strict=True)]  # fmt: skip
        n = sum(m for _, m in pairs)
        mean = sum(a * m for a, m in pairs) / n
        variance = sum(m * (a - mean) ** 2 for a, m in pairs) / (n - 1)
        found = [[(a - mean) / math.sqrt(variance + 1e-8) for a in values] for values in found]
    return found


def gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Each advantage as the sum that defines it: (gamma * lam)^k times the k-th later surprise."""
    after = [*values[1:], 0.0]
    surprise = [r + gamma * b - a for r, a, b in zip(rewards, values, after, strict=True)]
    return [
        sum((gamma * lam) ** k * one for k, one in enumerate(surprise[t:]))
        for t in range(len(values))
    ]


def value_step_loss(
    values: list[Tensor], old: list[Tensor], known: list[Known], algo: dict
) -> Tensor:
    """The critic's loss of a step; `old` are the log-probs that KL is measured with."""
    unwhitened = {k: v for k, v in algo.items() if k != "normalize_advantages"}
    advantages = advantages_of(old, known, unwhitened, "ppo")
    rollouts = len({s.rollout for s in known})
    tokens = sum(max(sum(s.mask), 1) for s in known)
    total = torch.zeros((), dtype=torch.float64)
    for i, sample in enumerate(known):
        siblings = sum(sum(s.mask) for s in known if s.rollout == sample.rollout)
        assert sample.values is not None
        for t, kept in enumerate(sample.mask):
            before, now = sample.values[t].item(), values[i][t]
            target = before + advantages[i][t]
            away = now.item() - before
            error = (now - target) ** 2
            if abs(away) > algo["value_clip"]:
                held = before + math.copysign(algo["value_clip"], away)
                if (held - target) ** 2 > error.item():
                    error = torch.tensor((held - target) ** 2, dtype=torch.float64)
            if algo.get("calculate_per_token_loss"):
                total = total + kept * error / tokens
            else:
                total = total + kept * error / max(siblings, 1) / rollouts
    return total


def correction(trained: list[Tensor], known: list[Known], algo: dict):
    """Importance weights, and which tokens stay."""
    weights = [[1.0] * len(s.mask) for s in known]
    kept = [list(s.mask) for s in known]
    high = algo.get("tis_upper_bound", algo.get("tis_clip", 2.0))
    low = algo.get("tis_lower_bound")
    if low is None:
        low = 1 / high if "tis_upper_bound" in algo else algo.get("tis_clip_low", 0.0)
    mode = algo.get("tis_mode", "clip")
    for i, sample in enumerate(known):
        size = len(sample.mask)
        difference = trained[i] - sample.sampled
        if algo.get("use_tis"):
            for t in range(size):
                ratio = ratio_at(difference, sample.mask, t, algo.get("tis_level", "token"))
                if mode == "mask":
                    kept[i][t] *= int(low <= ratio <= high)
                    weights[i][t] = ratio
                else:
                    weights[i][t] = min(max(ratio, 0.0 if mode == "truncate" else low), high)
        if algo.get("use_rs"):
            most = algo.get("rs_upper_bound", high)
            least = algo.get("rs_lower_bound", algo.get("tis_lower_bound", 1 / most))
            veto = any(m and math.exp(d) < algo.get("rs_veto_threshold", 0)
                       for d, m in zip(difference, sample.mask, strict=True))  # fmt: skip
            for t in range(size):
                ratio = ratio_at(difference, sample.mask, t, algo.get("rs_level", "token"))
                kept[i][t] *= int(least <= ratio <= most and not veto)
    if algo.get("tis_batch_normalize"):
        pairs = [(w, m) for values, s in zip(weights, known, strict=True)
                 for w, m in zip(values, s.mask, strict=True)]  # fmt: skip
        mean = sum(w * m for w, m in pairs) / sum(m for _, m in pairs)
        weights = [[w / mean for w in values] for values in weights]
    return weights, kept


def ratio_at(difference: Tensor, mask: list[int], t: int, level: str) -> float:
    if level == "token":
        value = difference[t].item()
    else:
        value = masked_mean(difference, mask).item()
        value *= sum(mask) if level == "sequence" else 1
    return math.exp(min(max(value, -20.0), 20.0))
