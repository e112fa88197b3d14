"""Buckets: bounds, alignment, and bytes that the engine's own classes read back."""

from __future__ import annotations

import base64
import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spmd_rl.weights.bucket import pack, serialize, split

DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.int64)


@given(
    st.lists(st.tuples(st.integers(0, 40), st.sampled_from(DTYPES)), max_size=30),
    st.integers(1, 300),
)
@settings(deadline=None, max_examples=60)
def test_runs_keep_order_bounds_and_alignment(shapes, limit):
    tensors = [(f"t{i}", torch.ones(n).to(dtype)) for i, (n, dtype) in enumerate(shapes)]
    runs = list(split(iter(tensors), limit))
    assert [name for run in runs for name, _ in run] == [name for name, _ in tensors]
    for run in runs:
        assert len(run) == 1 or sum(t.nbytes for _, t in run) <= limit
        for entry in pack(run, shared=False).entries():
            assert entry.start_idx % entry.dtype.itemsize == 0


def test_a_request_to_stop_does_not_reach_torchs_manager_of_shared_memory():
    """Slurm hands it to every process; a manager that dies breaks the next push."""
    script = """
import os, signal, psutil, torch
from spmd_rl.weights.bucket import allocate
allocate(64, torch.device("cpu"), True)
[manager] = psutil.Process().children()
for number in (signal.SIGUSR1, signal.SIGTERM):
    os.kill(manager.pid, number)
allocate(64, torch.device("cpu"), True)
with open(f"/proc/{manager.pid}/status") as status:
    print(*(line for line in status if line.startswith(("Name", "SigBlk", "ShdPnd"))))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "torch_shm" in done.stdout, done.stderr
    blocked, waiting = (int(line.split()[1], 16) for line in done.stdout.splitlines()[1:3])
    stop = 1 << (signal.SIGUSR1 - 1) | 1 << (signal.SIGTERM - 1)
    assert blocked & stop == stop, done.stdout
    assert waiting & stop == stop, done.stdout


def test_a_bucket_holds_the_tensors_bits_and_names():
    run = [("a", torch.randn(3, 5)), ("b", torch.randn(7).bfloat16()), ("c", torch.tensor(2.0))]
    bucket = pack(run[:2], shared=False)
    for (name, tensor), entry in zip(run, bucket.entries(), strict=False):
        part = bucket.flat[entry.start_idx : entry.end_idx].view(entry.dtype).view(entry.shape)
        assert entry.name == name and torch.equal(part, tensor)


def test_a_handle_is_small_and_opens_in_another_process():
    bucket = pack([("a", torch.arange(100_000, dtype=torch.float32))], shared=True)
    text = serialize(bucket)
    assert len(text) < 2000
    code = (
        "import base64, pickle, sys; import torch.multiprocessing;"
        "flat = pickle.loads(base64.b64decode(sys.argv[1]))['flattened_tensor'];"
        "print(flat.view(torch.float32).sum().item()); del flat"
    )
    out = subprocess.run([sys.executable, "-c", code, text], capture_output=True, text=True)
    assert float(out.stdout) == torch.arange(100_000, dtype=torch.float32).sum().item()
    name = next(iter(pickled_names(text)))
    assert name in os.listdir("/dev/shm")
    del bucket
    wait_until(lambda: name not in os.listdir("/dev/shm"))


def test_no_shared_memory_survives_a_killed_sender(tmp_path):
    code = (
        "import sys, time, torch; from spmd_rl.weights.bucket import pack, serialize;"
        "b = pack([('a', torch.ones(1000))], shared=True); print(serialize(b), flush=True);"
        "time.sleep(60)"
    )
    sender = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert sender.stdout is not None
    name = next(iter(pickled_names(sender.stdout.readline())))
    assert Path("/dev/shm", name).exists()
    os.killpg(sender.pid, 9)
    sender.wait()
    wait_until(lambda: not Path("/dev/shm", name).exists())


def pickled_names(text: str) -> set[str]:
    """Shared-memory names in a payload, read without opening them."""
    names: set[str] = set()

    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            return lambda *args: names.update(
                arg.decode().lstrip("/")
                for arg in args
                if isinstance(arg, bytes) and arg.startswith(b"/torch_")
            )

    import io

    # The stand-ins are no tensors: the names were seen before.
    with contextlib.suppress(TypeError, AttributeError):
        Reader(io.BytesIO(base64.b64decode(text))).load()
    return names


def wait_until(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
