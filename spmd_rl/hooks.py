"""User functions: found by name, called whether they are `async def` or plain.

Comes in: `package.module:function` or `package.module.function`. A plain function runs in a thread,
so that one that blocks (a web request, a compiler) holds up no other sample.
"""

from __future__ import annotations

import asyncio
import contextvars
import importlib
import inspect
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

MOST_THREADS = 64

_loop: asyncio.AbstractEventLoop | None = None  # that calls them
_threads = ThreadPoolExecutor(MOST_THREADS, thread_name_prefix="hook")


def load(path: str) -> Callable[..., Any]:
    """The function a `*_path` key names."""
    module_name, _, name = path.rpartition(":" if ":" in path else ".")
    if not module_name or not name:
        raise ValueError(f"'{path}' is no function: write package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not f"{module_name}.".startswith(f"{error.name}."):
            raise  # something the module itself imports
        raise ValueError(
            f"'{path}': there is no module {module_name}: add its folder to PYTHONPATH"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"'{path}': {module_name} has no function {name}: correct the name")
    return function


def optional(path: str | None) -> Callable[..., Any] | None:
    return load(path) if path else None


async def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The function's result, awaited or computed in a thread."""
    if is_async(function):
        return await function(*args, **kwargs)
    global _loop
    _loop = loop = asyncio.get_running_loop()
    context = contextvars.copy_context()  # what the function finds around it, as in a task
    result = await loop.run_in_executor(_threads, lambda: context.run(function, *args, **kwargs))
    return await result if inspect.isawaitable(result) else result


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """For a plain user function: the result of asynchronous work, such as `generate`."""
    if _loop is None or asyncio._get_running_loop() is not None:
        work.close()
        raise RuntimeError("hooks.run is for plain functions; an async one awaits the work itself")
    return asyncio.run_coroutine_threadsafe(work, _loop).result()


def is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - an object with an async __call__
    )


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether a keyword may be passed to the function."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.name == name or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
