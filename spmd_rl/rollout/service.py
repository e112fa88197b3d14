"""What the collector process does: prompts, generation, rewards, columns.

Comes in: the configuration, the engines' addresses, requests of rank 0; goes out: rollouts and
evaluations. It must not know how rank 0 talks to it (process.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from functools import partial
from typing import Any, TypeVar

from spmd_rl import hooks
from spmd_rl.config.evaluation import evaluates
from spmd_rl.config.schema import Config
from spmd_rl.data.source import Buffer, UserSource, source_of
from spmd_rl.data.template import Template, load_tokenizer
from spmd_rl.rewards.score import Scorer
from spmd_rl.rollout import dump, evaluate, user
from spmd_rl.rollout.answers import vocab_size
from spmd_rl.rollout.client import Addresses, EngineClient, Tell
from spmd_rl.rollout.columns import in_order, to_batch
from spmd_rl.rollout.generate import Counts, Generator, use
from spmd_rl.rollout.rounds import Rounds
from spmd_rl.rollout.routes import routes
from spmd_rl.rollout.sft import Encoder
from spmd_rl.rollout.stats import offpolicy_share, rollout_metrics, sample_metrics
from spmd_rl.rollout.teacher import Teacher
from spmd_rl.types import Batch

T = TypeVar("T")

Collected = tuple[Batch, dict[str, float], dict[str, Any]]  # batch, metrics, state after it


class Service:
    """One run's rollouts, one request at a time."""

    def __init__(self, cfg: Config, without_torch: bool = False, report: Tell | None = None):
        """`report` hears of engines found broken; None, or without use_fault_tolerance: raised."""
        self.cfg = cfg
        self.report = report if cfg.rollout.use_fault_tolerance else None
        # Before the tokenizer: a hook that imports torch gets a transformers that knows it.
        self.scorer = Scorer(cfg)
        self.functions = user.Functions(cfg)
        user.use(self._ours)
        hooks.optional(cfg.rollout.custom_generate_function_path)
        self.tokenizer = load_tokenizer(
            cfg.model.hf_checkpoint, cfg.model.trust_remote_code, without_torch
        )
        template = Template(
            self.tokenizer, cfg.data.apply_chat_template, cfg.data.apply_chat_template_kwargs
        )
        self.replays = bool(cfg.debug.load_debug_rollout_data)
        draws = bool(cfg.data.prompt_data) or cfg.rollout.num_rollout != 0
        if self.replays:
            draws = cfg.rollout.num_rollout is None  # then their number is asked for
        self.source = source_of(cfg, template) if draws else None
        self.evaluations = evaluate.load(cfg, template) if evaluates(cfg) else []
        made = cfg.rollout.rollout_function_path or self.replays
        supervised = cfg.algo.loss_type == "sft_loss" and not made
        self.encoder = Encoder(template, cfg.data.loss_mask_type) if supervised else None
        self.generator: Generator | None = None
        self.rounds = Rounds(cfg, self.scorer, self.functions)
        self._ahead: tuple[int, asyncio.Task[Collected]] | None = None

    @property
    def notes(self) -> list[str]:
        """What the user should know about the data."""
        sets = [self.source] if self.source else []
        return [note for part in (*sets, *self.evaluations) for note in part.notes]

    async def num_prompts(self) -> int:
        return len(self._source())

    async def connect(self, addresses: Addresses) -> None:
        timeout = self.cfg.rollout.rollout_request_timeout
        client = EngineClient(
            addresses, timeout, self.report, vocab_size(self.cfg), routes(self.cfg)
        )
        await self._disconnect()
        self.generator = Generator(self.cfg, self.tokenizer, client)
        if self.cfg.algo.use_opd and self.cfg.algo.opd_type == "sglang":
            self.generator.teacher = Teacher(self.cfg, addresses.teacher_url, addresses.key)

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
            collected = await self._encode(rollout)
        # The next batch is made while this one is trained on.
        self._ahead = (rollout + 1, asyncio.create_task(self._encode(rollout + 1)))
        return collected

    async def evaluate(self, rollout: int) -> dict[str, float]:
        cfg = self.cfg
        use(self._engines().for_evaluation(None, cfg.rollout.rollout_max_context_len))
        source = self.source.given if self.source else None
        made = await self._or_abort(self.functions.evaluate(rollout, source))
        samples = []
        for name, of in made.data.items():
            for sample in of.get("samples", ()):
                sample.metadata["data_set"] = name
                samples.append(sample)
        dump.save(cfg.debug.save_debug_rollout_data, f"eval_{rollout}", samples)
        ours = evaluate.metrics(cfg, made.data)
        return await self.functions.log_eval(rollout, made.data, ours, made.metrics or {})

    async def load_state(self, state: dict[str, Any]) -> None:
        await self._drop_ahead()
        if not self.replays:
            self._source().load_state(state)

    async def close(self) -> None:
        await self._drop_ahead()
        await self.scorer.close()
        await self._disconnect()

    async def _disconnect(self) -> None:
        if self.generator:
            await self.generator.client.close()
            if self.generator.teacher:
                await self.generator.teacher.close()

    async def _or_abort(self, work: Awaitable[T]) -> T:
        """The work; if it is abandoned, the engines drop its requests."""
        try:
            return await work
        except asyncio.CancelledError:
            if self.generator:
                await self.generator.client.abort_all()
            raise

    async def _ours(self, rollout: int, source: Any, evaluation: bool) -> Any:
        """What `generate_rollout` does; the source is the run's own, whatever it is given."""
        generator = self._engines()
        if not evaluation:
            return await self.rounds.collect(rollout, self._source(), generator)
        see = partial(self.functions.see, rollout=rollout, evaluation=True)
        data = await evaluate.evaluate(self.evaluations, generator, self.scorer, see)
        return user.RolloutFnEvalOutput(data)

    async def _generate(self, rollout: int, version: int) -> Collected:
        cfg, source = self.cfg, self._source() if not self.replays else None
        counts, engines = Counts(), 0
        if self.generator:
            use(self.generator)
            self.generator.counts = counts
            engines = len(self.generator.client.addresses.urls)
        started = time.monotonic()
        if source is None:
            made = user.RolloutFnTrainOutput(user.groups_of(dump.load(cfg.debug, rollout)))
        else:
            made = await self._or_abort(self.functions.collect(rollout, source.given))
        seconds = time.monotonic() - started
        samples = in_order(made.samples)
        dump.save(cfg.debug.save_debug_rollout_data, rollout, samples)
        trained, rewards = await self.functions.train_data(samples)
        if self.generator and self.generator.teacher:  # of what a function of the user's made
            await self.generator.teacher.tell(trained)
        batch = to_batch([trained], cfg, version, rewards)
        ours = rollout_metrics(made.samples, batch.raw_rewards, cfg, counts, seconds, engines)
        if cfg.rollout.partial_rollout:
            ours |= offpolicy_share(batch, version)
        metrics = await self.functions.log(rollout, samples, ours, made.metrics or {}, seconds)
        return batch, metrics, source.state(rollout) if source else {}

    async def _encode(self, rollout: int) -> Collected:
        """A batch for supervised fine-tuning; the event loop stays free meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(None, self._encode_now, rollout)

    def _encode_now(self, rollout: int) -> Collected:
        assert self.encoder
        source = self._source()
        groups = source.get_samples(self.cfg.rollout.rollout_batch_size)
        for group in groups:
            for sample in group:
                self.encoder.encode(sample)
        samples = in_order(groups)
        dump.save(self.cfg.debug.save_debug_rollout_data, rollout, samples)
        seen = sample_metrics(samples)
        metrics = {f"rollout/{k}": v for k, v in seen.items() if k.startswith("response_len")}
        return to_batch(groups, self.cfg), metrics, source.state(rollout)

    async def _drop_ahead(self) -> None:
        """Forget a batch made ahead; a thread cannot be stopped, so its end is waited for."""
        if self._ahead:
            await asyncio.gather(self._ahead[1], return_exceptions=True)
            self._ahead = None

    def _source(self) -> Buffer | UserSource:
        if self.source is None:
            raise ValueError("data.prompt_data is missing: there is nothing to train on")
        return self.source

    def _engines(self) -> Generator:
        if self.generator is None:
            raise RuntimeError("no engines are connected: Collector.connect comes first")
        return self.generator
