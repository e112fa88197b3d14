"""Functions a user might write, for tests of the keys that name them."""

import asyncio
import os
import signal
import threading
import time

from spmd_rl.rollout.filters import DynamicFilterOutput
from spmd_rl.rollout.generate import current, generate, keep_experts
from spmd_rl.types import Sample, Status


async def length_reward(args, sample, **kwargs):
    return float(sample.response_length)


def plain_reward(args, sample):
    return args.rollout_batch_size + sample.index / 100


def reward_by_index(args, sample):
    return float(sample.index % 2)


def object_reward(args, sample):
    return {"score": float(sample.index % 2), "why": "parity"}


async def group_reward(args, samples, **kwargs):
    assert len({sample.group_index for sample in samples}) == 1
    return [sample.index - samples[0].index for sample in samples]


def wrong_group_reward(args, samples):
    return [1.0]


def raising_reward(args, sample):
    raise KeyError("the user's own mistake")


async def raising_generate(args, sample, sampling_params):
    if sample.index == 1:
        raise ZeroDivisionError("in the middle of a rollout")
    await asyncio.Event().wait()


def exiting_reward(args, sample):
    print("last words of the user's code", flush=True)
    os._exit(7)


def killed_reward(args, sample):
    os.kill(os.getpid(), signal.SIGKILL)


def forking_reward(args, sample):
    """A child that keeps every open file descriptor, and then a death."""
    if os.fork() == 0:
        time.sleep(30)
        os._exit(0)
    os._exit(3)


_together = threading.Barrier(8)


def blocking_reward(args, sample):
    """Returns only when eight calls block at once: one after the other they would never end."""
    _together.wait(30)
    return 1.0


async def two_turns(args, sample, sampling_params):
    """A tool answers after the first turn; its tokens are not trained on."""
    sample = await generate(args, sample, sampling_params)
    turn, observation = sample.response_length, [7, 7, 7]
    sample.tokens += observation
    answer = await current().ask(sample.tokens, sampling_params)
    sample.tokens += answer.tokens
    keep_experts(sample, answer)
    sample.response += answer.text
    sample.response_length += len(observation) + len(answer.tokens)
    sample.loss_mask = [1] * turn + [0] * 3 + [1] * len(answer.tokens)
    sample.rollout_log_probs += [0.0] * 3 + answer.log_probs
    sample.weight_versions += answer.versions[:1] * 3 + answer.versions
    return sample


def sync_generate(args, sample, sampling_params, evaluation=False):
    """No engine at all; the evaluation flag shows in the tokens."""
    made = 9 if evaluation else 8
    return Sample(
        group_index=sample.group_index,
        index=sample.index,
        tokens=[1, made],
        response_length=1,
        response=str(made),
        label=sample.label,
        reward=float(made),
        rollout_log_probs=[-1.0],
        weight_versions=[4],
        status=Status.COMPLETED,
    )


def fan_out(args, sample, sampling_params):
    """One prompt's sample becomes two trajectories."""
    return [sync_generate(args, sample, sampling_params) for _ in range(2)]


def no_sample(args, sample, sampling_params):
    return "text"


def drop_odd_groups(args, samples, **kwargs):
    return samples[0].group_index % 2 == 0


def drop_with_reason(args, samples, **kwargs):
    odd = samples[0].group_index % 2
    return DynamicFilterOutput(not odd, "odd_group" if odd else None)


def halve(args, samples):
    raw = [sample.reward for sample in samples]
    return raw, [reward / 2 for reward in raw]


def uneven_reward(args, sample):
    """Every third prompt gets the same reward for all its samples."""
    return 1.0 if sample.group_index % 3 == 0 else float(sample.index % 2)


def newest_first(args, rollout_id, buffer, num_samples):
    """A buffer filter that takes one group at most."""
    return [buffer.pop()]


async def noted(args, sample, sampling_params):
    """Generates only what the evaluation's settings reached."""
    assert sample.metadata["note"] == "seen"
    return await generate(args, sample, sampling_params)
