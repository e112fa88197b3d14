"""What the collector process does: prompts, generation, rewards, columns.

Comes in: the configuration, the engines' addresses, requests of rank 0; goes out: rollouts and
evaluations. It must not know how rank 0 talks to it (process.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from itertools import chain
from typing import Any, TypeVar

from spmd_rl import hooks
from spmd_rl.config.evaluation import evaluates
from spmd_rl.config.schema import Config
from spmd_rl.data.buffer import Buffer
from spmd_rl.data.prompts import training_source
from spmd_rl.data.template import Template, load_tokenizer
from spmd_rl.rewards.score import Scorer
from spmd_rl.rollout import dump, evaluate
from spmd_rl.rollout.answers import vocab_size
from spmd_rl.rollout.client import Addresses, EngineClient, Tell
from spmd_rl.rollout.collect import Round, Tasks, collect_round
from spmd_rl.rollout.columns import in_order, to_batch
from spmd_rl.rollout.filters import verdict
from spmd_rl.rollout.generate import Counts, Generator, sampling_params, use
from spmd_rl.rollout.routes import routes
from spmd_rl.rollout.sft import Encoder
from spmd_rl.rollout.stats import partial_metrics, rollout_metrics, sample_metrics
from spmd_rl.tasks import together
from spmd_rl.types import Batch, Group, Sample, Status

T = TypeVar("T")

UNFINISHED = (Status.PENDING, Status.ABORTED)

Collected = tuple[Batch, dict[str, float], dict[str, Any]]  # batch, metrics, state after it


class Service:
    """One run's rollouts, one request at a time."""

    def __init__(self, cfg: Config, without_torch: bool = False, report: Tell | None = None):
        """`report` hears of engines found broken; None, or without use_fault_tolerance: raised."""
        self.cfg = cfg
        self.report = report if cfg.rollout.use_fault_tolerance else None
        # Before the tokenizer: a hook that imports torch gets a transformers that knows it.
        self.scorer = Scorer(cfg)
        self.filter = hooks.optional(cfg.rollout.dynamic_sampling_filter_path)
        self.post_process = hooks.optional(cfg.reward.custom_reward_post_process_path)
        hooks.optional(cfg.rollout.custom_generate_function_path)
        self.tokenizer = load_tokenizer(
            cfg.model.hf_checkpoint, cfg.model.trust_remote_code, without_torch
        )
        template = Template(
            self.tokenizer, cfg.data.apply_chat_template, cfg.data.apply_chat_template_kwargs
        )
        self.trains = bool(cfg.data.prompt_data) or cfg.rollout.num_rollout != 0
        self.source = Buffer(cfg, training_source(cfg, template)) if self.trains else None
        self.evaluations = evaluate.load(cfg, template) if evaluates(cfg) else []
        supervised = cfg.algo.loss_type == "sft_loss"
        self.encoder = Encoder(template, cfg.data.loss_mask_type) if supervised else None
        self.generator: Generator | None = None
        self.in_order = bool(cfg.sglang.get("enable_deterministic_inference"))
        self._ahead: tuple[int, asyncio.Task[Collected]] | None = None

    @property
    def notes(self) -> list[str]:
        """What the user should know about the data."""
        sets = [self.source.source.prompts] if self.source else []
        return [note for part in (*sets, *self.evaluations) for note in part.notes]

    async def num_prompts(self) -> int:
        return len(self._source())

    async def connect(self, addresses: Addresses) -> None:
        timeout = self.cfg.rollout.rollout_request_timeout
        client = EngineClient(
            addresses, timeout, self.report, vocab_size(self.cfg), routes(self.cfg)
        )
        if self.generator:
            await self.generator.client.close()
        self.generator = Generator(self.cfg, self.tokenizer, client)

    def broke(self, indices: list[int]) -> None:
        """These engines are being started again."""
        if self.generator:
            self.generator.client.broke(indices)

    def mended(self, index: int, starts: int) -> None:
        """The engine generates again; it was started again `starts` times."""
        if self.generator:
            self.generator.client.mended(index, starts)

    async def collect(self, rollout: int, version: int) -> Collected:
        if self.encoder is None:
            return await self._generate(rollout, version)
        if self._ahead and self._ahead[0] == rollout:
            collected = await self._ahead[1]
        else:
            collected = await self._encode()
        # The next batch is made while this one is trained on.
        self._ahead = (rollout + 1, asyncio.create_task(self._encode()))
        return collected

    async def evaluate(self, rollout: int) -> dict[str, float]:
        generator = self._engines()
        return await self._or_abort(evaluate.evaluate(self.evaluations, generator, self.scorer))

    async def load_state(self, state: dict[str, Any]) -> None:
        await self._drop_ahead()
        self._source().load_state(state)

    async def close(self) -> None:
        await self._drop_ahead()
        await self.scorer.close()
        if self.generator:
            await self.generator.client.close()

    async def _or_abort(self, work: Awaitable[T]) -> T:
        """The work; if it is abandoned, the engines drop its requests."""
        try:
            return await work
        except asyncio.CancelledError:
            await self._engines().client.abort_all()
            raise

    async def _generate(self, rollout: int, version: int) -> Collected:
        cfg, generator, source = self.cfg, self._engines(), self._source()
        use(generator)
        generator.counts = Counts()
        started = time.monotonic()
        collecting = collect_round(
            cfg.rollout.rollout_batch_size,
            source.draw,
            self._group,
            self._judge,
            generator.client.abort_all,
            cfg.rollout.over_sampling_batch_size,
            in_order=self.in_order,
            rest=self._rest if cfg.rollout.partial_rollout else None,
        )
        result = await self._or_abort(collecting)
        seconds = time.monotonic() - started
        resumed = source.resumed
        source.rest(result.kept, rollout)
        dump.save(cfg.debug.save_debug_rollout_data, rollout, result.groups)
        rewards = await self._post_processed(result)
        batch = to_batch(result.groups, cfg, version, rewards)
        engines = len(generator.client.addresses.urls)
        metrics = rollout_metrics(
            result, batch.raw_rewards, cfg, generator.counts, seconds, engines
        )
        if cfg.rollout.partial_rollout:
            metrics |= partial_metrics(result, batch, version, resumed, len(source.groups))
        return batch, metrics, source.state()

    async def _group(self, group: Group) -> Group:
        """Generate and reward the samples of one prompt, each as soon as it can be. What is
        generated stands in the group at once, so that it can be kept if this is cancelled.
        """
        generator, sampling = self._engines(), sampling_params(self.cfg)
        as_group = self.cfg.reward.group_rm

        async def some(samples: Group) -> Group:
            parts = await generator.portion(samples, sampling)
            for sample, made in zip(samples, parts, strict=True):
                if len(made) == 1:
                    group[_place(group, sample)] = made[0]
            made = list(chain.from_iterable(parts))
            if not as_group:
                await self.scorer.group(made)
            return made

        done = [sample for sample in group if sample.status not in UNFINISHED]
        begun = [sample for sample in group if sample.status in UNFINISHED]
        of = self.cfg.rollout.rollout_batch_size * self.cfg.rollout.n_samples_per_prompt
        portions = generator.portions(begun, of)
        made = list(chain.from_iterable(await together(map(some, portions))))
        finished = sorted(done + made, key=lambda sample: sample.index)
        if as_group or done:
            await self.scorer.group(finished)
        return finished

    async def _rest(self, running: Tasks) -> None:
        """Stop what is generated beyond the rollout. Where runs must be equal it goes on to its
        end: how far it is now is a matter of timing.
        """
        if self.in_order:
            await asyncio.wait(running)
        else:
            await self._engines().stop()
            self._engines().stopped = False  # the tasks end before they run again
        for task in running:
            if task.done():
                task.result()

    async def _judge(self, group: Group) -> str | None:
        if self.filter is None:
            return None
        return verdict(await hooks.call(self.filter, self.cfg, group))

    async def _post_processed(self, result: Round):
        if self.post_process is None:
            return None
        return await hooks.call(self.post_process, self.cfg, in_order(result.groups))

    async def _encode(self) -> Collected:
        """A batch for supervised fine-tuning; the event loop stays free meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(None, self._encode_now)

    def _encode_now(self) -> Collected:
        assert self.encoder
        source = self._source()
        groups = source.draw(self.cfg.rollout.rollout_batch_size)
        for group in groups:
            for sample in group:
                self.encoder.encode(sample)
        seen = sample_metrics(in_order(groups))
        metrics = {f"rollout/{k}": v for k, v in seen.items() if k.startswith("response_len")}
        return to_batch(groups, self.cfg), metrics, source.state()

    async def _drop_ahead(self) -> None:
        """Forget a batch made ahead; a thread cannot be stopped, so its end is waited for."""
        if self._ahead:
            await asyncio.gather(self._ahead[1], return_exceptions=True)
            self._ahead = None

    def _source(self):
        if self.source is None:
            raise ValueError("data.prompt_data is missing: there is nothing to train on")
        return self.source

    def _engines(self) -> Generator:
        if self.generator is None:
            raise RuntimeError("no engines are connected: Collector.connect comes first")
        return self.generator


def _place(group: Group, sample: Sample) -> int:
    """Samples that look equal are still others."""
    return next(place for place, other in enumerate(group) if other is sample)
