"""What another user of the same machine can see of a running job, and do to it."""

from __future__ import annotations

import contextlib
import encodings.idna  # noqa: F401  (a stranger cannot read it where it lies)
import http.client
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.ranks import ROOT, Running
from tests.whole.jobs import marked_by, run_job, write_config
from tests.whole.test_faults import READY, rank_process

NOBODY = 65534
# Answered without the key: that a server lives; and by the router the model and its engines' count.
OPEN = {"/health", "/liveness", "/v1/models", "/get_server_info"}
READS = (
    "/health",
    "/liveness",
    "/model_info",
    "/server_info",
    "/workers",
    "/v1/models",
    "/get_loads",
)
WRITES = (
    *("/generate", "/v1/chat/completions", "/abort_request", "/flush_cache", "/pause_generation"),
    *("/update_weights_from_tensor", "/update_weights_from_disk", "/release_memory_occupation"),
    *("/begin_weight_update", "/init_weights_update_group", "/weights_checker", "/workers"),
)


def ask(address: tuple[str, int], method: str, path: str, key: str | None) -> int | str | None:
    """The HTTP status; None if nothing there speaks HTTP, "counters" for a page of those."""
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    connection = http.client.HTTPConnection(*address, timeout=5)
    try:
        connection.request(method, path, b"{}" if method == "POST" else None, headers)
        response = connection.getresponse()
        # The router's page of request counts cannot be turned off; it says so whatever is asked.
        return "counters" if response.read(4) in (b"# TY", b"# HE") else response.status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def as_nobody(action, *args: Any) -> Any:
    """What `action` returns in a process of another user."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with open(write, "w") as answer:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
                json.dump(action(*args), answer)
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    os.close(write)
    with open(read) as answer:
        text = answer.read()
    assert os.waitpid(child, 0)[1] == 0
    return json.loads(text)


def answers(addresses: list[tuple[str, int]], pids: list[int], folders: list[str]) -> dict:
    """What a stranger learns: answered requests, and every word of the job that he can read."""
    found: dict[str, Any] = {"answered": [], "words": ""}
    # Most ports are torch's, for stores and collectives: they take a connection and say nothing.
    with ThreadPoolExecutor(64) as pool:
        http = list(pool.map(lambda address: ask(address, "GET", "/health", None), addresses))
    for address in (a for a, status in zip(addresses, http, strict=True) if status is not None):
        for key in (None, "wrong"):
            asked = [("GET", path) for path in READS] + [("POST", path) for path in WRITES]
            for method, path in asked:
                if ask(address, method, path, key) == 200:
                    found["answered"].append([address[1], path])
    for pid in pids:
        for name in ("cmdline", "environ"):
            with contextlib.suppress(OSError):
                found["words"] += Path("/proc", str(pid), name).read_text(errors="replace")
    walks = (walk for folder in folders for walk in os.walk(folder))
    for path in (Path(where, name) for where, _, names in walks for name in names):
        with contextlib.suppress(OSError):
            if stat.S_ISREG(path.lstat().st_mode):
                found["words"] += path.read_text(errors="replace")
    return found


def forge(port: int) -> str:
    """Write commands into the store on that port, as whoever speaks its protocol can."""
    code = (
        "import datetime, sys; from torch.distributed import TCPStore as S, PrefixStore as P\n"
        "t = datetime.timedelta(seconds=10)\n"
        f"s = P('spmd_rl/0', S('127.0.0.1', {port}, None, False, t, wait_for_workers=False))\n"
        "[s.set(f'command/{n}', b'x' * 100) for n in range(1, 500)]"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    return done.stderr


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that others may read, as on a cluster's disk; pytest's own shuts them out."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_another_user_of_the_machine(open_folder: Path) -> None:
    write_config(open_folder)
    key_file = open_folder / "key"
    seen: dict[str, Any] = {}

    def look(running: Running) -> None:
        running.wait_for(READY, limit=90)
        running.wait_for("rollout 1/", limit=60)
        key = key_file.read_text()
        key_file.unlink()
        pids = [*marked_by(running), running.processes[0].pid]
        listening: dict[int, str] = {}
        for pid in pids:
            with contextlib.suppress(psutil.Error):
                for socket in psutil.Process(pid).net_connections("tcp"):
                    if socket.status == psutil.CONN_LISTEN:
                        listening[socket.laddr.port] = socket.laddr.ip
        addresses = [("127.0.0.1", port) for port in listening]
        run_dir = str(open_folder / "runs")
        seen.update(as_nobody(answers, addresses, pids, [run_dir, "/dev/shm"]))
        seen["listening"], seen["key"] = listening, key
        files = [file for file in Path(run_dir).rglob("*") if file.is_file()]
        seen["files with it"] = [str(f) for f in files if key.encode() in f.read_bytes()]
        environment = Path("/proc", str(rank_process(open_folder, 1)), "environ").read_text()
        store = re.search(r"MASTER_PORT=(\d+)", environment)
        assert store
        seen["forging"] = forge(int(store.group(1)))

    hook = "custom_generate_function_path=tests.whole.hooks.tell_the_key"
    outcome = run_job(
        open_folder, "num_rollout=1000", hook, act=look, env={"KEY_FILE": str(key_file)}
    )

    # Two engines and the router were asked.
    assert len({port for port, path in seen["answered"] if path == "/health"}) >= 3, seen
    assert "launch_engines" in seen["words"] or "placement:" in seen["words"]  # logs were read
    assert {path for _, path in seen["answered"]} <= OPEN
    assert len(seen["key"]) == 32 and seen["key"] not in seen["words"]
    assert not seen["files with it"]
    assert seen["forging"] == ""
    assert "without this job's signature" in outcome.last(), outcome.output
    assert outcome.left == []
