"""The engines of one node: SGLang servers, children of the node's first rank.

Comes in: the configuration and the places of this node's engines; goes out: their URLs. It must
not know what is generated or how weights reach them (admin.py, weights/).

What a client of an engine (or of the router in front) needs to know:
- every request carries the header `Authorization: Bearer <key>`; only /health answers without it;
- `POST /generate` with {"rid": str, "input_ids": [int], "return_logprob": true,
  "sampling_params": {"temperature", "top_p", "top_k", "max_new_tokens", "stop", "stop_token_ids",
  "skip_special_tokens", "no_stop_trim": true, "spaces_between_special_tokens": false,
  "sampling_seed": int}};
- the reply has `output_ids` and `text`, and in `meta_info`: `output_token_logprobs` [[logprob,
  token, null]], `finish_reason` {"type": "stop" | "length" | "abort"}, `weight_versions`,
  `cached_tokens`, `prompt_tokens`;
- `weight_versions` is [{"version": str, "start": int, "end": int}] over the output tokens; SGLang
  before 0.5.18 has only `weight_version`, the version at the request's end;
- `sampling_seed` has an effect in deterministic mode only, which is on for CPU engines;
- the router forwards /generate but not /abort_request, /pause_generation and the like: those go
  to each engine.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from spmd_rl.config import Config
from spmd_rl.rollout import engine_args
from spmd_rl.rollout.admin import EngineAdmin, EngineError
from spmd_rl.rollout.launchers import CpuLauncher, CudaLauncher
from spmd_rl.rollout.monitor import Ended, Monitor
from spmd_rl.rollout.ports import Ports
from spmd_rl.types import EngineSpec

START_SECONDS = 900.0  # most a start may take: large models load for minutes
POLL_SECONDS = 0.1
STATUS_SECONDS = 1.0  # until the launcher knows how an engine ended


class EngineDied(RuntimeError):
    """An engine ended by itself; the text says which, how, and the end of its log."""


class Launcher(Protocol):
    """Starts and ends server processes; engines are named by index."""

    def prepare(self) -> None: ...

    def start(self, index: int, args: dict, env: dict[str, str], log: Path) -> None: ...

    def ready(self, index: int) -> int:
        """The engine answers for the first time. The number of its process."""
        ...

    def status(self, index: int) -> int | None:
        """Exit status (negative: killed by that signal), None while it runs."""
        ...

    def stop(self, index: int) -> None: ...

    def close(self) -> None: ...


@dataclass
class _Engine:
    spec: EngineSpec
    order: int  # among this node's engines
    log: Path
    url: str = ""
    ports: tuple[int, int] | None = None  # the server's and NCCL's
    ready: bool = False
    starts: int = 0  # after the first


class EngineHost:
    """Parent of this node's engines. `tell` hears at once of one that ends after it was ready: its
    index and what describe_death says; it is called from another thread.
    """

    def __init__(
        self,
        cfg: Config,
        specs: list[EngineSpec],
        run_dir: Path,
        job,
        key: str,
        tell: Callable[[int, str], None] = lambda index, text: None,
    ):
        self.cfg, self.host, self.key = cfg, job.host, key
        logs = Path(run_dir) / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self.engines = {
            spec.index: _Engine(spec, order, logs / f"{spec.name.replace(' ', '')}.log")
            for order, spec in enumerate(specs)
        }
        self.ports = Ports(self.host)
        device = engine_args.device_of(cfg)
        self.launcher: Launcher = (CpuLauncher if device == "cpu" else CudaLauncher)(cfg, logs)
        self.monitor = Monitor(lambda ended: tell(ended.server, self._death(ended)))

    def launch(self) -> None:
        """Start every engine and return at once; their imports run meanwhile."""
        self.launcher.prepare()
        for index in self.engines:
            self._start(index)

    def wait_ready(self, timeout: float = START_SECONDS) -> list[tuple[int, str]]:
        """(index, URL) of every engine, once all answer."""
        deadline = time.monotonic() + timeout
        for index in self.engines:
            self._wait(index, deadline)
        return [(index, engine.url) for index, engine in self.engines.items()]

    def restart(self, starts: Mapping[int, int], timeout: float = START_SECONDS) -> dict[int, str]:
        """Replace engines, dead or not, under their URLs; `starts` has how often each was. They
        have the checkpoint's weights and are paused. Returns why some did not come up.
        """
        mine = [index for index in self.engines if index in starts]
        self.launcher.prepare()  # it may have ended with the engines
        for index in mine:
            self.monitor.forget(index)
            self.launcher.stop(index)
        for index in mine:
            self.engines[index].starts = starts[index]
            self._start(index)
        failed = {}
        for index in mine:
            try:
                self._wait(index, time.monotonic() + timeout, [index])
                EngineAdmin(self.engines[index].url, self.key, index).pause()
            except (EngineDied, EngineError) as error:
                failed[index] = str(error)
        return failed

    def check(self, indices: Iterable[int] | None = None) -> None:
        """Raise EngineDied when one of these engines, or of all, has ended."""
        for index in self.engines if indices is None else indices:
            engine, status = self.engines[index], self.launcher.status(index)
            if status is not None:
                raise EngineDied(describe_death(engine.spec.name, status, engine.log))

    def stop(self) -> None:
        self.monitor.close()
        self.launcher.close()
        self.ports.close()

    def _start(self, index: int) -> None:
        engine = self.engines[index]
        engine.ports = engine.ports or (self.ports.reserve(), self.ports.reserve())
        engine.url, engine.ready = f"http://{_bracketed(self.host)}:{engine.ports[0]}", False
        args = engine_args.server_args(self.cfg, engine.spec, self.host, *engine.ports, self.key)
        env = engine_args.environment(self.cfg) | engine_args.own_environment(
            engine.spec, engine.order
        )
        self.launcher.start(index, args, env, engine.log)

    def _wait(self, index: int, deadline: float, watched: Iterable[int] | None = None) -> None:
        engine = self.engines[index]
        if engine.ready:
            return
        admin = EngineAdmin(engine.url, self.key, index)
        while not engine.ready:
            self.check(watched)
            engine.ready = admin.health(timeout=2.0)
            if not engine.ready and time.monotonic() > deadline:
                raise EngineDied(
                    f"{engine.spec.name} did not become ready in time; the end of {engine.log}:\n"
                    + tail(engine.log)
                )
            time.sleep(0 if engine.ready else POLL_SECONDS)
        self.monitor.watch(index, self.launcher.ready(index))

    def _death(self, ended: Ended) -> str:
        status, until = ended.status, time.monotonic() + STATUS_SECONDS
        try:
            while status is None and not ended.part and time.monotonic() < until:
                status = self.launcher.status(ended.server)
                time.sleep(0.02)
        except EngineDied as error:  # together with what it was forked from
            return str(error)
        engine = self.engines[ended.server]
        return describe_death(engine.spec.name, status, engine.log, ended.part)


def describe_death(who: str, status: int | None, log: Path, part: str = "") -> str:
    """The end of a server's log, then one sentence on how it ended; `part`: its process that did
    so first. `status` None: nobody knows any more.
    """
    how = "ended" if status is None else f"ended with status {status}"
    if status is not None and status < 0:
        how = f"was killed by {signal.Signals(-status).name}"
    if part:
        how += f" (its process {part})"
    text = tail(log, 200)
    raised = re.findall(r"^[\w.]*(?:Error|Exception|Interrupt)\b.*", text, re.MULTILINE)
    if raised:  # SGLang kills its own processes once one of them has failed
        how += f" after {raised[-1]}"
    elif status == -signal.SIGKILL:
        how += ", perhaps because the host had no memory left"
    return f"the end of {log}:\n{tail(log)}\n{who} {how}"


def tail(path: Path, lines: int = 30) -> str:
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return "(no log)"
    return "\n".join(text.splitlines()[-lines:]) or "(the log is empty)"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
