"""Engines that break while samples are generated: what the collector does about it."""

from __future__ import annotations

import asyncio
import json
import threading

import numpy as np
import pytest

from spmd_rl.rollout.answers import BadAnswer
from spmd_rl.rollout.client import EngineClient
from tests.rollout.collecting import collecting, config
from tests.stub_engine import TOKEN, Addresses, Answer, stub_engine


def said(**meta) -> Answer:
    """An answer with this in its meta_info."""
    sound = {"output_token_logprobs": [[-0.5, TOKEN, None]], "weight_version": "1"}
    sound["finish_reason"] = {"type": "stop"}
    return Answer(raw=json.dumps({"text": "x", "meta_info": sound | meta}))


FAULTS = {
    "half a page": (Answer(raw='{"text": "x", "meta_'), "without JSON"),
    "another form": (Answer(raw='{"text": "x"}'), "answered in another form"),
    "no log-probs": (said(output_token_logprobs=[[None, TOKEN, None]]), "no finite numbers"),
    "NaN": (said(output_token_logprobs=[[float("nan"), TOKEN, None]]), "without JSON"),
    "unknown token": (said(output_token_logprobs=[[-0.5, 256, None]]), "vocabulary of 256"),
    "lengths": (
        Answer(raw='{"output_ids": [5, 5], "meta_info": {"output_token_logprobs": []}}'),
        "2 tokens, but 0 log-probs",
    ),
    "server error": (Answer(status=500), "answered 500"),
    "no answer": (Answer(hold=True), "gave no answer within 0.5 s"),
}
SAMPLING = {"max_new_tokens": 4}


def client(urls: list[str], tell=None) -> EngineClient:
    return EngineClient(Addresses(urls, urls[0], ""), 0.5, tell, vocab_size=256)


@pytest.mark.parametrize("fault", FAULTS)
def test_another_engine_answers_for_one_that_is_broken(fault):
    answer, words = FAULTS[fault]
    told = []

    async def ask(urls):
        asking = client(urls, lambda *what: told.append(what))
        answers = await asyncio.gather(*(asking.generate([5], SAMPLING) for _ in range(4)))
        await asking.abort_all()  # which the broken one is spared
        await asking.close()
        return answers

    with stub_engine(lambda *_: answer) as broken, stub_engine() as sound:
        answers = asyncio.run(ask([broken.url, sound.url]))
    assert [one.tokens for one in answers] == [[TOKEN] * 4] * 4
    [(index, starts, why)] = told
    assert (index, starts) == (0, 0)
    assert why.startswith(f"engine 0 ({broken.url})") and words in why
    assert (broken.aborts, sound.aborts) == (0, 1)


def test_nonsense_ends_the_run_where_engines_are_not_mended():
    answer, words = FAULTS["no log-probs"]

    async def ask(url):
        asking = client([url])
        try:
            await asking.generate([5], SAMPLING)
        finally:
            await asking.close()

    with stub_engine(lambda *_: answer) as engine, pytest.raises(BadAnswer, match=words):
        asyncio.run(ask(engine.url))


def test_requests_leave_an_engine_as_soon_as_it_is_known_to_be_gone():
    arrived = threading.Event()

    def hang(*_):
        arrived.set()
        return Answer(hold=True)

    async def ask(urls):
        asking = EngineClient(Addresses(urls, urls[0], ""), 600.0, lambda *_: None)
        answer = asyncio.create_task(asking.generate([5], SAMPLING))
        await asyncio.get_running_loop().run_in_executor(None, arrived.wait)
        asking.broke([0])
        await answer
        await asking.close()

    with stub_engine(hang) as hung, stub_engine() as sound:
        asyncio.run(ask([hung.url, sound.url]))
    assert len(hung.requests) == len(sound.requests) == 1


def test_tokens_of_an_engine_without_our_weights_do_not_count():
    """One that was started again answers through the router before it is filled."""

    async def ask(engine):
        asking = client([engine.url], lambda *_: pytest.fail("it is not broken"))
        answer = await asking.generate([5], SAMPLING)
        await asking.close()
        return answer

    def answer(number, body):
        return said(weight_version="default") if number < 2 else Answer()

    with stub_engine(answer) as engine:
        assert asyncio.run(ask(engine)).versions == [1] * 4
        assert len(engine.requests) == 3


@pytest.mark.parametrize("together", [True, False])
def test_a_rollout_waits_for_its_only_engine_and_is_what_it_would_have_been(tmp_path, together):
    """The collector process: it says what is broken, is told when it is mended, loses nothing."""
    sections = {"rollout": {"use_fault_tolerance": True, "group_requests": together}}

    def rollout(answer):
        with stub_engine(answer) as engine:
            cfg = config(tmp_path, **sections)
            with collecting(cfg, tmp_path, engine.addresses) as collector:
                reasons = []

                def mend():
                    for index, starts, why in collector.reported():
                        reasons.append(why)
                        collector.broke([index])
                        broken.clear()
                        collector.mended(index, starts + 1)

                collector.while_waiting = mend
                return collector.collect(0, version=1), reasons

    def sound(number, body):
        return Answer(tokens=body["sampling_params"]["sampling_seed"] % 5 + 1)

    def breaks(number, body):
        return Answer(status=500) if broken and number >= 3 else sound(number, body)

    broken = ["from the fourth sample on"]
    disturbed, [reason] = rollout(breaks)
    assert "engine 0" in reason and "answered 500" in reason
    undisturbed, _ = rollout(sound)
    for name in ("tokens", "response_lengths", "rewards", "rollout_ids", "weight_versions"):
        ours, theirs = (getattr(one.batch, name) for one in (disturbed, undisturbed))
        np.testing.assert_array_equal(ours, theirs)
    assert disturbed.state == undisturbed.state
