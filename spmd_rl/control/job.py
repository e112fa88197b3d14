"""Joining the job: which rank this process is, and the key-value store that all ranks share.

Comes in: the environment of torchrun, of plain `srun`, or of a lone process. Goes out: a Job.
torch is imported when a job is joined, not before. Must not know what the ranks are for.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from spmd_rl.control import children, logs, secret
from spmd_rl.control.report import describe, is_symptom

if TYPE_CHECKING:
    from spmd_rl.control.watch import Watcher

FOREVER = timedelta(
    days=365
)  # waiting ranks sleep in a socket; the watcher ends them, not a timeout
NEW_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"  # torchrun makes a new store for each attempt
EXIT_PATIENCE = 5.0  # seconds for atexit functions before a finished process is ended regardless


@dataclass(frozen=True, slots=True)
class Launch:
    """What the launcher said. Nothing here is a guess but a lone process's port."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    master: str
    port: int  # 0: any free one
    hosted: bool  # the launcher's agent serves the store already
    attempt: str  # distinguishes restarts that share a store


def read_launch(env: dict[str, str]) -> Launch:
    """The place of this process, from the environment of torchrun or srun; alone if it is
    neither's.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
        return Launch(
            rank,
            world,
            int(env.get("LOCAL_RANK", rank)),
            int(env.get("LOCAL_WORLD_SIZE", world)),
            env.get("MASTER_ADDR", "127.0.0.1"),
            int(env.get("MASTER_PORT", 0)),
            env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            _attempt(env),
        )
    # sbatch sets the same names for the script itself; only srun numbers a step
    if "SLURM_PROCID" in env and ("SLURM_STEP_ID" in env or "SLURM_JOB_ID" not in env):
        world = int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1)
        job, step = int(env.get("SLURM_JOB_ID", 0)), int(env.get("SLURM_STEP_ID", 0))
        return Launch(
            int(env["SLURM_PROCID"]),
            world,
            int(env.get("SLURM_LOCALID", 0)),
            _tasks_here(env, world),
            env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST", "127.0.0.1")),
            int(env.get("MASTER_PORT") or 15000 + (7 * job + step) % 15000),
            False,
            env.get("SLURM_RESTART_COUNT", "0"),
        )
    return Launch(0, 1, 0, 1, "127.0.0.1", 0, False, "0")


def _attempt(env: dict[str, str]) -> str:
    """What the ranks of one attempt, and no earlier one, share.

    An agent counts its own restarts, and one that only follows another's does not: the counts of
    two nodes differ. With NEW_STORE each attempt has a store of its own and needs no name.
    Raises RuntimeError where restarts could not work.
    """
    if env.get(NEW_STORE) == "1":
        return "0"
    several = int(env.get("GROUP_WORLD_SIZE", 1)) > 1
    if several and int(env.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        raise RuntimeError(
            f"torchrun --max-restarts on several nodes needs {NEW_STORE}=1 in torchrun's own "
            "environment, on every node: without it ranks do not find each other after a restart"
        )
    return env.get("TORCHELASTIC_RESTART_COUNT", "0")


def first_host(nodelist: str) -> str:
    """`gpu[07-09,12],login1` -> `gpu07`."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodelist)
    return match.group(1) + (match.group(2) or "") if match else nodelist


def _tasks_here(env: dict[str, str], world: int) -> int:
    """`SLURM_STEP_TASKS_PER_NODE=4(x2),3` and the node's number -> tasks on this node."""
    text = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_NTASKS_PER_NODE") or str(world)
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match:
            counts += [int(match.group(1))] * int(match.group(2) or 1)
    node = int(env.get("SLURM_NODEID", 0))
    return counts[min(node, len(counts) - 1)] if counts else world


def join(host: str | None = None, timeout: float = 300.0) -> Job:
    """Become a rank of the job. `host`: the address other ranks reach this one at (found out if
    None).
    """
    try:
        launch = read_launch(dict(os.environ))
    except RuntimeError as error:
        sys.exit(f"{error}")
    return Job(launch, host, timeout)


