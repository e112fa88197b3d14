"""sglang-router in front of several engines: one address for generation requests.

Comes in: the engines' URLs and the job's key; goes out: the address clients use. With one engine
that is the engine. Run as a program it becomes the router: its arguments, the key among them,
arrive on standard input.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from spmd_rl.config import Config
from spmd_rl.control import Child, spawn
from spmd_rl.rollout import engine_args
from spmd_rl.rollout.admin import EngineAdmin
from spmd_rl.rollout.engines import EngineDied, describe_death, tail
from spmd_rl.rollout.monitor import Ended, Monitor
from spmd_rl.rollout.ports import Ports

START_SECONDS = 60.0


class Router:
    """The router process, a child of this one; does nothing with a single engine. `tell` hears at
    once, from another thread, when it ends by itself; `ended` says so too.
    """

    def __init__(
        self,
        cfg: Config,
        urls: list[str],
        key: str,
        run_dir: Path,
        tell: Callable[[str], None] | None = None,
    ):
        self.cfg, self.urls, self.key = cfg, urls, key
        self.log = Path(run_dir) / "logs" / "router.log"
        self.child: Child | None = None
        self.ended: str | None = None  # how
        self._tell = tell
        self.url = urls[0]
        if len(urls) > 1:
            # Only this machine's collector asks it; the first engine may be on another one.
            host = cfg.placement.host_ip or "127.0.0.1"
            self.ports = Ports(host)
            port, metrics_port = self.ports.reserve(), self.ports.reserve()
            self.url = f"http://{host}:{port}"
            places = {"host": host, "port": port}
            places |= {
                "prometheus_host": "127.0.0.1",  # it cannot be left out, and asks for no key
                "prometheus_port": metrics_port,
            }
            self.args = router_args(cfg, urls, key) | places
            self.monitor = Monitor(self._told)
            self.start()

    def start(self) -> None:
        """Also again, at the same address, once it has ended."""
        ours, theirs = socket.socketpair()
        env = engine_args.environment(self.cfg)
        with ours, theirs:
            ours.sendall(json.dumps(self.args).encode())
            ours.shutdown(socket.SHUT_WR)
            argv = [sys.executable, "-m", "spmd_rl.rollout.router"]
            self.child = spawn(argv, env=env, log=self.log, stdin=theirs)
            self._wait()
        self.ended = None
        self.monitor.watch(0, self.child.pid)

    def _told(self, ended: Ended) -> None:
        assert self.child is not None
        self.ended = describe_death("the router", self.child.wait(), self.log)
        if self._tell:
            self._tell(self.ended)

    def _wait(self) -> None:
        """Until every engine is registered: before, the router would send all requests to the
        first.
        """
        admin = EngineAdmin(self.url, self.key)
        deadline = time.monotonic() + START_SECONDS
        while True:
            self.check()
            if admin.health(2.0) and admin.workers() == len(self.urls):
                return
            if time.monotonic() > deadline:
                raise EngineDied(f"the router did not become ready; its log:\n{tail(self.log)}")
            time.sleep(0.05)

    def check(self) -> None:
        """Raise EngineDied when the router has ended."""
        status = self.child.poll() if self.child else None
        if status is not None:
            raise EngineDied(describe_death("the router", status, self.log))

    def stop(self) -> None:
        if self.child:
            self.monitor.close()
            self.child.stop(grace=0.0)
            self.ports.close()
            self.child = None


def router_args(cfg: Config, urls: list[str], key: str) -> dict:
    """RouterArgs fields. Failing engines are the job's business: no circuit breaker, no health
    checks.
    """
    return {
        "worker_urls": urls,
        "api_key": key,
        "policy": cfg.rollout.router_policy,
        "balance_abs_threshold": 10,
        "balance_rel_threshold": 1.2,
        "request_timeout_secs": int(cfg.rollout.rollout_request_timeout) + 60,
        "worker_startup_check_interval": 1,
        "disable_health_check": True,
        "disable_circuit_breaker": True,
        "max_concurrent_requests": -1,
        "log_level": "warn",
    }


def main() -> None:
    # Not sglang_router.launch_router: it imports all of SGLang, which takes 5 s.
    from sglang_router.router import Router as Server
    from sglang_router.router_args import RouterArgs

    Server.from_args(RouterArgs(**json.load(sys.stdin))).start()


if __name__ == "__main__":
    main()
