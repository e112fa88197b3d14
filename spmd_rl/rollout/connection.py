"""HTTP to the job's servers and to those of the user: JSON in, JSON out, or a sentence on why not.

A request is sent again while nothing answers. It must not know what is asked.
"""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import orjson

from spmd_rl.rollout.answers import BadAnswer, EngineError, EngineUnreachable

CONNECT_TRIES = 5
FIRST_PAUSE = 0.1  # seconds before the second try; doubles
OVERLOADED = (502, 503, 504)  # the router has no engine for us yet


class Connection:
    """One connection pool. `key`: what the job's servers ask for; "": none. `timeout`: seconds for
    one request."""

    def __init__(self, key: str, timeout: float):
        self.timeout = timeout
        headers = {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            timeout=aiohttp.ClientTimeout(total=timeout, connect=30),
            headers=headers,
        )

    async def post(
        self, who: str, url: str, body: dict[str, Any], headers: dict[str, str] | None = None
    ) -> Any:
        """The JSON answer of `who`. Sent again while nothing answers, or the router knows no
        engine."""
        data = orjson.dumps(body)
        for attempt in range(CONNECT_TRIES):
            last = attempt + 1 == CONNECT_TRIES
            try:
                async with self._session.post(url, data=data, headers=headers) as response:
                    content = await response.read()
                    if response.status == 200:
                        return orjson.loads(content) if content.strip() else None
                    if last or response.status not in OVERLOADED:
                        raise _refusal(who, response.status, content)
            except orjson.JSONDecodeError as error:
                raise BadAnswer(f"{who} answered without JSON: {error}") from error
            except aiohttp.ClientConnectionError as error:  # a connection that takes too long too
                if last:
                    raise EngineUnreachable(f"{who} cannot be reached: {error!r}") from error
            except asyncio.TimeoutError as error:
                raise EngineUnreachable(
                    f"{who} gave no answer within {self.timeout:g} s "
                    "(rollout.rollout_request_timeout)"
                ) from error
            except aiohttp.ClientError as error:
                raise EngineUnreachable(f"{who} broke off: {error!r}") from error
            await asyncio.sleep(FIRST_PAUSE * 2**attempt)
        raise AssertionError("unreachable")

    async def close(self) -> None:
        await self._session.close()


def _refusal(who: str, status: int, content: bytes) -> EngineError:
    """With a 5xx the router answers for an engine that is dead, or one that is about to die."""
    kind = EngineUnreachable if status >= 500 else EngineError
    return kind(f"{who} answered {status}: {content[:2000].decode(errors='replace')}")
