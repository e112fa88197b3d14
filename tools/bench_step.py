#!/usr/bin/env python3
"""Whole-step throughput (generate, train, push weights) against TRL's GRPOTrainer on a CPU.

Same 3.7M-parameter model file, prompts, group size, number of completions and response lengths;
each side as it is fastest on the cores: spmd_rl with a rank and an engine per core, TRL with a
thread per core. Rounds alternate (ours, TRL, ours, ...); a side's number is the median of its
steps. Out: a table, a JSON line, and status 1 when a goal is missed. TRL gets an environment of its
own, made in ~/.cache/spmd_rl/bench. `generate` and `reward` below are the hooks of our side's run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path.home() / ".cache" / "spmd_rl" / "bench"
TRL_PACKAGES = ("trl==1.16.0", "transformers==5.19.0")
LENGTHS = "SPMD_RL_BENCH_LENGTHS"  # names the file our hooks read
GOALS = {"equal": 1.0, "tail": 1.5}
GROUP = 8
MEAN = 32  # response tokens
SPREAD = 0.65  # sigma of the log-normal lengths: longest / mean is 4.6
PHASES = ("perf/collect_time", "perf/train_time", "perf/update_weights_time")
WARM_UP = 2  # steps not counted


async def generate(args: Any, sample: Any, sampling_params: dict[str, Any]) -> Any:
    """custom_generate_function_path: exactly the tokens the schedule gives this sample."""
    from spmd_rl.rollout.generate import generate as one_turn

    lengths = _schedule()
    length = lengths[sample.index % len(lengths)]
    return await one_turn(
        args, sample, sampling_params | {"max_new_tokens": length, "ignore_eos": True}
    )


def reward(args: Any, sample: Any, **_: Any) -> float:
    """custom_rm_path: something that varies and costs nothing."""
    return len(set(sample.response)) / max(len(sample.response), 1)


def _schedule(cache: dict[str, list[int]] = {}) -> list[int]:  # noqa: B006
    if not cache:
        cache["lengths"] = json.loads(Path(os.environ[LENGTHS]).read_text())
    return cache["lengths"]


def response_lengths(mode: str, samples: int) -> list[int]:
    """Response tokens of each sample of a step, in the order of the samples."""
    if mode == "equal":
        return [MEAN] * samples
    normal = statistics.NormalDist()
    scale = MEAN / math.exp(SPREAD**2 / 2)
    lengths = [
        round(scale * math.exp(SPREAD * normal.inv_cdf((i + 0.5) / samples)))
        for i in range(samples)
    ]
    random.Random(0).shuffle(lengths)
    return lengths


def prepare(directory: Path, samples: int) -> tuple[Path, list[str]]:
    """The model both sides load and the prompts (24 tokens each: digits are single tokens)."""
    from tools.make_tiny_model import make_tiny_model

    rng = random.Random(0)
    corpus = directory / "corpus.txt"
    words = ["".join(rng.choices("abcdefghij", k=6)) for _ in range(4000)]
    corpus.write_text("\n".join(" ".join(words[k : k + 10]) for k in range(0, 4000, 10)))
    model = make_tiny_model(
        directory / "model",
        "qwen2",
        hidden=256,
        layers=4,
        heads=4,
        kv_heads=4,
        ffn=704,
        vocab=2052,
        positions=512,
        corpus=corpus,
    )
    prompts = ["".join(rng.choices("0123456789", k=24)) for _ in range(4 * samples)]
    rows = "".join(json.dumps({"prompt": text}) + "\n" for text in prompts)
    (directory / "prompts.jsonl").write_text(rows)
    return model, prompts


def ours(directory: Path, model: Path, lengths: list[int], steps: int, ranks: int) -> list[dict]:
    """The lines of metrics.jsonl of one run, warm-up included."""
    uneven = len(set(lengths)) > 1
    schedule = directory / "lengths.json"
    schedule.write_text(json.dumps(lengths))
    config = {
        "placement": {"device": "cpu", "colocate": True},
        "model": {"hf_checkpoint": str(model)},
        "data": {"prompt_data": str(directory / "prompts.jsonl"), "input_key": "prompt"},
        "rollout": {
            "num_rollout": steps + WARM_UP,
            "rollout_batch_size": len(lengths) // GROUP,
            "n_samples_per_prompt": GROUP,
            "num_steps_per_rollout": 1,
            "rollout_max_response_len": max(lengths),
        }
        | ({"custom_generate_function_path": "tools.bench_step.generate"} if uneven else {}),
        "reward": {"custom_rm_path": "tools.bench_step.reward"},
        "algo": {"advantage_estimator": "grpo", "calculate_per_token_loss": True},
        "train": {
            "use_dynamic_batch_size": True,
            "max_tokens_per_gpu": 4096,
            "balance_data": True,
            "lr": 1e-5,
        },
        "checkpoint": {"save_hf": False},
        "logging": {"name": "bench", "run_dir": str(directory / "runs"), "progress": "plain"},
        # What a request does not say: with one length for all, nothing ends a response earlier.
        "sglang": {"preferred_sampling_params": json.dumps({"ignore_eos": True})},
    }
    path = directory / "bench.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    log = directory / "ours.log"
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    argv += [str(ROOT / "launch" / "main.py"), "--config", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", LENGTHS: str(schedule)}
    with log.open("w") as file:
        done = subprocess.run(argv, cwd=ROOT, env=environment, stdout=file, stderr=file)
    if done.returncode:
        raise SystemExit(f"bench: our run failed:\n{log.read_text()[-3000:]}")
    lines = (directory / "runs" / "bench" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    (directory / "runs").rename(directory / f"runs-{len(list(directory.glob('runs-*')))}")
    return [row for row in rows if "perf/step_time" in row]


def theirs(directory: Path, work: dict[str, Any], threads: int) -> dict[str, Any]:
    """What one run of TRL reports."""
    path = directory / "trl.json"
    path.write_text(json.dumps(work | {"threads": threads, "output": str(directory / "trl")}))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(trl_python()), str(ROOT / "tools" / "bench_step_trl.py"), str(path)],
        env=environment,
        cwd=directory,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"bench: TRL failed:\n{done.stderr[-3000:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    answer["seconds"] = answer["seconds"][WARM_UP - 1 :]
    return answer


def fastest_threads(directory: Path, work: dict[str, Any], cores: int) -> int:
    """How many threads TRL does best with: busy neighbours make more threads slower."""
    short = work | {"steps": 1 + WARM_UP}
    times = {n: min(theirs(directory, short, n)["seconds"]) for n in sorted({1, 2, cores})}
    print("bench: TRL seconds a step by threads:", {n: round(s, 2) for n, s in times.items()})
    return min(times, key=lambda n: times[n])


def trl_python() -> Path:
    """The interpreter of TRL's environment, made on first use (torch first: the CPU build)."""
    environment = CACHE / "trl"
    python, stamp = environment / "bin" / "python", environment / ".ready"
    if not stamp.exists():
        print(f"bench: installing TRL into {environment}", flush=True)
        CACHE.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        torch = (ROOT / "tools" / "pins" / "torch.txt").read_text().strip()
        index = os.environ.get("TORCH_INDEX_URL")
        subprocess.run(pip + (["--index-url", index] if index else []) + [torch], check=True)
        subprocess.run([*pip, *TRL_PACKAGES], check=True)
        stamp.touch()
    return python


