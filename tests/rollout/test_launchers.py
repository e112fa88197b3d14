"""Starting and ending server processes, and the ports they are given."""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path

import pytest

from spmd_rl.rollout import engine_args
from spmd_rl.rollout.engines import EngineDied
from spmd_rl.rollout.launchers import CudaLauncher
from spmd_rl.rollout.ports import Ports
from tests.engine import engine_config, engine_host
from tests.models import tiny_model


def test_a_kept_port_is_for_the_server_it_was_promised_to():
    ports = Ports("127.0.0.1")
    port = ports.reserve()
    with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
        stranger.bind(("127.0.0.1", port))
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as uvicorn and torch do
        server.bind(("127.0.0.1", port))
        server.listen()
        socket.create_connection(("127.0.0.1", port)).close()
    ports.close()


def test_a_cuda_engines_key_file_is_private_and_short_lived(tmp_path, monkeypatch):
    # A process that sleeps stands for the server: there is no GPU to start one on.
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    seen = []
    monkeypatch.setattr(
        engine_args, "cuda_command", lambda args, file: seen.append(file) or sleeper
    )
    launcher = CudaLauncher(engine_config(tiny_model()), tmp_path)
    launcher.prepare()
    launcher.start(3, {"api_key": "k", "admin_api_key": "k"}, {}, tmp_path / "engine3.log")
    [file] = seen
    assert file.read_text() and file.parent.stat().st_mode & 0o077 == 0
    assert launcher.status(3) is None
    launcher.ready(3)
    assert not file.exists()
    launcher.close()
    assert not file.parent.exists()


def test_a_cuda_engine_that_ends_has_a_status(tmp_path, monkeypatch):
    monkeypatch.setattr(
        engine_args, "cuda_command", lambda args, file: [sys.executable, "-c", "exit(5)"]
    )
    launcher = CudaLauncher(engine_config(tiny_model()), tmp_path)
    launcher.prepare()
    launcher.start(0, {"api_key": "k", "admin_api_key": "k"}, {}, tmp_path / "engine0.log")
    deadline = time.monotonic() + 20
    while launcher.status(0) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert launcher.status(0) == 5
    launcher.close()


def test_a_broken_sglang_is_reported_with_the_reason(tmp_path, monkeypatch):
    broken = tmp_path / "sglang"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('half an installation')")
    environment = engine_args.environment
    root = str(Path(__file__).resolve().parents[2])
    monkeypatch.setattr(
        engine_args,
        "environment",
        lambda cfg: environment(cfg) | {"PYTHONPATH": f"{root}:{tmp_path}"},
    )
    host = engine_host(engine_config(tiny_model()), tmp_path)
    host.launch()
    with pytest.raises(EngineDied, match="half an installation"):
        host.wait_ready(60)
    host.stop()
