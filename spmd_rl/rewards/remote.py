"""rm_type `remote_rm`: a web service judges; asked again, with growing pauses, while it fails."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import aiohttp

TRIES = 10
LONGEST_PAUSE = 30.0
TIMEOUT = 120.0
CONNECTIONS = 64


class RemoteReward:
    """POSTs {prompt, response, label} and takes whatever JSON comes back."""

    def __init__(self, url: str, first_pause: float = 1.0):
        self.url, self.first_pause = url, first_pause
        self._http: aiohttp.ClientSession | None = None

    async def __call__(self, prompt: Any, response: str, label: Any) -> Any:
        body = {"prompt": prompt, "response": response, "label": label}
        for attempt in range(TRIES):
            try:
                async with self._session().post(self.url, json=body) as answer:
                    answer.raise_for_status()
                    return await answer.json(content_type=None)
            except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
                if attempt + 1 == TRIES:
                    raise RuntimeError(
                        f"reward.rm_url {self.url} failed {TRIES} times: {error!r}"
                    ) from error
            pause = min(self.first_pause * 2**attempt, LONGEST_PAUSE)
            await asyncio.sleep(pause + random.random() * self.first_pause)
        raise AssertionError("unreachable")

    async def close(self) -> None:
        if self._http:
            await self._http.close()

    def _session(self) -> aiohttp.ClientSession:
        if self._http is None:
            self._http = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=CONNECTIONS),
                timeout=aiohttp.ClientTimeout(total=TIMEOUT),
            )
        return self._http
