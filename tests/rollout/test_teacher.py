"""A teacher behind HTTP: what a real engine tells of the policy's tokens, and what it must not."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest

from spmd_rl.rollout.answers import BadAnswer
from spmd_rl.rollout.columns import to_batch
from spmd_rl.rollout.fleet import EngineAddresses
from spmd_rl.rollout.teacher import Teacher
from spmd_rl.types import Sample, Status
from tests.engine import KEY, another_engine, engine_config, hf_log_probs
from tests.models import tiny_model
from tests.rollout.collecting import config, in_this_process
from tests.stub_engine import Answer, stub_engine

CONTEXT = 60
OPD = {"use_opd": True, "opd_type": "sglang"}


@pytest.fixture(scope="module")
def taught():
    """A teacher's model."""
    return tiny_model("qwen3", hidden=96, layers=3, positions=1024, seed=1)


@pytest.fixture(scope="module")
def addresses(engine, taught, tmp_path_factory):
    """An engine that generates, and one as the job starts it for `algo.opd_teacher_load`."""
    policy = tiny_model("qwen3", positions=CONTEXT)
    cfg = engine_config(policy, algo=OPD | {"opd_teacher_load": str(taught)})
    with another_engine(engine, cfg, tmp_path_factory.mktemp("teacher"), teacher=True) as host:
        [(_, url)] = host.wait_ready(120)
        yield EngineAddresses([engine.url], engine.url, KEY, url)


@pytest.mark.parametrize("hook", [None, "tests.rollout.user_hooks.two_turns"])
def test_a_teacher_tells_its_log_probs_of_every_response_token(
    engine, addresses, taught, tmp_path, hook
):
    cfg = config(
        tmp_path,
        model={"hf_checkpoint": str(engine.model)},
        rollout={
            "custom_generate_function_path": hook,
            "rollout_max_context_len": CONTEXT,
            "rollout_max_response_len": 8 if hook else CONTEXT,  # some fill the context
        },
        algo=OPD | {"opd_teacher_load": str(taught)},
    )
    batch = in_this_process(cfg, addresses).batch
    assert batch.total_lengths.max() == CONTEXT or hook
    ends = batch.total_lengths.cumsum()
    rows = [row.tolist() for row in np.split(batch.tokens, ends[:-1])]
    cuts = (batch.total_lengths - batch.response_lengths).tolist()
    halves = [(row[:cut], row[cut:]) for row, cut in zip(rows, cuts, strict=True)]
    want = np.concatenate(hf_log_probs(taught, *map(list, zip(*halves, strict=True))))
    np.testing.assert_allclose(batch.teacher_log_probs, want, atol=1e-5)
    assert np.abs(want - batch.rollout_log_probs).max() > 0.1  # the policy's are others
    some = batch.take([2, 0])  # they stay with their samples
    first = batch.response_lengths[0]
    np.testing.assert_array_equal(some.teacher_log_probs[-first:], batch.teacher_log_probs[:first])


def ask(url: str, samples: list[Sample], tmp_path) -> None:
    cfg = config(tmp_path, algo=OPD, reward={"rm_url": url})

    async def tell() -> None:
        teacher = Teacher(cfg, "", "")
        try:
            await teacher.tell(samples)
        finally:
            await teacher.close()

    asyncio.run(tell())


def told(*tokens: int) -> str:
    return json.dumps({"meta_info": {"input_token_logprobs": [[-0.5, t, None] for t in tokens]}})


@pytest.mark.parametrize("path", ["", "/", "/generate"])
def test_a_server_of_the_users_is_asked_at_rm_url(tmp_path, path):
    done = Sample(tokens=[1, 2, 3], response_length=2, status=Status.COMPLETED)
    with stub_engine(lambda number, body: Answer(raw=told(1, 2, 3))) as server:
        ask(server.url + path, [done], tmp_path)
        ask(server.url + path, [done], tmp_path)  # known by now
    assert done.teacher_log_probs == [-0.5, -0.5]
    [request] = server.requests
    assert request["logprob_start_len"] == 0 and request["return_logprob"] is True
    assert request["sampling_params"]["max_new_tokens"] == 0
    assert server.keys == {None}  # the job's key is not for others


@pytest.mark.parametrize(
    "raw", [told(1, 2, 4), told(3), "{}", told(1, 2, 3).replace("-0.5", "NaN")]
)
def test_what_no_teacher_of_these_tokens_tells_is_refused(tmp_path, raw):
    sample = Sample(tokens=[1, 2, 3], response_length=2, status=Status.COMPLETED)
    with (
        stub_engine(lambda number, body: Answer(raw=raw)) as server,
        pytest.raises(BadAnswer, match="the teacher"),
    ):
        ask(server.url, [sample], tmp_path)


def test_a_response_that_changed_after_the_teacher_told_is_refused(tmp_path):
    cfg = config(tmp_path, algo=OPD, reward={"rm_url": "http://x"})
    sample = Sample(index=7, tokens=[1, 2, 3], response_length=2, reward=1.0)
    sample.teacher_log_probs = [-1.0]
    with pytest.raises(ValueError, match="sample 7 has 1 teacher_log_probs.*response_length 2"):
        to_batch([[sample]], cfg)
