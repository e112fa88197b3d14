"""Kill processes of runs at random moments; each run must end as if nothing had happened.

    python tools/chaos.py --rounds 20 --seed 1

Each round starts the same short run under `torchrun --max-restarts`, kills one process with SIGKILL
(a trainer rank, the controller, an engine, the router, the collector, the torchrun agent) and
does what a scheduler does: it starts the same command again when that has failed. In one round of
four the moment is any of the whole run, in the others any after the loop has begun, since most of a
run as short as this is its start. A round passes
when the weights, the sampled tokens and the metrics are those of the undisturbed run, bit for bit,
and nothing of the job is left on the machine. Everything is written below `--folder`.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compare_runs import compare, outcome
from stages import ROOT, make_inputs, supervised_model
from watched import KINDS, Run

LIVES_ON = ("engine", "router")  # the loop goes on in the same process
RESTARTS = 2  # by torchrun, of all ranks
TURNS = 4  # by the scheduler, of the command
LIMIT = 240.0  # seconds for one run
OVERRIDES = [
    *("num_rollout=6", "rollout_batch_size=16", "n_samples_per_prompt=4"),
    *("rollout_max_response_len=32", "eval_interval=3", "save_interval=1"),
    *("use_fault_tolerance=true", "heartbeat_timeout=6"),
    *("lr=1e-3", "lr_decay_style=constant", "lr_warmup_fraction=0"),
]


@dataclass
class Round:
    """One run and what was done to it."""

    victim: str = ""
    phase: str = ""  # what the loop was in when it was hit
    recovered: float | None = None  # seconds until the loop went on
    restarts: int = 0  # of the loop
    turns: int = 1  # of the command
    seconds: float = 0.0
    loop: float = 0.0  # of these seconds, those since the loop began
    differs: list[str] = field(default_factory=list)


def play(
    options: argparse.Namespace,
    name: str,
    victim: str = "",
    moment: float = 0.0,
    in_loop: bool = False,
) -> Round:
    """One run from start to end; `victim` is killed `moment` seconds after the start, or with
    `in_loop` after the loop's, or as soon after that as there is one.
    """
    rng = random.Random(f"{options.seed} {name}")
    folder = options.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    words = ["--config", options.config, *OVERRIDES, f"hf_checkpoint={options.model}"]
    words += [f"save_debug_rollout_data={folder}/run/rollouts/{{rollout_id}}.pt"]
    run = Run(folder, [*words, *options.overrides], options.ranks, RESTARTS)
    result, killed_at, before = Round(victim), 0.0, {}
    run.start()
    started, looping = time.time(), 0.0
    loops: set[int] = set()
    while run.process.poll() is None or run.process.returncode != 0:
        now, status = time.time(), run.status()
        if now - started > LIMIT:
            run.kill_all()
            result.differs.append(f"no end within {LIMIT:.0f} s")
            return result
        if status["pid"]:
            loops.add(status["pid"])
        if status["rollout"] is not None:
            looping = looping or now
        since = looping if in_loop else started
        if victim and not killed_at and since and now - since >= moment:
            before = status
            if run.kill(victim, rng):
                killed_at, result.phase = now, phase_of(before)
        elif killed_at and result.recovered is None and status["at"] > killed_at:
            if victim in LIVES_ON or status["pid"] != before["pid"]:
                result.recovered = status["at"] - killed_at
        if run.process.poll() is not None and run.process.returncode != 0:
            result.differs += [f"left running: {line}" for line in run.left(wait=10.0)]
            if run.turns == TURNS:
                result.differs.append(f"failed {TURNS} times; see {folder}/log")
                return result
            run.start()
        time.sleep(0.03)
    result.differs += [f"left running: {line}" for line in run.left()]
    result.seconds, result.turns = time.time() - started, run.turns
    result.loop = time.time() - looping
    result.restarts = len(loops) - 1
    return result


def phase_of(status: dict[str, Any]) -> str:
    return (
        status["phase"] if status["rollout"] is None else f"{status['phase']} {status['rollout']}"
    )


def rounds(options: argparse.Namespace) -> int:
    """All rounds and their table; the exit status."""
    from rich.console import Console
    from rich.table import Table

    rng = random.Random(options.seed)
    undisturbed = play(options, "undisturbed")
    if undisturbed.differs:
        print(f"chaos: the undisturbed run failed: {undisturbed.differs}", file=sys.stderr)
        return 2
    expected = outcome(options.folder / "undisturbed" / "run")
    whole, loop = undisturbed.seconds, undisturbed.loop
    print(
        f"chaos: undisturbed: {whole:.1f} s, of these {loop:.1f} s in the loop; "
        f"{len(expected)} things to compare",
        flush=True,
    )
    victims = [KINDS[i % len(KINDS)] for i in range(options.rounds)]
    rng.shuffle(victims)
    table = Table("round", "killed", "in", "back after", "restarts", "turns", "whole run", "equal")
    passed = 0
    for number, victim in enumerate(victims, 1):
        in_loop = number % 4 != 0
        moment = rng.uniform(0.0, (loop if in_loop else whole) * 0.95)
        result = play(options, f"round{number:02d}", victim, moment, in_loop)
        result.differs += compare(outcome(options.folder / f"round{number:02d}" / "run"), expected)
        passed += not result.differs
        back = "-" if result.recovered is None else f"{result.recovered:.1f} s"
        row = [str(number), victim, result.phase or "(over)", back, str(result.restarts)]
        row += [str(result.turns), f"{result.seconds:.1f} s", "NO" if result.differs else "yes"]
        table.add_row(*row)
        print(f"chaos: round {' | '.join(row)}", *result.differs[:6], sep="\n  ", flush=True)
        if not result.differs:
            shutil.rmtree(options.folder / f"round{number:02d}")
    Console(width=100).print(table)
    print(f"{passed}/{options.rounds} bitwise equal to the undisturbed run")
    return 0 if passed == options.rounds else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(chr(10))[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--model", help="Hugging Face folder; default: a short SFT makes one")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "chaos")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    options.folder.mkdir(parents=True, exist_ok=True)
    make_inputs()
    options.model = options.model or supervised_model(options.folder, options.ranks)
    return rounds(options)


if __name__ == "__main__":
    sys.exit(main())
