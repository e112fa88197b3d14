"""Check the nodes of an allocation before a run: a table, and a sentence for each fault.

    sbatch --nodes 4 slurm/preflight.sbatch             the nodes that Slurm gives
    torchrun --nproc-per-node 8 tools/preflight.py      this machine; srun works as well

Every rank takes part in the all-reduce; the first rank of a node looks at the rest. Takes less than
a minute. The exit status is 0 where no fault was found and 1 otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from spmd_rl import control  # noqa: E402

PACKAGES = ("torch", "sglang", "megatron-core", "transformers")
SAME = ("python", *PACKAGES, "spmd_rl source", "driver", "GPUs")  # rows that must not differ
GIB, MIB = 2**30, 2**20
DISK_BYTES = 64 * MIB  # written and synced by every node at once
REDUCE_BYTES = {"gloo": 32 * MIB, "nccl": 512 * MIB}
SLOW_REDUCE = {"gloo": 0.02, "nccl": 1.0}  # GB/s (10^9) between nodes: the wrong interface
SLOW_DISK = 10.0  # MB/s (10^6)
SMALL_SHM = 1 * GIB
SKEW = 1.0  # seconds
BUSY_GPU = 1024  # MiB in use
COLUMNS = 6  # nodes side by side in the table
LIMIT = 60.0  # seconds for any one step


class Checker:
    """What a rank does when rank 0 says so. Faults are answers: nothing here raises."""

    def __init__(self, job: control.Job):
        self.job, self.name = job, platform.node()

    @control.command
    def hello(self) -> tuple[str, float]:
        """The node's name and its time."""
        return self.name, time.time()

    @control.command
    def look(self, run_dir: str, token: str, port: int, gpus: int) -> tuple[dict, list[str]]:
        """The rows of this node and its own faults; nothing but from the node's first rank."""
        if self.job.local_rank:
            return {}, []
        rows: dict[str, str] = {"python": platform.python_version()}
        faults: list[str] = []
        for package in PACKAGES:
            try:
                rows[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                rows[package] = "missing"
        rows["spmd_rl source"] = source_hash()
        self._gpus(gpus, rows, faults)
        self._memory(rows, faults)
        self._port(port, rows, faults)
        self._disk(Path(run_dir), token, rows, faults)
        return rows, faults

    def _gpus(self, wanted: int, rows: dict, faults: list[str]) -> None:
        words = "index,name,driver_version,memory.used"
        query = ["nvidia-smi", f"--query-gpu={words}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            rows |= {"driver": "none", "GPUs": "none"}
            if wanted:
                faults.append(
                    f"{self.name} was to have {wanted} GPUs, but nvidia-smi does not work there "
                    f"({error}): leave the node out with --exclude={self.name}"
                )
            return
        found = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        ours = [gpu for gpu in found if gpu[0] in visible] or found
        rows["driver"] = found[0][2] if found else "none"
        rows["GPUs"] = f"{len(ours)} {ours[0][1]}" if ours else "none"
        if wanted and len(ours) != wanted:
            faults.append(
                f"{self.name} shows {len(ours)} GPUs instead of {wanted}: leave it out with "
                f"--exclude={self.name}"
            )
        busy = [f"{gpu[0]} ({gpu[3]} MiB)" for gpu in ours if float(gpu[3] or 0) > BUSY_GPU]
        rows["GPUs idle"] = "no" if busy else "yes"
        if busy:
            faults.append(
                f"GPU {', '.join(busy)} of {self.name} is in use: end what runs there if it is "
                f"yours (nvidia-smi shows it), else leave the node out with --exclude={self.name}"
            )

    def _memory(self, rows: dict, faults: list[str]) -> None:
        free = shutil.disk_usage("/dev/shm").free
        rows["/dev/shm free"] = f"{free / GIB:.1f} GiB"
        if free < SMALL_SHM:
            faults.append(
                f"/dev/shm of {self.name} has {free / MIB:.0f} MiB free, and NCCL and torch want "
                f"{SMALL_SHM // GIB} GiB: remove what lies there, or give the container more "
                "(--shm-size, or bind the host's)"
            )

    def _port(self, port: int, rows: dict, faults: list[str]) -> None:
        if not port:
            return
        try:
            socket.create_server(("", port)).close()
            rows[f"port {port}"] = "free"
        except OSError as error:
            rows[f"port {port}"] = "busy"
            faults.append(
                f"port {port} of {self.name} is taken by {owner(port)} "
                f"({os.strerror(error.errno or 0)}): end that if it is "
                "a leftover of yours; slurm/run.sbatch takes the next free port"
            )

    def _disk(self, run_dir: Path, token: str, rows: dict, faults: list[str]) -> None:
        rows["disk shared"] = rows["disk write"] = "-"
        if token:
            shared = (run_dir / token).exists()
            rows["disk shared"] = "yes" if shared else "no"
            if not shared:
                faults.append(
                    f"{self.name} does not see what the first node wrote to {run_dir}: set "
                    "logging.run_dir to a folder on a disk that all nodes share"
                )
        path = run_dir / f".preflight-{self.name}-{os.getpid()}"
        block = os.urandom(MIB)
        try:
            began = time.monotonic()
            with open(path, "wb") as file:
                for _ in range(DISK_BYTES // MIB):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
            speed = DISK_BYTES / (time.monotonic() - began) / 1e6
            path.unlink()
        except OSError as error:
            rows["disk write"] = "failed"
            faults.append(
                f"{self.name} cannot write to {run_dir} ({error.strerror}): set logging.run_dir to "
                "a folder that every node may write to"
            )
            return
        rows["disk write"] = f"{speed:.0f} MB/s"
        if speed < SLOW_DISK:
            faults.append(
                f"{self.name} writes {speed:.1f} MB/s to {run_dir}, below {SLOW_DISK:.0f}: put "
                "logging.run_dir and checkpoint.save on a faster disk"
            )

    @control.command
    def reduce(self) -> tuple[str, float, str]:
        """Sum one tensor over all ranks: backend, seconds, and what went wrong."""
        try:
            return *self._reduce(), ""
        except Exception as error:  # said in the table's words, by rank 0
            return "", 0.0, f"{type(error).__name__}: {error}".splitlines()[0]

    def _reduce(self) -> tuple[str, float]:
        import torch
        import torch.distributed as dist

        cuda = torch.cuda.is_available() and self.job.local_world <= torch.cuda.device_count()
        backend = "nccl" if cuda else "gloo"
        device = torch.device("cuda", self.job.local_rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        self.job.train_group(range(self.job.world), backend, timeout=LIMIT / 2)
        tensor = torch.ones(REDUCE_BYTES[backend] // 4, device=device)
        seconds = []
        for _ in range(4):  # the first one connects
            dist.barrier()
            began = time.monotonic()
            dist.all_reduce(tensor)
            tensor[0].item()  # done, on a GPU too
            seconds.append(time.monotonic() - began)
        if tensor[-1].item() != float(self.job.world) ** 4:
            raise ValueError(f"the sum is wrong: {tensor[-1].item()}")
        dist.destroy_process_group()
        return backend, min(seconds)


def source_hash() -> str:
    """Of every Python file of the package, by name and content."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "spmd_rl").rglob("*.py")):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:10]


def owner(port: int) -> str:
    """Who listens there, as far as this user may know."""
    import psutil

    try:
        for found in psutil.net_connections("tcp"):
            if found.laddr and found.laddr.port == port and found.pid:
                return f"process {found.pid} ({psutil.Process(found.pid).name()})"
    except psutil.Error:
        pass
    return "a process of another user"


def differences(rows: dict[str, dict[str, str]]) -> list[str]:
    """A sentence for each row that must be the same on all nodes and is not."""
    faults = []
    for name in SAME:
        nodes: dict[str, list[str]] = {}
        for node, values in rows.items():
            nodes.setdefault(values.get(name, "-"), []).append(node)
        if len(nodes) > 1:
            common = max(nodes, key=lambda value: len(nodes[value]))
            others = [f"{value} on {', '.join(n)}" for value, n in nodes.items() if value != common]
            fix = "leave the odd nodes out with --exclude"
            if name not in ("driver", "GPUs"):
                fix = "use one environment on all nodes"
            here = f"{common} on {', '.join(nodes[common])}"
            faults.append(f"{name} differs: {here}, but {'; '.join(others)}: {fix}")
    return faults


def clocks(workers: Any, first: dict[str, int]) -> dict[str, float]:
    """Seconds each node's clock is ahead of the first node's, no worse than half a round trip."""
    best = float("inf")
    ahead: dict[str, float] = {}
    for _ in range(5):
        began = time.time()
        answers = workers.hello()
        ended = time.time()
        if ended - began < best:
            best = ended - began
            middle = (began + ended) / 2
            ahead = {node: answers[rank][1] - middle for node, rank in first.items()}
    return {node: 0.0 if abs(s) <= best / 2 else s for node, s in ahead.items()}


def table(rows: dict[str, dict[str, str]]) -> str:
    """A row for each check, a column for each node, so many nodes at a time."""
    names = list(dict.fromkeys(name for values in rows.values() for name in values))
    lines = []
    nodes = list(rows)
    for start in range(0, len(nodes), COLUMNS):
        some = nodes[start : start + COLUMNS]
        cells = [["", *some], *([n, *(rows[node].get(n, "-") for node in some)] for n in names)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(some) + 1)]
        for line in cells:
            padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            lines.append("  ".join(padded).rstrip())
        lines.append("")
    return "\n".join(lines)


def lead(workers: Any, args: argparse.Namespace) -> int:
    """Rank 0: ask, print, judge. The exit status."""
    began = time.monotonic()
    first: dict[str, int] = {}  # each node's first rank
    for rank, (node, _) in enumerate(workers.hello()):
        first.setdefault(node, rank)
    ahead = clocks(workers, first)
    run_dir, token = Path(args.run_dir).resolve(), f".preflight-{os.getpid()}-{time.time_ns()}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / token).touch()
    except OSError:
        token = ""  # the first node says so itself
    answers = workers.look(str(run_dir), token, args.port, args.gpus)
    if token:
        (run_dir / token).unlink(missing_ok=True)
    rows = {node: dict(answers[rank][0]) for node, rank in first.items()}
    faults = differences(rows) + [fault for rank in first.values() for fault in answers[rank][1]]
    for node, seconds in ahead.items():
        rows[node]["clock"] = f"{seconds:+.3f} s"
        if abs(seconds) > SKEW:
            faults.append(
                f"the clock of {node} is {seconds:+.1f} s off: ask its administrator to start "
                f"chronyd or ntpd, or leave it out with --exclude={node}"
            )
    print(table(rows), flush=True)
    sums = workers.reduce()
    failed = {error for _, _, error in sums if error}
    ranks = f"{len(sums)} ranks on {len(first)} node{'s' * (len(first) > 1)}"
    if failed:
        faults.append(
            f"an all-reduce over {ranks} failed ({'; '.join(sorted(failed))}): the nodes do not "
            "reach each other; name their network in NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME"
        )
    else:
        backend, seconds = sums[0][0], max(seconds for _, seconds, _ in sums)
        size = REDUCE_BYTES[backend]
        speed = 2 * (len(sums) - 1) / len(sums) * size / seconds / 1e9
        print(f"all-reduce of {size // MIB} MiB over {ranks}, {backend}: {speed:.2f} GB/s (bus)")
        if len(first) > 1 and speed < SLOW_REDUCE[backend]:
            faults.append(
                f"the all-reduce between nodes reaches {speed:.3f} GB/s: it probably uses the "
                "wrong network; name the fast one in NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME"
            )
    for fault in faults:
        print(f"FAULT: {fault}")
    found = f"{len(faults)} fault{'s' * (len(faults) != 1)}" if faults else "no fault"
    print(f"preflight: {found} on {', '.join(first)} after {time.monotonic() - began:.1f} s")
    return 1 if faults else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run-dir", default="runs", help="the run folder to come (shared disk)")
    parser.add_argument("--port", type=int, default=0, help="a port that should be free")
    wanted = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    parser.add_argument("--gpus", type=int, default=wanted, help="GPUs that a node should have")
    args = parser.parse_args()
    try:
        job = control.join(timeout=LIMIT)
    except ImportError as error:
        sys.exit(f"FAULT: {platform.node()} cannot import torch ({error}): install it there")
    job.start_watching(30.0)
    checker = Checker(job)
    if job.rank:
        control.follow(job, checker)
        job.leave(0)
    with job.failing():
        workers = control.Workers(job, checker, timeout=LIMIT)
        status = lead(workers, args)
        workers.exit()
    job.leave(status)


if __name__ == "__main__":
    main()
