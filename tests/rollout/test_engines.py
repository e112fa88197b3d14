"""The engine of the session, as a client sees it."""

from __future__ import annotations

import contextlib
import os
import queue
import random
import shutil
import signal
import time
import urllib.error
from pathlib import Path

import psutil
import pytest

from spmd_rl.rollout.admin import EngineAdmin, EngineError
from spmd_rl.rollout.engines import EngineDied
from tests.engine import (
    KEY,
    another_engine,
    engine_config,
    engine_host,
    hf_log_probs,
    log_probs,
    post,
)
from tests.models import tiny_model
from tests.ranks import run_ranks


def prompts(count: int, seed: int = 0, shared: int = 0) -> list[list[int]]:
    """Prompts of 3 to 60 tokens whose first `shared` tokens are the same."""
    rng = random.Random(seed)
    prefix = [rng.randrange(10, 250) for _ in range(shared)]
    return [
        prefix + [rng.randrange(10, 250) for _ in range(rng.randint(3, 60))] for _ in range(count)
    ]


def sampling(**more):
    return {"temperature": 1.0, "max_new_tokens": 24, "ignore_eos": True} | more


def difference(model, batch, replies) -> float:
    expected = hf_log_probs(model, batch, [r["output_ids"] for r in replies])
    return max(
        abs(a - b)
        for reply, row in zip(replies, expected, strict=True)
        for a, b in zip(log_probs(reply), row, strict=True)
    )


def test_log_probs_equal_transformers_with_cold_and_warm_prefixes(engine):
    batch = prompts(12, shared=40)
    for _ in range(2):  # the second time most of every prompt is in the prefix cache
        replies = engine.generate(batch, sampling())
        assert difference(engine.model, batch, replies) < 1e-5
    assert min(r["meta_info"]["cached_tokens"] for r in replies) >= 40


def test_log_probs_hold_when_prompts_are_prefilled_in_chunks_and_mixed_lengths(engine):
    rng = random.Random(3)
    batch = [[rng.randrange(10, 250) for _ in range(n)] for n in (900, 1, 300, 2, 700, 5, 5, 5, 64)]
    assert (
        difference(engine.model, batch, engine.generate(batch, sampling(max_new_tokens=8))) < 1e-5
    )


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_other_families_agree_with_transformers_too(engine, tmp_path, family):
    model = tiny_model(family, positions=1024, tied=False)
    batch = prompts(9, shared=20)
    with another_engine(engine, engine_config(model), tmp_path) as host:
        [(_, url)] = host.wait_ready(120)
        for _ in range(2):
            replies = post(url, "/generate", REQUEST | {"input_ids": batch})
            assert difference(model, batch, replies) < 1e-5


def test_a_seed_gives_the_same_tokens_and_bits_in_any_company(engine):
    batch = prompts(8, seed=1) + prompts(2, seed=2, shared=150)
    settings = [sampling(sampling_seed=1000 + i) for i in range(10)]

    def alone():
        replies = [engine.generate(p, s) for p, s in zip(batch, settings, strict=True)]
        return [(r["output_ids"], log_probs(r)) for r in replies]

    replies = engine.generate(batch, settings)
    together = [(r["output_ids"], log_probs(r)) for r in replies]
    assert alone() == together  # prompts are in the prefix cache
    engine.admin.flush()
    assert alone() == together
    assert engine.generate(batch[0], sampling(sampling_seed=7))["output_ids"] != together[0][0]


def test_sleep_and_wake_are_accepted_and_repeatable(engine):
    admin = engine.admin
    admin.wake(("weights",))  # never slept: nothing to do
    admin.sleep(("weights", "kv_cache", "cuda_graph"))
    admin.sleep(("weights",))
    admin.wake(("weights",))
    admin.wake(("kv_cache", "cuda_graph"))
    assert len(engine.generate([5, 6], sampling())["output_ids"]) == 24


def test_the_key_is_needed_and_is_on_no_command_line(engine):
    with pytest.raises(urllib.error.HTTPError, match="401"):
        post(engine.url, "/generate", {"input_ids": [5]}, key=None)
    with pytest.raises(EngineError, match="refused /pause_generation .*401"):
        EngineAdmin(engine.url, "wrong").pause()
    commands = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()]
    assert not any(KEY.encode() in command for command in commands)


