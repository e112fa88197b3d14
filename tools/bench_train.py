#!/usr/bin/env python3
"""A packed training step of one rank against bare megatron-core, and against padded transformers.

  python tools/bench_train.py [--samples 64] [--rounds 5]

Same model file and samples, long-tailed lengths, one thread, fp32, turns taken (ours,
megatron-core, transformers, ours, ...); medians. Time is that of the processor, which is the
clock's where nobody else works. Bare megatron-core is the same modules, micro-batches packed
beforehand, Megatron's cross entropy, schedule, DDP and Adam, without our loss, metrics or packing.
transformers is forward, cross entropy, backward, clipping and fused AdamW over batches padded to
their longest sample, of the size that is fastest; one sample at a time, without padding, is shown
beside it. Prints tokens/s (padding is not counted) and ratios; status 1 where ours is below 0.9 of
the first or 1.5 of the second. Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from spmd_rl.types import Batch  # noqa: E402

GOALS = {"megatron-core": 0.9, "transformers": 1.5}
PROMPT, MEAN, SPREAD, LONGEST = 8, 96, 0.85, 768
ROWS = (4, 8, 16, 32)  # of a padded batch: the fastest is used
MAX_TOKENS = 2048  # of a micro-batch


def long_tailed(samples: int) -> Batch:
    """Log-normal response lengths; everything a policy loss needs."""
    rng = np.random.default_rng(0)
    drawn = rng.lognormal(np.log(MEAN) - SPREAD**2 / 2, SPREAD, samples)
    responses = np.clip(drawn, 1, LONGEST).astype(np.int32)
    totals = responses + np.int32(PROMPT)
    return Batch(
        tokens=rng.integers(1, 2000, totals.sum()).astype(np.int32),
        total_lengths=totals,
        response_lengths=responses,
        loss_mask=np.ones(responses.sum(), np.uint8),
        rewards=rng.standard_normal(samples).astype(np.float32),
        raw_rewards=rng.random(samples).astype(np.float32),
        rollout_ids=np.arange(samples),
        rollout_log_probs=np.full(responses.sum(), -7.0, np.float32),
        truncated=np.zeros(samples, np.uint8),
    )


def make_model(folder: Path) -> Path:
    """3.7 M parameters, as in tools/bench_step.py."""
    from tools.bench_step import prepare

    return prepare(folder, 1)[0]


def ours(ranks: Any, model: Path, batch: Batch) -> tuple[Callable[[], None], Any]:
    """A step as in a run: the shard is packed, the loss has its metrics. And the trainer."""
    from tools.parity.ranks import config, shard_of

    cfg = config(
        model,
        train={"lr": 1e-4, "clip_grad": 1.0, "max_tokens_per_gpu": MAX_TOKENS},
        rollout={"rollout_batch_size": len(batch), "n_samples_per_prompt": 1, "num_rollout": 9999},
    )
    trainer = ranks.trainer(cfg)
    shard = shard_of(batch, cfg, trainer.placement, 0)

    def step() -> None:
        trainer.load(shard)
        trainer.train(0)

    return step, trainer


def bare(ranks: Any, trainer: Any, batch: Batch) -> Callable[[], None]:
    """Megatron's schedule over the same micro-batches, packed already, with its own cross entropy,
    on another copy of the same model.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from spmd_rl.trainer.data import RolloutData
    from tools.parity.ranks import shard_of

    cfg, copy = trainer.cfg, ranks.trainer(trainer.cfg)
    actor = copy.actor
    [model], schedule = actor.wrapped, get_forward_backward_func()
    shard = shard_of(batch, cfg, copy.placement, 0)
    pieces = RolloutData(shard, cfg, copy.groups, copy.device).step(0)
    for piece in pieces:
        piece.packing.cache.clear()
    output, tokens = actor.chunks[0].output_layer, len(batch.loss_mask)

    def forward(iterator: Any, model: Any) -> Any:
        piece = next(iterator)
        made = piece.micro_batch
        output.rows = made.logit_rows
        logits = model(made.tokens, made.position_ids, None, packed_seq_params=piece.packing)

        def loss(logits: Any) -> Any:
            losses = vocab_parallel_cross_entropy(logits.float(), made.targets[None])
            one = torch.ones((), dtype=torch.int)
            return losses.sum() / tokens, one, {"loss": losses.detach().sum()}

        return logits, loss

    def step() -> None:
        model.zero_grad_buffer()
        actor.optimizer.zero_grad()
        schedule(
            forward_step_func=forward,
            data_iterator=iter(pieces),
            model=model,
            num_microbatches=len(pieces),
            seq_length=1,
            micro_batch_size=1,
            forward_only=False,
        )
        actor.optimizer.step()

    return step


