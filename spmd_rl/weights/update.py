"""One engine's weight update, opened before the first bucket and closed after the last.

Comes in: admins of the engines that one train rank speaks to; goes out: what went wrong with which.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from spmd_rl.rollout.admin import EngineAdmin, EngineError


def begin(admin: EngineAdmin) -> None:
    """The engine stops, forgets what it computed with the old weights, and opens itself."""
    admin.pause()
    admin.flush()
    admin.begin_update()


def end(admin: EngineAdmin, version: int) -> None:
    admin.end_update(version)
    reported = admin.version()
    if reported != str(version):
        raise EngineError(
            f"{admin.name} reports weights of version {reported} after version {version} was pushed"
        )


def each(
    admins: dict[int, EngineAdmin], action: Callable[[EngineAdmin], None]
) -> dict[int, EngineError]:
    """At once on all these engines; what went wrong, by engine."""
    failed: dict[int, EngineError] = {}
    if admins:
        with ThreadPoolExecutor(len(admins)) as pool:
            tasks = {index: pool.submit(action, admin) for index, admin in admins.items()}
        for index, task in tasks.items():
            try:
                task.result()
            except EngineError as error:
                failed[index] = error
    return failed
