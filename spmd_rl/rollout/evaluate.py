"""Accuracy on data sets that are not trained on.

Comes in: named files and the overrides of `eval:`; goes out: numbers under slime's names. Prompts
are loaded once; sample seeds depend on the place in the data set, so two evaluations of one model
agree.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from math import prod
from typing import Any

import numpy as np

from spmd_rl.config.schema import Config
from spmd_rl.data.prompts import Columns, PromptSet, PromptSource, prompt_limit
from spmd_rl.data.template import Template
from spmd_rl.rewards.score import Scorer
from spmd_rl.rollout.columns import reward_of
from spmd_rl.rollout.generate import Generator, sampling_params
from spmd_rl.rollout.stats import mean, sample_metrics
from spmd_rl.tasks import together
from spmd_rl.types import Group

DEFAULT_NAME = "aime"  # of a data set given as a path alone, as in slime


def data_sets(words: list[str]) -> dict[str, str]:
    """`name path name path ...`, or one path alone."""
    if len(words) == 1:
        return {DEFAULT_NAME: words[0]}
    return dict(zip(words[0::2], words[1::2], strict=True))


def eval_sampling(cfg: Config) -> dict[str, Any]:
    """Sampling parameters of an evaluation: those of a rollout but for what `eval:` says."""
    given = {
        "temperature": cfg.eval.eval_temperature,
        "top_p": cfg.eval.eval_top_p,
        "top_k": cfg.eval.eval_top_k,
        "max_new_tokens": cfg.eval.eval_max_response_len,
    }
    return sampling_params(cfg) | {key: value for key, value in given.items() if value is not None}


def load(cfg: Config, template: Template) -> dict[str, PromptSet]:
    columns = Columns.of(cfg)
    columns = replace(
        columns,
        input_key=cfg.eval.eval_input_key or columns.input_key,
        label_key=cfg.eval.eval_label_key or columns.label_key,
        tool_key=cfg.eval.eval_tool_key or columns.tool_key,
    )
    limit = prompt_limit(
        cfg.eval.eval_max_prompt_len or cfg.data.rollout_max_prompt_len,
        cfg.rollout.rollout_max_context_len,
    )
    return {
        name: PromptSet(path, columns, template, limit, cfg.data.on_bad_line)
        for name, path in data_sets(cfg.eval.eval_prompt_data).items()
    }


async def evaluate(
    cfg: Config, sets: dict[str, PromptSet], generator: Generator, scorer: Scorer
) -> dict[str, float]:
    """Sample every prompt of every data set and judge the answers."""
    key = cfg.eval.eval_reward_key or cfg.reward.reward_key
    with generator.without_experts():
        results = await together(
            _one(name, prompts, cfg, generator, scorer, key) for name, prompts in sets.items()
        )
    return dict(chain.from_iterable(result.items() for result in results))


async def _one(
    name: str,
    prompts: PromptSet,
    cfg: Config,
    generator: Generator,
    scorer: Scorer,
    key: str | None,
) -> dict[str, float]:
    n = cfg.eval.n_samples_per_eval_prompt
    source = PromptSource(prompts, n, shuffle=False, seed=0)
    sampling = eval_sampling(cfg)

    async def answer(some: Group) -> list[Group]:
        made = await generator.portion(some, sampling, evaluation=True)
        await together(scorer.sample(item) for item in chain.from_iterable(made))
        return made

    samples = list(chain.from_iterable(source.draw(len(prompts))))
    portions = generator.portions(samples, len(samples))
    answered = list(chain.from_iterable(await together(map(answer, portions))))
    rewards = [mean([reward_of(item, key) for item in made]) for made in answered]
    flat = list(chain.from_iterable(answered))
    seen = sample_metrics(flat)
    metrics = {f"eval/{name}": mean(rewards)}
    metrics[f"eval/{name}-truncated_ratio"] = seen.pop("truncated_ratio")
    metrics |= {f"eval/{name}/{what}": value for what, value in seen.items()}
    if cfg.eval.log_passrate:
        passed = pass_at_k(np.reshape(rewards, (-1, n)))
        metrics |= {f"eval/{name}-pass@{k}": value for k, value in passed.items()}
    return metrics


def pass_at_k(rewards: np.ndarray) -> dict[int, float]:
    """Chance that at least one of k samples is right, for k = 1, 2, 4, ... <= n, without bias.

    `rewards` [prompts, n]; right is a reward of exactly 1.
    """
    n = rewards.shape[1]
    if n == 1:
        return {}
    right = (rewards == 1).sum(axis=1)
    powers = [1 << exponent for exponent in range(n.bit_length()) if 1 << exponent <= n]
    return {k: float(np.mean([_pass(n, int(c), k) for c in right])) for k in powers}


def _pass(n: int, right: int, k: int) -> float:
    """1 - C(n - right, k) / C(n, k)."""
    if n - right < k:
        return 1.0
    return 1.0 - prod(1 - k / i for i in range(n - right + 1, n + 1))
