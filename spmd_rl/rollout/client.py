"""HTTP to the engines: tokens in, tokens with log-probs and versions out.

Comes in: token ids and sampling parameters; goes out: `Generated`. Single samples go to the router
(or the only engine), several at once to one engine, aborts to every engine. A request is sent again
only when no answer was begun: generating has no effect on an engine, so that is safe. It must not
know prompts or rewards.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, NamedTuple, Protocol

import aiohttp
import orjson

CONNECT_TRIES = 5
FIRST_PAUSE = 0.1  # seconds before the second try; doubles
OVERLOADED = (502, 503, 504)  # the router has no engine for us yet


class Addresses(Protocol):
    """Where the engines are (rollout.fleet.EngineAddresses)."""

    @property
    def urls(self) -> list[str]: ...
    @property
    def router_url(self) -> str: ...
    @property
    def key(self) -> str: ...


class EngineError(RuntimeError):
    """An engine refused a request."""


class EngineUnreachable(EngineError):
    """No answer came, in time or at all: most likely the engine is dead."""


class Generated(NamedTuple):
    """What an engine made of one request; the lists have one entry per new token."""

    text: str
    tokens: list[int]
    log_probs: list[float]
    versions: list[int]
    finish: str  # stop, length or abort
    prompt_tokens: int
    cached_tokens: int


class EngineClient:
    """One connection pool for all engines of the job."""

    def __init__(self, addresses: Addresses, timeout: float):
        self.addresses, self.timeout = addresses, timeout
        self._in_flight = Counter({url: 0 for url in addresses.urls})
        self._names = {url: f"engine {i} ({url})" for i, url in enumerate(addresses.urls)}
        headers = {"Content-Type": "application/json"}
        if addresses.key:
            headers["Authorization"] = f"Bearer {addresses.key}"
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            timeout=aiohttp.ClientTimeout(total=timeout, connect=30),
            headers=headers,
        )

    async def generate(self, tokens: list[int], sampling: dict[str, Any]) -> Generated:
        """One sample, by whichever engine the router chooses."""
        body = {"input_ids": tokens, "sampling_params": sampling, "return_logprob": True}
        return read_answer(await self.post(self.addresses.router_url, "/generate", body))

    async def generate_together(
        self, tokens: list[list[int]], sampling: list[dict[str, Any]]
    ) -> list[Generated]:
        """Samples by one engine in one request, each with its own options; the router knows no
        such requests. The engine with the fewest samples in flight gets them."""
        body = {"input_ids": tokens, "sampling_params": sampling, "return_logprob": True}
        url = min(self.addresses.urls, key=self._in_flight.__getitem__)
        self._in_flight[url] += len(tokens)
        try:
            return [read_answer(answer) for answer in await self.post(url, "/generate", body)]
        finally:
            self._in_flight[url] -= len(tokens)

    async def abort_all(self) -> None:
        """Tell every engine to stop what it is generating."""
        body = {"abort_all": True}
        await asyncio.gather(
            *(self.post(url, "/abort_request", body) for url in self.addresses.urls)
        )

    async def post(self, url: str, path: str, body: dict[str, Any]) -> Any:
        """The JSON answer. Sent again while nothing answers, or the router knows no engine."""
        data = orjson.dumps(body)
        name = self._names.get(url, f"the router ({url})")
        for attempt in range(CONNECT_TRIES):
            last = attempt + 1 == CONNECT_TRIES
            try:
                async with self._http.post(url + path, data=data) as response:
                    content = await response.read()
                    if response.status == 200:
                        return orjson.loads(content) if content.strip() else None
                    if last or response.status not in OVERLOADED:
                        raise _refusal(name, response.status, content)
            except asyncio.TimeoutError as error:
                raise EngineUnreachable(
                    f"{name} gave no answer within {self.timeout:g} s "
                    "(rollout.rollout_request_timeout)"
                ) from error
            except aiohttp.ClientConnectionError as error:
                if last:
                    raise EngineUnreachable(f"{name} cannot be reached: {error!r}") from error
            await asyncio.sleep(FIRST_PAUSE * 2**attempt)
        raise AssertionError("unreachable")

    async def close(self) -> None:
        await self._http.close()


def read_answer(answer: dict[str, Any]) -> Generated:
    """One answer of /generate."""
    meta = answer["meta_info"]
    pairs = meta.get("output_token_logprobs") or []
    count = len(pairs)
    return Generated(
        text=answer.get("text", ""),
        tokens=[pair[1] for pair in pairs],
        log_probs=[pair[0] for pair in pairs],
        versions=_versions(meta, count),
        finish=(meta.get("finish_reason") or {}).get("type", "abort"),
        prompt_tokens=meta.get("prompt_tokens", 0),
        cached_tokens=meta.get("cached_tokens", 0),
    )


def _versions(meta: dict[str, Any], count: int) -> list[int]:
    """The version of each token: spans where the engine tells them, else one for all."""
    versions = [_number(meta.get("weight_version"))] * count
    for span in meta.get("weight_versions") or ():
        stop = min(span["end"], count)
        versions[span["start"] : stop] = [_number(span["version"])] * (stop - span["start"])
    return versions


def _number(version: Any) -> int:
    """Versions are counted; an engine nobody pushed to calls its own 'default'."""
    return int(version) if str(version).isdigit() else 0


def _refusal(who: str, status: int, content: bytes) -> EngineError:
    """With a 5xx the router answers for an engine that is dead, or one that is about to die."""
    kind = EngineUnreachable if status >= 500 else EngineError
    return kind(f"{who} answered {status}: {content[:2000].decode(errors='replace')}")
