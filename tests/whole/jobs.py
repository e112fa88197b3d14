"""Whole jobs for tests: the real program on real ranks, engines and prompts, two minutes short."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import yaml

from tests.models import tiny_model
from tests.ranks import Outcome, Running, marked, run_ranks

PROMPTS = [{"prompt": f"What is {x}+{y}?", "label": str(x + y)} for x in (1, 2, 3) for y in (4, 5)]


def program(*argv: str) -> NoReturn:
    """What launch/main.py does, in a rank of a test."""
    from spmd_rl import cli, job

    job.main(cli.parse(list(argv)))


def write_config(folder: Path, **changes: dict[str, Any]) -> Path:
    """A configuration of two short rollouts a few prompts wide; sections merged with `changes`."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    sections: dict[str, dict[str, Any]] = {
        "placement": {"device": "cpu", "colocate": True},
        "model": {"hf_checkpoint": str(tiny_model("qwen3"))},
        "data": {
            "prompt_data": str(data),
            "input_key": "prompt",
            "label_key": "label",
            "apply_chat_template": True,
            "rollout_shuffle": True,
        },
        "rollout": {
            "num_rollout": 2,
            "rollout_batch_size": 4,
            "n_samples_per_prompt": 4,
            "num_steps_per_rollout": 1,
            "rollout_max_response_len": 12,
        },
        "reward": {"custom_rm_path": "tests.whole.hooks.score"},
        "train": {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 256, "lr": 1.0e-3},
        "logging": {"run_dir": str(folder / "runs"), "name": "job"},
        "debug": {"check_weight_update_equal": True},
    }
    for name, section in changes.items():
        sections[name] = sections.get(name, {}) | section
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def run_job(folder: Path, *overrides: str, ranks: int = 2, **more) -> Outcome:
    """The job of `folder`'s configuration under the real torchrun; everything it printed."""
    argv = ("--config", str(folder / "config.yaml"), *overrides)
    return run_ranks(ranks, program, *argv, **{"launcher": "torchrun", "limit": 120.0} | more)


def succeed(folder: Path, *overrides: str, ranks: int = 2, **more) -> Path:
    """Run it to its end; the run's folder."""
    outcome = run_job(folder, *overrides, ranks=ranks, **more)
    assert outcome.statuses == [0], outcome.output
    assert outcome.left == [], outcome.left
    return folder / "runs" / "job"


def engine_part(running: Running, engine: int, part: str = "sglang::scheduler") -> int:
    """The process of that name below an engine; the log it writes to tells which engine's it is."""
    for pid, words in marked_by(running).items():
        log = Path("/proc", str(pid), "fd", "1").readlink()
        if words.startswith(part) and log.stem == f"engine{engine}":
            return pid
    raise AssertionError(f"engine {engine} has no {part}")


def marked_by(running: Running) -> dict[int, str]:
    """All processes of the job, wherever they went: number and command line."""
    environment = Path("/proc", str(running.processes[0].pid), "environ").read_text().split("\0")
    mark = next(value for value in environment if value.startswith("SPMD_RL_TEST="))
    return marked(mark.split("=", 1)[1])


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, bytes]:
    from safetensors.numpy import load_file

    return {k: v.tobytes() for k, v in load_file(run / "hf" / "model.safetensors").items()}
