"""Our own rollout function: prompts drawn, generated, rewarded and judged until there are enough.

Comes in: the engines' generator and a source of prompts; goes out: the groups of a rollout and what
became of the others. It must not know files, columns or rank 0.
"""

from __future__ import annotations

import asyncio
from functools import partial
from itertools import chain

from spmd_rl.config.schema import Config
from spmd_rl.data.source import Buffer, UserSource
from spmd_rl.rewards.score import Scorer
from spmd_rl.rollout.collect import Tasks, collect_round
from spmd_rl.rollout.generate import Generator, sampling_params
from spmd_rl.rollout.stats import dropped_metrics, partial_metrics
from spmd_rl.rollout.user import Functions, RolloutFnTrainOutput
from spmd_rl.tasks import together
from spmd_rl.types import Group, Sample, Status

UNFINISHED = (Status.PENDING, Status.ABORTED)


class Rounds:
    """One after another; what is not finished in one is gone on with in the next."""

    def __init__(self, cfg: Config, scorer: Scorer, functions: Functions):
        self.cfg, self.scorer, self.functions = cfg, scorer, functions
        self.in_order = bool(cfg.sglang.get("enable_deterministic_inference"))

    async def collect(
        self, rollout: int, source: Buffer | UserSource, generator: Generator
    ) -> RolloutFnTrainOutput:
        settings, seen = self.cfg.rollout, []

        async def judge(group: Group) -> str | None:
            if self.functions.all_samples is not None:
                seen.append(group)
            return await self.functions.judge(group)

        result = await collect_round(
            settings.rollout_batch_size,
            source.get_samples,
            partial(self._group, generator, rollout),
            judge,
            generator.client.abort_all,
            settings.over_sampling_batch_size,
            in_order=self.in_order,
            rest=partial(self._rest, generator) if settings.partial_rollout else None,
        )
        resumed = source.resumed
        source.rest(result.kept, rollout)
        metrics = dropped_metrics(result)
        if settings.partial_rollout:
            metrics |= partial_metrics(result, resumed, source.buffered)
        await self.functions.finish(result.groups, seen, source.given)
        return RolloutFnTrainOutput(result.groups, metrics)

    async def _group(self, generator: Generator, rollout: int, group: Group) -> Group:
        """Generate and reward the samples of one prompt, each as soon as it can be. What is
        generated stands in the group at once, so that it can be kept if this is cancelled.
        """
        sampling, as_group = sampling_params(self.cfg), self.cfg.reward.group_rm
        see = partial(self.functions.see, rollout=rollout, evaluation=False)

        async def some(samples: Group) -> Group:
            parts = await generator.portion(samples, sampling)
            for sample, made in zip(samples, parts, strict=True):
                if len(made) == 1:
                    group[_place(group, sample)] = made[0]
            made = await see(list(chain.from_iterable(parts)))
            if generator.teacher:
                ended = [sample for sample in made if sample.status not in UNFINISHED]
                await generator.teacher.tell(ended)
            if not as_group:
                await self.scorer.group(made)
            return made

        done = [sample for sample in group if sample.status not in UNFINISHED]
        begun = [sample for sample in group if sample.status in UNFINISHED]
        of = self.cfg.rollout.rollout_batch_size * self.cfg.rollout.n_samples_per_prompt
        portions = generator.portions(begun, of)
        made = list(chain.from_iterable(await together(map(some, portions))))
        done = await see(done)
        finished = sorted(done + made, key=lambda sample: sample.index)
        if as_group or done:
            await self.scorer.group(finished)
        return finished

    async def _rest(self, generator: Generator, running: Tasks) -> None:
        """Stop what is generated beyond the rollout. Where runs must be equal it goes on to its
        end: how far it is now is a matter of timing.
        """
        if self.in_order:
            await asyncio.wait(running)
        else:
            await generator.stop()
        for task in running:
            if task.done():
                task.result()


def _place(group: Group, sample: Sample) -> int:
    """Samples that look equal are still others."""
    return next(place for place, other in enumerate(group) if other is sample)
