"""A rollout's samples for eyes, from a file of `debug.save_debug_rollout_data`.

    python tools/show_rollout.py runs/X/rollouts/3.pt                    # a table in the terminal
    python tools/show_rollout.py runs/X/rollouts/3.pt --index 192        # one sample, its tokens
    python tools/show_rollout.py runs/X/rollouts/3.pt --status truncated --max-reward 0
    python tools/show_rollout.py runs/X/rollouts/3.pt --html page.html   # one page, works offline

Response tokens are coloured by the advantage (the reward less the mean of its prompt's samples),
the loss mask, the engine's log-prob, or the version of the weights that sampled them. The tokenizer
is that of --model, else of the config.yaml that lies in a folder above the file.
"""

from __future__ import annotations

import argparse
import html
import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHOWN = 64  # letters of a response in the table
KEYS = ("advantage", "loss_mask", "log_prob", "version")


def read(path: Path) -> list[dict[str, Any]]:
    """The samples of a dump. Nothing of the file is executed."""
    if path.suffix == ".pt":
        import torch

        return torch.load(path, weights_only=True)["samples"]
    return json.loads(path.read_text(encoding="utf-8"))["samples"]


def model_of(path: Path) -> str:
    """The model directory that the run's own configuration names."""
    import yaml

    for folder in path.resolve().parents:
        if (folder / "config.yaml").is_file():
            found = yaml.safe_load((folder / "config.yaml").read_text())
            return str(found["model"]["hf_checkpoint"])
    raise SystemExit(f"show_rollout: no config.yaml above {path}: name the model with --model")


def number(reward: Any, key: str | None) -> float | None:
    """The number in a reward; None where there is none, or `key` is needed to find it."""
    if isinstance(reward, dict):
        reward = reward.get(key) if key else next(iter(reward.values()), None)
    return float(reward) if isinstance(reward, (int, float)) else None


def describe(samples: list[dict[str, Any]], tokenizer: Any, key: str | None) -> list[dict]:
    """What the page and the table show of each sample."""
    rewards = [number(sample["reward"], key) for sample in samples]
    groups: dict[int, list[float]] = {}
    for sample, reward in zip(samples, rewards, strict=True):
        groups.setdefault(sample["group_index"], []).append(reward or 0.0)
    means = {group: statistics.mean(values) for group, values in groups.items()}
    shown = []
    for sample, reward in zip(samples, rewards, strict=True):
        count = sample["response_length"]
        tokens = sample["tokens"][len(sample["tokens"]) - count :]
        mask = [0] * count if sample["remove_sample"] else sample["loss_mask"] or [1] * count
        advantage = (reward or 0.0) - means[sample["group_index"]]
        shown.append(
            {
                "index": sample["index"],
                "group": sample["group_index"],
                "reward": reward,
                "status": sample["status"],
                "length": count,
                "label": sample["label"],
                "prompt": tokenizer.decode(sample["tokens"][: len(sample["tokens"]) - count]),
                "text": sample["response"],
                "tokens": [tokenizer.decode([token]) for token in tokens],
                "advantage": [advantage * on for on in mask],
                "loss_mask": mask,
                "log_prob": sample["rollout_log_probs"] or [None] * count,
                "version": sample["weight_versions"] or [None] * count,
            }
        )
    return shown


def wanted(sample: dict[str, Any], options: argparse.Namespace) -> bool:
    reward = sample["reward"]
    return (
        (options.index is None or sample["index"] == options.index)
        and (options.status is None or sample["status"] == options.status)
        and (options.min_reward is None or (reward is not None and reward >= options.min_reward))
        and (options.max_reward is None or (reward is not None and reward <= options.max_reward))
        and (options.min_length is None or sample["length"] >= options.min_length)
        and (options.max_length is None or sample["length"] <= options.max_length)
    )


def page(samples: list[dict[str, Any]], title: str) -> str:
    """One HTML file with everything in it; it asks the network for nothing."""
    template = (ROOT / "tools" / "show_rollout.html").read_text(encoding="utf-8")
    # "</" would end the script that the data stands in.
    data = json.dumps(samples, default=str).replace("</", "<\\/")
    return template.replace("{{title}}", html.escape(title)).replace("{{samples}}", data)


def show_table(samples: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("sample", "prompt", "reward", "status", "tokens", "versions", "label")
    table.add_column("response", no_wrap=True, ratio=1)
    for sample in samples:
        versions = sorted({v for v in sample["version"] if v is not None})
        text = sample["text"].replace("\n", "\\n")
        table.add_row(
            str(sample["index"]),
            str(sample["group"]),
            "-" if sample["reward"] is None else f"{sample['reward']:g}",
            sample["status"],
            str(sample["length"]),
            ",".join(map(str, versions)),
            escape(str(sample["label"])[:24]),
            escape(text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."),
        )
    Console().print(table)


def show_sample(sample: dict[str, Any]) -> None:
    """The prompt, then a line for each response token."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(Text(sample["prompt"], style="dim"))
    table = Table("token", *KEYS)
    for place, token in enumerate(sample["tokens"]):
        values = [sample[key][place] for key in KEYS]
        words = ["-" if value is None else f"{value:.4g}" for value in values]
        style = "green" if values[0] > 0 else "red" if values[0] < 0 else ""
        table.add_row(Text(repr(token)[1:-1], style=style), *words)
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", help="Hugging Face directory of the tokenizer")
    parser.add_argument("--html", type=Path, metavar="PAGE", help="write a page instead")
    parser.add_argument("--reward-key", help="entry of rewards that are objects")
    parser.add_argument("--index", type=int, help="this sample alone, token by token")
    parser.add_argument("--status", help="completed, truncated, aborted or failed")
    for name, kind in (("reward", float), ("length", int)):
        parser.add_argument(f"--min-{name}", type=kind)
        parser.add_argument(f"--max-{name}", type=kind)
    options = parser.parse_args()
    if not options.file.is_file():
        parser.error(f"{options.file} does not exist: see debug.save_debug_rollout_data")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model or model_of(options.file))
    samples = describe(read(options.file), tokenizer, options.reward_key)
    found = [sample for sample in samples if wanted(sample, options)]
    if options.html:
        options.html.write_text(page(found, str(options.file)), encoding="utf-8")
        print(f"{len(found)} of {len(samples)} samples in {options.html}")
    elif options.index is not None and found:
        show_sample(found[0])
    else:
        show_table(found)
        print(f"{len(found)} of {len(samples)} samples")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