def test_errors_hold_the_engines_reply(engine):
    with pytest.raises(EngineError, match="refused /destroy_weights_update_group.*does not exist"):
        engine.admin.destroy_group("nobody")
    with pytest.raises(EngineError, match="did not answer /server_info"):
        EngineAdmin("http://127.0.0.1:9", KEY).server_info()


def test_a_dead_engine_is_noticed_with_its_log_and_can_be_started_again(engine, tmp_path):
    with another_engine(engine, engine_config(engine.model), tmp_path) as host:
        [(index, url)] = host.wait_ready(120)
        host.check()
        scheduler = next(p for p in family(host) if "scheduler" in p.name())
        scheduler.kill()
        with pytest.raises(EngineDied, match=f"engine {index} was killed by SIGKILL.*") as died:
            wait_until(host.check)
        assert "scheduler" in str(died.value).lower()  # the log's end says what happened
        assert host.restart({index: 1}, timeout=120) == {}
        EngineAdmin(host.engines[index].url, KEY).resume()
        assert log_probs(post(host.engines[index].url, "/generate", REQUEST))
    assert not family(host)


@pytest.mark.parametrize("part", ["sglang::scheduler", "sglang::detokenizer", ""])
def test_an_engines_end_is_told_at_once_whichever_process_dies_first(engine, tmp_path, part):
    told: queue.SimpleQueue = queue.SimpleQueue()
    tell = lambda index, text: told.put((index, text, time.monotonic()))  # noqa: E731
    with another_engine(engine, engine_config(engine.model), tmp_path, tell=tell) as host:
        [(index, _)] = host.wait_ready(120)
        victim = next(p for p in family(host) if ("".join(p.cmdline()[:1]) == part) or not part)
        killed = time.monotonic()
        victim.kill()
        who, text, when = told.get(timeout=20)
        assert who == index and when - killed < 3
        how = f"engine {index} was killed by SIGKILL" + (f" (its process {part})" if part else "")
        assert how in text.splitlines()[-1]
        url = host.engines[index].url
        assert (
            host.restart({index: 1}, timeout=120) == {}
        )  # one that is ended on purpose is nobody's loss
        assert host.engines[index].url == url
    assert told.empty()


def test_an_engine_that_cannot_start_is_explained(engine, tmp_path):
    broken = tmp_path / "model"
    shutil.copytree(engine.model, broken)
    (broken / "model.safetensors").write_bytes(b"no tensors")
    said = "engine [0-9]+ .* after .*Error.*header too large"
    with (
        another_engine(engine, engine_config(broken), tmp_path) as host,
        pytest.raises(EngineDied, match=said),
    ):
        host.wait_ready(120)


def host_that_is_killed(model: str, run_dir: str) -> None:
    """A rank that hosts an engine and waits for its end."""
    host = engine_host(engine_config(model), Path(run_dir))
    host.launch()
    [(_, url)] = host.wait_ready(120)
    post(url, "/generate", REQUEST)
    print("ready", flush=True)
    signal.pause()


def test_nothing_is_left_when_the_host_is_killed(engine, tmp_path):
    def kill(running):
        running.wait_for("ready", limit=120)
        running.processes[0].kill()

    done = run_ranks(
        1,
        host_that_is_killed,
        str(engine.model),
        str(tmp_path),
        env={"TMPDIR": str(tmp_path)},
        limit=150,
        act=kill,
    )
    assert done.statuses == [-signal.SIGKILL] and not done.left, done.left
    assert not leftovers()
    assert not list(tmp_path.glob("spmd_rl-*"))  # engines' scratch directories


REQUEST = {
    "input_ids": [5, 6],
    "return_logprob": True,
    "sampling_params": {"max_new_tokens": 4, "ignore_eos": True},
}


def family(host) -> list[psutil.Process]:
    """Processes of the host's engine."""
    found = []
    for process in psutil.Process(host.launcher.server.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            files = {file.path for file in process.open_files()}
            if files & {str(engine.log) for engine in host.engines.values()}:
                found.append(process)
    return found


def leftovers() -> list[str]:
    """Shared memory named after processes that are gone."""
    names = [name.split("_") for name in os.listdir("/dev/shm")]
    owners = [(n, n[1] if n[0] == "torch" else n[-2]) for n in names if n[0] in ("torch", "sgl")]
    return ["_".join(n) for n, owner in owners if not psutil.pid_exists(int(owner))]


def wait_until(check, seconds: float = 20.0) -> None:
    """Call `check` until it raises or the time is over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        check()
        time.sleep(0.05)