def compare(mode: str, options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Tokens per second of both sides for one distribution of lengths."""
    lengths = response_lengths(mode, options.samples)
    model, prompts = prepare(directory, options.samples)
    work = {
        "model": str(model),
        "prompts": prompts,
        "lengths": lengths,
        "group": GROUP,
        "rows": options.trl_rows,
        "steps": options.steps + WARM_UP,
    }
    threads = options.trl_threads or fastest_threads(directory, work, options.cores)
    phases: list[dict] = []
    mine: list[float] = []
    other: list[float] = []
    for _ in range(options.rounds):
        if not options.only_trl:
            rows = ours(directory, model, lengths, options.steps, options.cores)
            stamps = [row["time"] for row in rows[WARM_UP - 1 :]]  # all that a step takes
            mine += [b - a for a, b in zip(stamps, stamps[1:], strict=False)]
            phases = [{k: v for k, v in row.items() if k in PHASES} for row in rows[WARM_UP:]]
        answer = theirs(directory, work, threads)
        assert set(answer["tokens"]) == {sum(lengths)}, answer["tokens"]
        other += answer["seconds"]
    result: dict[str, Any] = {
        "mode": mode,
        "tokens": sum(lengths),
        "longest_over_mean": max(lengths) / (sum(lengths) / len(lengths)),
        "trl": answer["version"],
        "trl_threads": threads,
        "trl_step": statistics.median(other),
        "trl_spread": [min(other), max(other)],
        "trl_generate": statistics.median(answer["generate"]),
    }
    if mine:
        result |= {
            "step": statistics.median(mine),
            "spread": [min(mine), max(mine)],
            "phases": {k: statistics.median(row[k] for row in phases) for k in phases[0]},
            "ratio": statistics.median(other) / statistics.median(mine),
            "goal": GOALS[mode],
        }
    return result


def table(results: list[dict[str, Any]]) -> str:
    head = f"{'lengths':8} {'max/mean':>8} {'side':8} {'step s':>8} {'min..max':>14} {'tok/s':>8}"
    lines = [head]
    for r in results:
        for side, step, spread in (
            ("spmd_rl", "step", "spread"),
            ("trl " + r["trl"][:4], "trl_step", "trl_spread"),
        ):
            if step in r:
                low, high = r[spread]
                lines.append(
                    f"{r['mode']:8} {r['longest_over_mean']:8.2f} {side:8} {r[step]:8.3f} "
                    f"{low:6.2f}..{high:6.2f} {r['tokens'] / r[step]:8.0f}"
                )
        if "ratio" in r:
            lines.append(f"{r['mode']:8} ratio {r['ratio']:.2f} (goal {r['goal']})")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mode", choices=("equal", "tail", "both"), default="both")
    parser.add_argument("--samples", type=int, default=128, help="completions of a step")
    parser.add_argument("--steps", type=int, default=6, help="measured steps of a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cores", type=int, default=4, help="our ranks; most threads of TRL")
    parser.add_argument("--trl-threads", type=int, help="default: the fastest of 1, 2 and cores")
    parser.add_argument("--trl-rows", type=int, default=32, help="TRL's micro-batch")
    parser.add_argument("--only-trl", action="store_true", help="measure TRL alone")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    results = []
    for mode in ("equal", "tail") if options.mode == "both" else (options.mode,):
        with tempfile.TemporaryDirectory(prefix="bench-step-") as directory:
            results.append(compare(mode, options, Path(directory)))
        print(table(results[-1:]), flush=True)
    ratios = {r["mode"]: r.get("ratio") for r in results}
    print(json.dumps({"ratio": ratios, "results": results}))
    return int(any(r.get("ratio", r.get("goal", 0)) < r.get("goal", 0) for r in results))


if __name__ == "__main__":
    sys.exit(main())
