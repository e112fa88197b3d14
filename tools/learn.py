"""Which algorithms learn: each on the quickstart's task with several seeds, and one table.

    python tools/learn.py                            # all, three seeds each
    python tools/learn.py --only ppo,rloo --seeds 1
    python tools/learn.py num_rollout=30             # overrides for every run

What was measured before and after, mean and spread over the seeds, and a criterion that each seed
must meet; the exit status says whether all did. That is held-out accuracy but for r3: there it is
the largest gap between engine and trainer, of a mixture of experts whose router rounding decides,
without routing replay and with it. Runs begin with one model, which a supervised stage makes once;
the teacher of opd is what the first seed of grpo came to. Runs lie below `--folder`; those that are
there and finished are not made again (`--fresh` makes them again).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import stages  # noqa: E402

CHAT, CHAT_ROWS = "runs/data/conversations", 9_600
EXPERTS = "runs/models/tiny-experts"


class Found(NamedTuple):
    """What one seed came to."""

    before: float
    after: float
    minutes: float
    teacher: float = 0.0  # held-out accuracy of opd's


class Criterion(NamedTuple):
    """What every seed must meet."""

    words: str
    figure: Callable[[Found], float]
    least: float = -float("inf")
    most: float = float("inf")


def gain(found: Found) -> float:
    return found.after - found.before


LEARNS = Criterion("gain >= 0.3", gain, least=0.3)
IMPROVES = Criterion("gain >= 0.1", gain, least=0.1)
REACHES = Criterion("teacher - after <= 0.05", lambda it: it.teacher - it.after, most=0.05)
AGREES = Criterion("after <= 1e-5", lambda it: it.after, most=1e-5)


@dataclass(frozen=True)
class Recipe:
    """A line of the table."""

    words: list[str] = field(default_factory=list)
    config: str = "configs/quickstart.yaml"
    criterion: Criterion = LEARNS


RECIPES = {
    "grpo": Recipe(),
    "gspo": Recipe(["advantage_estimator=gspo"]),
    "cispo": Recipe(["advantage_estimator=cispo"]),
    "rloo": Recipe(["advantage_estimator=rloo"]),
    "reinforce_plus_plus": Recipe(
        ["advantage_estimator=reinforce_plus_plus", "normalize_advantages=true"]
    ),
    "ppo": Recipe(config="configs/quickstart-ppo.yaml"),
    "opd": Recipe(
        # one sample a prompt: its reward counts for nothing
        ["use_opd=true", "opd_type=megatron", "rollout_batch_size=512", "n_samples_per_prompt=1"],
        criterion=REACHES,
    ),
    "r3": Recipe(
        ["num_rollout=3", "eval_interval=null", "check_weight_update_equal=false"],
        criterion=AGREES,
    ),
    "sft_multi_turn": Recipe(
        [
            "num_rollout=15",
            f"prompt_data={CHAT}/chat.jsonl",
            "rollout_shuffle=true",
            "lr=1e-3",
            "eval_interval=10",
            f"eval_prompt_data=[chat, {CHAT}/chat-eval.jsonl]",
            "custom_rm_path=examples.arithmetic.reward.score",
            "rollout_max_response_len=48",
            "rollout_skip_special_tokens=true",
        ],
        config="configs/quickstart-sft.yaml",
        criterion=IMPROVES,
    ),
}


def find(options: argparse.Namespace, name: str, seed: int, model: str) -> Found:
    """What the runs of a seed came to, which begin with `model`."""
    if name == "r3":
        _, without = run(options, name, seed, [f"hf_checkpoint={EXPERTS}"], "-without")
        told = ["use_rollout_routing_replay=true", f"hf_checkpoint={EXPERTS}"]
        _, following = run(options, name, seed, told)
        gaps = [found["max_logprob_diff"] for found in (without, following)]
        return Found(gaps[0], gaps[1], without["minutes"] + following["minutes"])
    words, teacher = [f"hf_checkpoint={model}"], 0.0
    if name == "opd":
        folder, found = run(options, "grpo", 1, words)
        words, teacher = [*words, f"opd_teacher_load={folder}/hf"], found["eval_after"]
    _, found = run(options, name, seed, words)
    return Found(found["eval_before"], found["eval_after"], found["minutes"], teacher)


def run(
    options: argparse.Namespace, name: str, seed: int, words: list[str], which: str = ""
) -> tuple[Path, dict[str, Any]]:
    """A finished run's folder and summary."""
    recipe = RECIPES[name]
    words = [*words, f"seed={seed}", f"rollout_seed={seed}", *recipe.words, *options.overrides]
    folder = stages.run(
        options.folder, f"{name}-{seed}{which}", recipe.config, words, options.ranks
    )
    return folder, json.loads((folder / "summary.json").read_text())


def make_inputs(options: argparse.Namespace, names: list[str]) -> str:
    """Data and models; the directory of the one that runs begin with."""
    stages.make_inputs()
    if "sft_multi_turn" in names:
        stages.make("make_arithmetic.py", CHAT, f"--chat-rows={CHAT_ROWS}")
    if "r3" in names:
        from tools.make_tiny_model import make_tiny_model

        # 3 of them serve a token: of one pair, rounding says which
        pairs: dict[str, Any] = {"experts": 16, "num_experts_per_tok": 3, "twins": True}
        make_tiny_model(ROOT / EXPERTS, "qwen3_moe", tied=False, perturb=0.1, **pairs)
    return options.model or stages.supervised_model(options.folder, options.ranks)


def spread(values: list[float]) -> str:
    """Mean and, for several values, their least and largest."""
    mean = shown(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ({shown(min(values))}-{shown(max(values))})"


def shown(value: float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3f}"


def row(name: str, found: list[Found], criterion: Criterion) -> tuple[list[str], bool]:
    """A line of the table, and whether every seed meets the criterion."""
    figures = [criterion.figure(one) for one in found]
    worst = min(figures) if criterion.most == float("inf") else max(figures)
    holds = criterion.least <= worst <= criterion.most
    words = [name, str(len(found)), spread([one.before for one in found])]
    words += [spread([one.after for one in found]), criterion.words, shown(worst)]
    words += [f"{statistics.mean(one.minutes for one in found):.1f}", "yes" if holds else "NO"]
    return words, holds


def main() -> int:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(RECIPES), help="names, separated by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--model", help="Hugging Face folder; default: the supervised stage's")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "learn")
    parser.add_argument("--fresh", action="store_true", help="make finished runs again")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := set(names) - set(RECIPES):
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(RECIPES)}")
    options.folder = options.folder.resolve()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in ["sft", *names] if options.fresh else ():
        for made in (options.folder / name, *options.folder.glob(f"{name}-[0-9]*")):
            shutil.rmtree(made, ignore_errors=True)
    model, began = make_inputs(options, names), time.monotonic()

    table = Table("algorithm", "seeds", "before", "after", "criterion", "worst", "minutes", "holds")
    all_hold = True
    for name in names:
        found = []
        for seed in range(1, options.seeds + 1):
            now = find(options, name, seed, model)
            found.append(now)
            print(
                f"learn: {name}, seed {seed}: {now.before:.6g} -> {now.after:.6g} "
                f"in {now.minutes:.2f} min",
                flush=True,
            )
        words, holds = row(name, found, RECIPES[name].criterion)
        table.add_row(*words)
        all_hold &= holds
    Console(width=120).print(table)
    print(f"learn: {len(names)} algorithms in {(time.monotonic() - began) / 60:.0f} min")
    return 0 if all_hold else 1


if __name__ == "__main__":
    sys.exit(main())
