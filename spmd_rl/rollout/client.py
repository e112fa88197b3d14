"""HTTP to the engines: tokens in, tokens with log-probs and versions out.

Comes in: token ids and sampling parameters; goes out: `Generated`. Single samples go to the router
(or the only engine), several at once to one engine, aborts to every engine. A request is sent again
when its engine breaks: generating has no effect on an engine, one answer is taken, and the seed
makes it the answer there would have been. It must not know prompts or rewards.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol
from zlib import crc32

from spmd_rl.rollout.answers import (
    BadAnswer,
    EngineFault,
    EngineUnreachable,
    Generated,
    Unpushed,
    read_answer,
)
from spmd_rl.rollout.connection import FIRST_PAUSE, Connection
from spmd_rl.rollout.routes import ROUTED, Routes
from spmd_rl.tasks import cancel

SESSION_HEADER = "X-SMG-Routing-Key"  # what sglang-router's consistent_hashing goes by

Tell = Callable[[int, int, str], None]  # engine, its starts, what is wrong with it


class Addresses(Protocol):
    """Where the engines are (rollout.fleet.EngineAddresses)."""

    @property
    def urls(self) -> list[str]: ...
    @property
    def router_url(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def teacher_url(self) -> str: ...


@dataclass(eq=False)
class _Server:
    """An engine or the router, as requests see it."""

    name: str
    url: str
    index: int = -1  # of the engine; -1: the router
    starts: int = 0  # how often it was started again
    in_flight: int = 0  # samples
    broken: asyncio.Event = field(default_factory=asyncio.Event)


class EngineClient:
    """One connection pool for all engines of the job.

    `tell`: engines are mended while we generate. It hears of one that is broken; until `mended`,
    others get its requests. None: whatever breaks is raised.
    """

    def __init__(
        self,
        addresses: Addresses,
        timeout: float,
        tell: Tell | None = None,
        vocab_size: int | None = None,
        routes: Routes | None = None,
    ):
        self.addresses, self.routes = addresses, routes
        self._tell, self._vocab_size = tell, vocab_size
        self.in_flight = 0  # samples that were asked for and not answered yet
        self.engines = [
            _Server(f"engine {i} ({url})", url, i) for i, url in enumerate(addresses.urls)
        ]
        router = addresses.router_url
        self._router = None if router in addresses.urls else _Server(f"router ({router})", router)
        self._mended, self._idle = asyncio.Event(), asyncio.Event()
        self._http = Connection(addresses.key, timeout)

    async def generate(
        self,
        tokens: list[int],
        sampling: dict[str, Any],
        known: int | None = None,
        session: str | None = None,
    ) -> Generated:
        """One sample, by whichever engine the router chooses. `known`: tell the experts of the
        tokens after so many (None: tell none), which goes past the router: it drops that wish.
        `session`: requests of one conversation should meet the same engine, which has its beginning
        in its cache."""
        body = self._body(tokens, sampling, known)
        server = None if ROUTED in body else self._router
        return (await self._deliver(body, 1, server, session))[0]

    async def ask_any(self, path: str, body: dict[str, Any]) -> Any:
        """What one of the sound engines answers to a request that generates nothing."""
        while True:
            server = await self._choose()
            try:
                return await self._http.post(server.name, server.url + path, body)
            except EngineFault as error:
                if self._tell is None:
                    raise
                self._found_broken(server, error)

    async def generate_together(
        self, tokens: list[list[int]], sampling: list[dict[str, Any]], known: int | None = None
    ) -> list[Generated]:
        """Samples by one engine in one request, each with its own options; the router knows no
        such requests. The engine with the fewest samples in flight gets them."""
        return await self._deliver(self._body(tokens, sampling, known), len(tokens))

    async def wait_idle(self, seconds: float) -> None:
        """Until every answer is here, or so long."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)

    async def abort_all(self) -> None:
        """Tell every engine to stop what it is generating."""
        await asyncio.gather(*map(self._abort, self.engines))

    def broke(self, indices: list[int]) -> None:
        """These engines are gone: their requests go elsewhere at once."""
        for index in indices:
            self.engines[index].broken.set()

    def mended(self, index: int, starts: int) -> None:
        """The engine was started again, `starts` times by now, and has the trainer's weights."""
        engine = self.engines[index]
        engine.starts = starts
        engine.broken = asyncio.Event()
        self._mended.set()

    async def close(self) -> None:
        await self._http.close()

    def _body(self, tokens: list, sampling: Any, known: int | None) -> dict[str, Any]:
        body = {"input_ids": tokens, "sampling_params": sampling, "return_logprob": True}
        if self.routes is None or known is None:
            return body
        return body | self.routes.request(known)

    async def _deliver(
        self,
        body: dict[str, Any],
        size: int,
        server: _Server | None = None,
        session: str | None = None,
    ) -> list[Generated]:
        """The answers to a request of `size` samples; the first server may be given."""
        while True:
            server = server or await self._choose(session)
            server.in_flight += size
            self.in_flight += size
            self._idle.clear()
            try:
                answer = await self._ask(server, body, session)
                routes = self.routes if ROUTED in body else None
                return self._read(server, answer, size, routes)
            except EngineFault as error:
                if self._tell is None:
                    raise
                self._found_broken(server, error)
                if isinstance(error, Unpushed):
                    await asyncio.sleep(FIRST_PAUSE)
            finally:
                server.in_flight -= size
                self.in_flight -= size
                if not self.in_flight:
                    self._idle.set()
            server = None  # past the router: it may go on choosing the engine that is broken

    async def _choose(self, session: str | None = None) -> _Server:
        """The sound engine with the fewest samples in flight, or always the same for a session;
        waits while there is none."""
        while not (sound := [one for one in self.engines if not one.broken.is_set()]):
            self._mended.clear()
            await self._mended.wait()
        if session is not None:
            return sound[crc32(session.encode()) % len(sound)]
        return min(sound, key=lambda engine: engine.in_flight)

    async def _ask(self, server: _Server, body: dict[str, Any], session: str | None) -> Any:
        """The answer, unless the engine is known to be broken before."""
        headers = {SESSION_HEADER: session} if session is not None else None
        asked = self._http.post(server.name, f"{server.url}/generate", body, headers)
        if self._tell is None:
            return await asked
        asking, broken = asyncio.create_task(asked), asyncio.create_task(server.broken.wait())
        try:
            await asyncio.wait((asking, broken), return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                return asking.result()
            raise EngineUnreachable(f"{server.name} broke")
        finally:
            await cancel((asking, broken))

    def _read(
        self, server: _Server, answer: Any, size: int, routes: Routes | None
    ) -> list[Generated]:
        parts = answer if isinstance(answer, list) else [answer]
        try:
            if len(parts) != size:
                raise BadAnswer(f"gave {len(parts)} answers to {size} samples")
            pushed = self._tell is not None
            return [read_answer(part, self._vocab_size, pushed, routes) for part in parts]
        except EngineFault as error:
            raise type(error)(f"{server.name} {error}") from error

    def _found_broken(self, server: _Server, error: EngineFault) -> None:
        if server.index < 0 or server.broken.is_set() or isinstance(error, Unpushed):
            return
        server.broken.set()
        assert self._tell is not None
        self._tell(server.index, server.starts, str(error))

    async def _abort(self, engine: _Server) -> None:
        if engine.broken.is_set():
            return
        try:
            await self._http.post(engine.name, f"{engine.url}/abort_request", {"abort_all": True})
        except EngineFault as error:
            if self._tell is None:
                raise
            self._found_broken(engine, error)
