"""The state machine of over-sampling, with events in any order."""

import asyncio
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spmd_rl.rollout.collect import collect_round
from spmd_rl.types import Sample


class World:
    """Groups end in the order of `delays`; `bad` ones are turned down."""

    def __init__(self, delays, bad):
        self.delays, self.bad = delays, bad
        self.drawn, self.launched_at, self.running, self.aborts = 0, [], set(), 0
        self.judged, self.accepted = 0, 0
        self.trace = []  # (accepted, in flight) at each draw

    def draw(self, count):
        self.trace.append((self.accepted, len(self.running)))
        groups = [[Sample(index=self.drawn + i, group_index=self.drawn + i)] for i in range(count)]
        self.drawn += count
        self.running |= {group[0].index for group in groups}
        return groups

    async def run(self, group):
        index = group[0].index
        try:
            for _ in range(self.delays[index % len(self.delays)]):
                await asyncio.sleep(0)
            return group
        finally:
            self.running.discard(index)

    async def judge(self, group):
        self.judged += 1
        if self.bad[group[0].index % len(self.bad)]:
            return "bad"
        self.accepted += 1
        return None

    async def abort(self):
        assert not self.running, "tasks end before engines are told to stop"
        self.aborts += 1

    async def rest(self, running):
        self.aborts += 1

    def collect(self, target, fetch=None, in_order=False, keep=False):
        rest = self.rest if keep else None
        return asyncio.run(
            collect_round(
                target, self.draw, self.run, self.judge, self.abort, fetch, in_order, rest
            )
        )


worlds = st.builds(
    World,
    st.lists(st.integers(0, 12), min_size=1, max_size=20),
    st.lists(st.booleans(), min_size=1, max_size=9).map(lambda bad: [*bad, False]),
)


@settings(max_examples=80, deadline=None)
@given(worlds, st.integers(1, 8), st.integers(0, 8))
def test_exactly_the_target_is_accepted_and_nothing_is_left(world, target, more):
    fetch = target + more
    result = world.collect(target, fetch)
    assert len(result.groups) == target
    indices = [group[0].index for group in result.groups]
    assert indices == sorted(indices) and len(set(indices)) == target
    assert not any(world.bad[index % len(world.bad)] for index in indices)
    assert not world.running
    assert result.launched == world.drawn and world.drawn % fetch == 0
    assert result.launched == target + result.surplus + sum(result.dropped.values())
    assert world.aborts <= 1
    # New groups are drawn exactly when those accepted and running cannot make up the target.
    assert all(accepted + running < target for accepted, running in world.trace)


@settings(max_examples=80, deadline=None)
@given(worlds, st.integers(1, 8), st.integers(0, 8))
def test_with_partial_rollout_every_group_is_accepted_dropped_or_kept(world, target, more):
    result = world.collect(target, target + more, keep=True)
    kept = [group[0].index for group in result.kept]
    accepted = [group[0].index for group in result.groups]
    assert len(accepted) == target and result.surplus == 0
    assert len(set(kept + accepted)) == len(kept) + target
    assert result.launched == world.drawn == target + len(kept) + sum(result.dropped.values())
    assert not world.running and world.aborts <= 1


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=20),
    st.lists(st.integers(0, 12), min_size=1, max_size=20),
    st.lists(st.booleans(), min_size=1, max_size=9).map(lambda bad: [*bad, False]),
    st.integers(1, 8),
    st.integers(0, 8),
)
def test_in_order_the_result_depends_on_no_timing(delays, others, bad, target, more):
    one = World(delays, bad).collect(target, target + more, in_order=True)
    other = World(others, bad).collect(target, target + more, in_order=True)
    assert [g[0].index for g in one.groups] == [g[0].index for g in other.groups]
    assert one.launched == other.launched and one.dropped == other.dropped


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=20), st.integers(1, 8))
def test_without_filter_the_result_depends_on_no_timing(delays, target):
    result = World(delays, [False]).collect(target)
    assert [group[0].index for group in result.groups] == list(range(target))
    assert result.surplus == 0


def test_reasons_are_counted():
    result = World([0], [True, True, False]).collect(2)
    assert result.dropped == Counter(bad=result.launched - 2 - result.surplus)


def test_a_failure_ends_every_task_and_is_raised():
    world = World([3], [False])
    ended = []

    async def run(group):
        if group[0].index == 2:
            raise ValueError("user code")
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(group[0].index)

    world.run = run
    with pytest.raises(ValueError, match="user code"):
        world.collect(4)
    assert sorted(ended) == [0, 1, 3]
