"""The collector against the rules of over-sampling, whatever engines and filters do in any order.

Two engines answer late, abort unasked, die and answer nonsense as hypothesis likes; a filter turns
groups down; rollouts follow one another with and without partial rollout.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spmd_rl.rollout.service import Service
from tests.rollout import user_hooks
from tests.rollout.collecting import config
from tests.stub_engine import Addresses, Answer, stub_engine

ROLLOUTS, SAMPLES = 3, 2
ANSWERS = st.sampled_from(
    [
        Answer(),
        Answer(delay=0.002),
        Answer(delay=0.01),
        Answer(tokens=3, delay=0.03, until_abort=True),
        Answer(tokens=2, finish="abort"),
        Answer(status=500),
        Answer(raw="half a pa"),
    ]
)


class Events(NamedTuple):
    """What happens: the answers to the first requests, the verdicts on the first groups."""

    answers: list[Answer]
    bad: list[bool]
    target: int
    more: int
    partial: bool
    together: bool


EVENTS = st.builds(
    Events,
    st.lists(ANSWERS, max_size=30),
    st.lists(st.booleans(), max_size=8),
    st.integers(1, 4),
    st.integers(0, 4),
    st.booleans(),
    st.booleans(),
)


@pytest.fixture(scope="module")
def engines():
    with stub_engine() as one, stub_engine() as other:
        yield one, other


async def play(cfg, addresses) -> list:
    """Some rollouts. An engine found broken is mended a moment later."""
    loop = asyncio.get_running_loop()

    def mend(index: int, starts: int, _: str) -> None:
        loop.call_soon(service.broke, [index])
        loop.call_later(0.003, service.mended, index, starts + 1)

    service, found = Service(cfg, report=mend), []
    await service.connect(addresses)
    try:
        for rollout in range(ROLLOUTS):
            user_hooks.JUDGED.append([])
            found.append(await service.collect(rollout, rollout + 1))
    finally:
        await service.close()
    return found


def spent(verdicts: list[str | None], target: int, fetch: int) -> int:
    """Groups that slime starts for these verdicts, in the order they are given (semantics of
    `remaining`: accepted and running; a rejection lowers it; below the target it fetches)."""
    started = remaining = fetch
    accepted = 0
    for verdict in verdicts:
        if accepted == target:
            break
        accepted += verdict is None
        remaining -= verdict is not None
        while accepted < target and remaining < target:
            started, remaining = started + fetch, remaining + fetch
    return started


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(EVENTS)
def test_whatever_happens_every_group_is_accounted_for(engines, tmp_path, events):
    fetch = events.target + events.more
    cfg = config(
        tmp_path,
        rollout={
            "rollout_batch_size": events.target,
            "over_sampling_batch_size": fetch,
            "n_samples_per_prompt": SAMPLES,
            "partial_rollout": events.partial,
            "group_requests": events.together,
            "use_fault_tolerance": True,
            "dynamic_sampling_filter_path": "tests.rollout.user_hooks.as_told",
        },
        reward={"custom_rm_path": "tests.rollout.user_hooks.length_reward"},
    )
    coming = iter(events.answers)
    for engine in engines:
        engine.answer = lambda *_: next(coming, Answer())
    user_hooks.BAD[:], user_hooks.JUDGED[:] = events.bad, []
    urls = [engine.url for engine in engines]
    found = asyncio.run(play(cfg, Addresses(urls, urls[0], "")))

    accepted, kept_before = [], 0
    for batch, metrics, state in found:
        assert len(batch) == events.target * SAMPLES
        groups = [row // SAMPLES for row in batch.rollout_ids.tolist()]
        assert set(Counter(groups).values()) == {SAMPLES}
        assert batch.response_lengths.min() > 0
        accepted += dict.fromkeys(groups)
        buffer = [group[0]["group_index"] for group in state.get("buffer", ())]
        if events.partial:
            launched = metrics["rollout/partial/launched_groups"]
            dropped = sum(v for k, v in metrics.items() if k.startswith("rollout/dynamic_filter/"))
            kept = metrics["rollout/partial/kept_groups"]
            assert launched == events.target + dropped + kept
            assert len(buffer) == kept_before + kept - metrics["rollout/partial/resumed_groups"]
            kept_before = len(buffer)
    # Every prompt that was drawn is trained on, turned down or kept; once each.
    judged = [one for rollout in user_hooks.JUDGED for one in rollout]
    rejected = [index for index, verdict in judged if verdict is not None]
    drawn, last = found[-1][2]["sample_group_index"], found[-1][2].get("buffer", ())
    everywhere = [*accepted, *rejected, *(group[0]["group_index"] for group in last)]
    if events.partial:
        assert sorted(everywhere) == list(range(drawn))
    else:
        assert len(set(everywhere)) == len(everywhere) and max(everywhere) < drawn
        verdicts = [[verdict for _, verdict in rollout] for rollout in user_hooks.JUDGED]
        assert drawn <= sum(spent(mine, events.target, fetch) for mine in verdicts)
