"""When a rollout is complete: more groups are started than needed, some are turned down.

Comes in: functions that draw, run and judge groups; goes out: exactly `target` accepted ones, in
the order of their samples. It must not know HTTP, rewards or configuration.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from spmd_rl.tasks import cancel
from spmd_rl.types import Group

Draw = Callable[[int], list[Group]]  # the next prompts
Run = Callable[[Group], Coroutine[Any, Any, Group]]  # generate and reward one group
Judge = Callable[[Group], Awaitable[str | None]]  # why a group is turned down; None: it is kept
Abort = Callable[[], Awaitable[None]]  # stop what the engines still generate
Tasks = dict[asyncio.Task[Group], Group]  # in the order of their start; what each began with
Rest = Callable[[Tasks], Awaitable[None]]  # bring running groups to where they can be kept


@dataclass(slots=True)
class Round:
    """One rollout's groups and what became of the others."""

    groups: list[Group] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> groups
    launched: int = 0
    surplus: int = 0  # started, but not needed in the end
    kept: list[Group] = field(default_factory=list)  # not needed either: for the next rollout


async def collect_round(
    target: int,
    draw: Draw,
    run: Run,
    judge: Judge,
    abort: Abort,
    fetch: int | None = None,
    in_order: bool = False,
    rest: Rest | None = None,
) -> Round:
    """Run groups, `fetch` at a time, until `target` are accepted; then stop the others. With `rest`
    they are kept (partial rollout): each group as its task left it, finished or not.

    A group counts as `remaining` from its start until it is turned down, so new ones are started
    exactly when those accepted and those running cannot make up the target any more. `in_order`
    judges groups in the order they were drawn: slower, but which are taken then depends on no
    timing.
    """
    result, remaining = Round(), 0
    running: Tasks = {}
    try:
        while len(result.groups) < target:
            while remaining < target:
                groups = draw(fetch or target)
                running.update((asyncio.create_task(run(group)), group) for group in groups)
                remaining += len(groups)
                result.launched += len(groups)
            for task in await _finished(running, in_order):
                began = running.pop(task)
                group = task.result()
                reason = await judge(group)
                if reason is not None:
                    remaining -= 1
                    result.dropped[reason] += 1
                elif len(result.groups) < target:
                    result.groups.append(group)
                elif rest is not None:
                    result.kept.append(began)
                else:
                    result.surplus += 1
        if running and rest is not None:
            await rest(running)
            result.kept += running.values()
    except BaseException:
        await cancel(running)
        raise
    if running:
        await cancel(running)
        if rest is None:
            result.surplus += len(running)
            await abort()
    result.groups.sort(key=lambda group: group[0].index)
    return result


async def _finished(running: Tasks, in_order: bool):
    """Tasks that ended, oldest first: any of them, or in order the oldest alone."""
    oldest = next(iter(running))
    if in_order:
        await asyncio.wait([oldest])
        return [oldest]
    done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    return [task for task in running if task in done]
