"""Slots of which several are held at once; tasks that end together."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spmd_rl.tasks import Slots, together


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4), st.booleans()), max_size=20),
)
def test_slots_are_never_overdrawn_and_never_lost(total, jobs):
    async def run():
        slots, held, most, done = Slots(total), 0, 0, 0

        async def job(count, turns):
            nonlocal held, most, done
            async with slots.hold(count):
                held += min(count, total)
                most = max(most, held)
                try:
                    for _ in range(turns):
                        await asyncio.sleep(0)
                finally:
                    held -= min(count, total)
            done += 1

        tasks = [asyncio.create_task(job(count, turns)) for count, turns, _ in jobs]
        for task, (_, turns, cancelled) in zip(tasks, jobs, strict=True):
            if cancelled:
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        assert most <= total and slots.free == total and held == 0
        assert done >= sum(not cancelled for _, _, cancelled in jobs)

    asyncio.run(run())


def test_together_leaves_nothing_running():
    async def run():
        ended = []

        async def wait(name):
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(name)

        async def fail():
            await asyncio.sleep(0)
            raise KeyError("x")

        with pytest.raises(KeyError):
            await together([wait("a"), fail(), wait("b")])
        assert ended == ["a", "b"]

    asyncio.run(run())