class Job:
    """This process's membership of the job."""

    def __init__(self, launch: Launch, host: str | None = None, timeout: float = 300.0):
        from torch.distributed import PrefixStore, TCPStore

        self.rank, self.world = launch.rank, launch.world
        self.local_rank, self.local_world = launch.local_rank, launch.local_world
        self.doing = "start"  # what this rank is at, for reports
        self.sequence = 0  # commands posted (rank 0) or received (others)
        self.waiting = False  # for the next command
        # told of each command this rank has done: its name, when it began and ended
        self.on_command: Callable[[str, float, float], None] | None = None
        self.run_dir: Path | None = None
        self.secret = secret.Secret()
        self.watcher: Watcher | None = None
        self._patience = timedelta(seconds=timeout)
        self._prefix = f"spmd_rl/{launch.attempt}"
        self._address = (launch.master, launch.port)
        self._closed = False
        self.hosts_store = launch.rank == 0 and not launch.hosted
        if self.hosts_store:
            self._server = TCPStore(
                *self._address, None, True, wait_for_workers=False, timeout=self._patience
            )
            self._address = (launch.master, self._server.port)
        self._tcp, self._prefixed = TCPStore, PrefixStore
        self.store = self.connect()
        self.commands = self.connect()  # a blocked wait holds its connection
        self.commands.set_timeout(FOREVER)
        self.host = host or self._own_address()
        if self.rank == 0:
            self.store.set("token", secrets.token_hex(8))
        # of this job alone; shared-memory files named spmd_rl-<token>* are removed when it fails
        self.token = self.store.get("token").decode()
        os.environ[children.MARK] = f"{self.token}.{self.rank}"

    def connect(self, *names: str) -> Any:
        """A client of the job's store with a socket of its own; keys below `names` only."""
        client = self._tcp(
            *self._address, None, False, wait_for_workers=False, timeout=self._patience
        )
        return self._prefixed("/".join([self._prefix, *names]), client)

    def _own_address(self) -> str:
        if self.world == self.local_world:
            return "127.0.0.1"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((self._address[0], 9))  # sends nothing: only asks for the route
            return probe.getsockname()[0]

    def start_watching(
        self, heartbeat_timeout: float = 8.0, run_dir: str | Path | None = None
    ) -> None:
        """Start the watcher: from now on any rank's failure ends every rank within seconds."""
        from spmd_rl.control.watch import Watcher

        self.run_dir = Path(run_dir) if run_dir is not None else self.run_dir
        self.watcher = Watcher(self, heartbeat_timeout)
        self.watcher.start()

    def share_secret(self, run_dir: Path) -> None:
        """All ranks together, before the first command; see control/secret.py."""
        with self.failing():
            self.secret = secret.share(self, run_dir)

    def forget_secret(self) -> None:
        """Rank 0, once every rank has answered a command and so has read the secret."""
        if self.run_dir is not None:
            secret.forget(self, self.run_dir)

    def fail(self, text: str, symptom: bool = False) -> None:
        """Report a failure. Returns at once; the watcher ends this process and all others."""
        if self.watcher is None or self.watcher.over:
            print(f"rank {self.rank} failed in {self.doing}:\n{text}", file=sys.stderr, flush=True)
            self._die(1)
        self.watcher.report(text, symptom)

    def fail_with(self, error: BaseException, skip: int = 1) -> NoReturn:
        """Report an exception and wait for the end."""
        self.fail(describe(error, skip), is_symptom(error))
        while True:
            threading.Event().wait(3600)

    @contextlib.contextmanager
    def failing(self) -> Iterator[Job]:
        """Any exception out of this block, SystemExit with a status too, is the failure of the
        job.
        """
        try:
            yield self
        except BaseException as error:
            if isinstance(error, SystemExit) and not error.code:
                raise
            self.fail_with(error)

    def train_group(
        self, ranks: Sequence[int], backend: str = "gloo", timeout: float = 600.0, **options: Any
    ) -> None:
        """torch's default process group over `ranks` only; on other ranks it does nothing."""
        if self.rank not in ranks:
            return
        import torch.distributed as dist

        if self.world == self.local_world and os.path.exists("/sys/class/net/lo"):
            # gloo otherwise looks the host's name up, which fails on machines without DNS
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            backend,
            store=self.connect("train"),
            rank=list(ranks).index(self.rank),
            world_size=len(ranks),
            timeout=timedelta(seconds=timeout),
            **options,
        )

    def close(self) -> None:
        """Leave the job in peace: children stopped, the others told. Commands are over by now."""
        if self._closed:
            return
        self._closed = True
        children.stop_all(grace=10.0)
        if self.watcher is not None:
            self.watcher.close()

    def leave(self, status: int = 0) -> NoReturn:
        """Close and end the process. Finalisation of Python and C++ can hang, so it is given
        seconds only.
        """
        self.close()
        timer = threading.Timer(EXIT_PATIENCE, self._die, (status,))
        timer.daemon = True
        timer.start()
        atexit._run_exitfuncs()
        self._die(status)

    def _die(self, status: int) -> NoReturn:
        with contextlib.suppress(Exception):
            children.kill_marked(f"{self.token}.{self.rank}")
            logs.flush()
            logs.close()
        os._exit(status)