def padded(model: Path, batch: Batch, rows: int) -> Callable[[], None]:
    """transformers and AdamW over padded batches of so many samples, in the order they came."""
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    samples = torch.from_numpy(batch.tokens).long().split(batch.total_lengths.tolist())
    total = len(batch.loss_mask)
    batches = []
    for first in range(0, len(samples), rows):
        chosen = list(samples[first : first + rows])
        tokens = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True)
        lengths = torch.tensor([len(sample) for sample in chosen])[:, None]
        mask = torch.arange(tokens.size(1)) < lengths
        labels = tokens.masked_fill(~mask, -100)
        labels[:, :PROMPT] = -100
        batches.append((tokens, mask.long(), labels[:, 1:]))

    def step() -> None:
        optimizer.zero_grad()
        for tokens, mask, labels in batches:
            logits = net(tokens, attention_mask=mask).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), labels.flatten(), reduction="sum"
            )
            (loss / total).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()

    return step


def seconds(step: Callable[[], None]) -> float:
    began = time.process_time()
    step()
    return time.process_time() - began


def measure(model: Path, samples: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each side's steps, one of each in turn; the first of each is not counted."""
    from tools.parity.ranks import Ranks

    batch = long_tailed(samples)
    with Ranks() as ranks:
        own, trainer = ours(ranks, model, batch)
        choices = {rows: padded(model, batch, rows) for rows in ROWS}
        spent = {rows: min(seconds(step), seconds(step)) for rows, step in choices.items()}
        fastest = min(spent, key=lambda rows: spent[rows])
        sides = {
            "spmd_rl": own,
            "megatron-core": bare(ranks, trainer, batch),
            "transformers": choices[fastest],
            "- one by one": padded(model, batch, 1),
        }
        print(f"transformers pads batches of {fastest} samples", file=sys.stderr)
        found: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(rounds + 1):
            for side, step in sides.items():
                spent_now = seconds(step)
                if turn:
                    found[side].append(spent_now)
    return found


def report(found: dict[str, list[float]], tokens: int) -> tuple[str, dict[str, float]]:
    """The table and the ratios of our tokens/s to each other side's, turn by turn."""
    lines = [f"{'side':14} {'step s':>8} {'min..max':>16} {'tokens/s':>9}   ours / it (goal)"]
    ratios = {}
    for side, times in found.items():
        step = statistics.median(times)
        line = f"{side:14} {step:8.3f} {min(times):7.3f}..{max(times):7.3f} {tokens / step:9,.0f}"
        if side != "spmd_rl":
            pairs = zip(found["spmd_rl"], times, strict=True)
            ratios[side] = statistics.median(other / own for own, other in pairs)
            line += f"   {ratios[side]:.2f}" + (f" ({GOALS[side]})" if side in GOALS else "")
        lines.append(line)
    return "\n".join(lines), ratios


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    from spmd_rl.weights.convert import launched_environment

    launched_environment()
    os.environ["MASTER_PORT"] = "0"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
        model = make_model(Path(folder))
        found = measure(model, options.samples, options.rounds)
    batch = long_tailed(options.samples)
    tokens = int(batch.total_lengths.sum())
    print(
        f"{len(batch)} samples, {tokens:,} tokens, longest {batch.total_lengths.max()}, mean "
        f"{batch.total_lengths.mean():.0f}"
    )
    table, ratios = report(found, tokens)
    print(table)
    print(json.dumps({"ratios": ratios, "seconds": found}))
    return int(any(not ratios[side] >= goal for side, goal in GOALS.items()))


if __name__ == "__main__":
    sys.exit(main())
