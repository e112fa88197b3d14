"""One engine's administration over HTTP: health, pause, sleep, weight updates, checksums.

Comes in: the engine's URL and the job's key. Every failure becomes an EngineError whose text
holds the engine's own reply. It must not know how the engine was started, nor what the weights
are. One connection a call: calls are rare, and an engine may have been replaced in between.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlsplit

FLUSH_SECONDS = 60.0  # requests that were aborted take a moment to leave the batch


class EngineError(RuntimeError):
    """An engine refused a request; the text says which and why."""


class EngineUnreachable(EngineError):
    """No answer came: most likely the engine is dead, and who started it will say how it ended."""

    is_symptom = True


class EngineAdmin:
    """`index`: the engine's number, for errors; None: they name the URL alone."""

    def __init__(self, url: str, key: str, index: int | None = None, timeout: float = 600.0):
        self.url, self.timeout = url, timeout
        self.name = f"engine {url}" if index is None else f"engine {index} ({url})"
        self._address = urlsplit(url)
        self._headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        self.renew()

    def renew(self) -> None:
        """Another process answers at the URL from now on."""
        self._asleep: set[str] = set()
        self._has_sessions: bool | None = None

    # -- state --------------------------------------------------------------------------------

    def health(self, timeout: float = 5.0) -> bool:
        """Whether the server answers and counts itself healthy."""
        try:
            return self._send("GET", "/health", None, timeout)[0] == 200
        except EngineError:
            return False

    def generates(self, timeout: float) -> bool:
        """Whether the engine still computes: a server whose scheduler hangs has good health. Takes
        a second."""
        try:
            return self._send("GET", "/health_generate", None, timeout)[0] == 200
        except EngineError:
            return False

    def server_info(self) -> dict[str, Any]:
        return self._json("GET", "/server_info")

    def version(self) -> str:
        """The weight version the engine says it has."""
        return str(self._json("GET", "/model_info")["weight_version"])

    def workers(self) -> int:
        """How many engines are registered, when this is the router."""
        return len(self._json("GET", "/workers")["workers"])

    def set_version(self, version: int | str) -> None:
        self._post("/update_weight_version", new_version=str(version), abort_all_requests=False)

    # -- generation ---------------------------------------------------------------------------

    def pause(self, mode: str = "retract") -> None:
        """Stop generating. `abort` ends requests, `retract` recomputes them later, `in_place`
        keeps their cache.
        """
        self._call("POST", "/pause_generation", {"mode": mode})

    def resume(self) -> None:
        self._call("POST", "/continue_generation", {})

    def abort_all(self) -> None:
        self._call("POST", "/abort_request", {"abort_all": True})

    def flush(self, seconds: float = FLUSH_SECONDS) -> None:
        """Empty the prefix cache: keys and values of old weights must not be reused."""
        deadline = time.monotonic() + seconds
        while True:
            status, body = self._send("POST", "/flush_cache", b"{}", self.timeout)
            if status == 200:
                return
            if time.monotonic() > deadline:
                raise self._refused("/flush_cache", status, body, f" for {seconds:.0f} s")
            time.sleep(0.05)

    # -- memory -------------------------------------------------------------------------------

    def sleep(self, tags: Sequence[str]) -> None:
        """Give memory back; `weights` are lost and must be pushed again. Tags already asleep
        are left.
        """
        due = [tag for tag in tags if tag not in self._asleep]
        if due:
            self._call("POST", "/release_memory_occupation", {"tags": due})
            self._asleep.update(due)

    def wake(self, tags: Sequence[str]) -> None:
        """Take memory again; a tag that does not sleep is left, since SGLang fails on it."""
        due = [tag for tag in tags if tag in self._asleep]
        if due:
            self._call("POST", "/resume_memory_occupation", {"tags": due})
            self._asleep.difference_update(due)

    # -- weights ------------------------------------------------------------------------------

    def begin_update(self) -> None:
        """Open a weight update; a no-op for SGLang before 0.5.18, which has no sessions."""
        if self._has_sessions is not False:
            status, body = self._send("POST", "/begin_weight_update", b"{}", self.timeout)
            self._has_sessions = status not in (404, 405)
            if self._has_sessions:
                self._check("/begin_weight_update", status, body)

    def end_update(self, version: int | str) -> None:
        """Close the update; tokens sampled from now on carry `version`."""
        if self._has_sessions:
            self._post("/end_weight_update")
        self.set_version(version)

    def update_from_tensor(
        self, serialized: Sequence[str], load_format: str | None = "flattened_bucket"
    ) -> None:
        """One bucket; `serialized` has one base64 entry per tensor-parallel rank of the engine."""
        self._post(
            "/update_weights_from_tensor",
            serialized_named_tensors=list(serialized),
            load_format=load_format,
            flush_cache=False,
        )

    def init_group(
        self, address: str, port: int, rank_offset: int, world: int, name: str, backend: str
    ) -> None:
        """Join a process group; blocks until all its members have come."""
        self._post(
            "/init_weights_update_group",
            master_address=address,
            master_port=port,
            rank_offset=rank_offset,
            world_size=world,
            group_name=name,
            backend=backend,
        )

    def destroy_group(self, name: str) -> None:
        self._post("/destroy_weights_update_group", group_name=name)

    def update_from_distributed(
        self,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group: str,
        load_format: str | None = "flattened_bucket",
    ) -> None:
        """Receive one bucket that rank 0 of `group` broadcasts meanwhile."""
        self._post(
            "/update_weights_from_distributed",
            names=list(names),
            dtypes=list(dtypes),
            shapes=[list(shape) for shape in shapes],
            group_name=group,
            load_format=load_format,
            flush_cache=False,
        )

    def update_from_disk(self, path: str, version: int | str) -> None:
        self._post("/update_weights_from_disk", model_path=path, weight_version=str(version))

    def checksums(self) -> list[dict[str, str]]:
        """Per tensor-parallel rank: engine tensor name -> checksum of its bytes."""
        ranks = self._post("/weights_checker", action="checksum")["ranks"]
        return [rank["checksums"] for rank in sorted(ranks, key=_tp_rank)]

    # -- transport ----------------------------------------------------------------------------

    def _post(self, path: str, **body: Any) -> dict[str, Any]:
        """A call whose reply has a `success` field."""
        reply = self._json("POST", path, body)
        if not reply.get("success", True):
            raise EngineError(f"{self.name} refused {path}: {reply.get('message')}")
        return reply

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        text = self._call(method, path, body)
        try:
            return json.loads(text)
        except ValueError:
            raise EngineError(f"{self.name} answered {path} without JSON: {_short(text)}") from None

    def _call(self, method: str, path: str, body: dict[str, Any] | None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        status, reply = self._send(method, path, data, self.timeout)
        self._check(path, status, reply)
        return reply

    def _check(self, path: str, status: int, reply: bytes) -> None:
        if status != 200:
            raise self._refused(path, status, reply)

    def _refused(self, path: str, status: int, reply: bytes, more: str = "") -> EngineError:
        return EngineError(f"{self.name} refused {path}{more} (HTTP {status}): {_short(reply)}")

    def _send(
        self, method: str, path: str, data: bytes | None, timeout: float
    ) -> tuple[int, bytes]:
        host, port = str(self._address.hostname), self._address.port
        connection = HTTPConnection(host, port, timeout=timeout)
        try:
            connection.request(method, path, body=data, headers=self._headers)
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, HTTPException) as error:
            raise EngineUnreachable(
                f"{self.name} did not answer {path}: {error or type(error).__name__}"
            ) from error
        finally:
            connection.close()


def _tp_rank(rank: dict[str, Any]) -> int:
    place = rank[
        "parallelism_info"
    ]  # a list since SGLang 0.5.2x: one for each model the engine runs
    return (place[0] if isinstance(place, list) else place)["tp_rank"]


def _short(reply: bytes) -> str:
    text = reply.decode(errors="replace").strip()
    return text if len(text) <= 500 else text[:500] + "..."
