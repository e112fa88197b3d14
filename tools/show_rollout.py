"""A rollout's samples for eyes, from a file of `debug.save_debug_rollout_data`.

    python tools/show_rollout.py runs/X/rollouts/3.pt                    # a table in the terminal
    python tools/show_rollout.py runs/X/rollouts/3.pt --index 192        # one sample, its tokens
    python tools/show_rollout.py runs/X/rollouts/3.pt --status truncated --max-reward 0
    python tools/show_rollout.py runs/X/rollouts/3.pt --html page.html   # one page, works offline

Response tokens are coloured by the advantage, the loss mask, the engine's log-prob, how far the
trainer's is from it (gap), or the version of the weights that sampled them. Advantage and gap are
the trainer's where its own dump lies beside the file (debug.dump_details) or is named by --train;
else the advantage is the reward less the mean of its prompt's samples. The tokenizer is that of
--model, else of the config.yaml that lies in a folder above the file.
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
KEYS = ("advantage", "loss_mask", "log_prob", "gap", "version")

# the tokens of a sample -> its advantages, its log-probs or None
Trained = dict[tuple[int, ...], list[Any]]


def read(path: Path) -> dict[str, Any]:
    """A dump: its `rollout_id` and `samples`. Nothing of the file is executed."""
    if path.suffix == ".pt":
        import torch

        return torch.load(path, weights_only=True)
    return json.loads(path.read_text(encoding="utf-8"))


def trained(folder: Path, rollout: Any) -> Trained:
    """What the ranks that trained on a rollout computed, by its tokens: advantages and log-probs;
    empty where they left no files."""
    found: Trained = {}
    for path in sorted(folder.glob(f"{rollout}_*.pt")):
        columns = read(path)["rollout_data"]
        if "advantages" not in columns:
            continue
        none = [None] * len(columns["rollout_ids"])
        log_probs = columns.get("log_probs", none)
        for tokens, *values in zip(
            columns["unconcat_tokens"], columns["advantages"], log_probs, strict=True
        ):
            found[tuple(tokens.tolist())] = [None if v is None else v.tolist() for v in values]
    return found


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


def prompt_of(sample: dict[str, Any]) -> tuple[Any, int]:
    """Data sets of an evaluation count their prompts each for itself."""
    return sample["metadata"].get("data_set"), sample["group_index"]


def describe(
    samples: list[dict[str, Any]], tokenizer: Any, key: str | None, learned: Trained
) -> list[dict]:
    """What the page and the table show of each sample."""
    rewards = [number(sample["reward"], key) for sample in samples]
    groups: dict[Any, list[float]] = {}
    for sample, reward in zip(samples, rewards, strict=True):
        groups.setdefault(prompt_of(sample), []).append(reward or 0.0)
    means = {group: statistics.mean(values) for group, values in groups.items()}
    shown = []
    for sample, reward in zip(samples, rewards, strict=True):
        count = sample["response_length"]
        tokens = sample["tokens"][len(sample["tokens"]) - count :]
        mask = [0] * count if sample["remove_sample"] else sample["loss_mask"] or [1] * count
        estimate = (reward or 0.0) - means[prompt_of(sample)]
        ours = sample["rollout_log_probs"] or [None] * count
        advantages, theirs = learned.get(tuple(sample["tokens"]), (None, None))
        if advantages is None or len(advantages) != count:  # not trained on as it is
            advantages, theirs = [estimate] * count, None
        pairs = zip(ours, theirs or [None] * count, strict=True)
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
                "advantage": [value * on for value, on in zip(advantages, mask, strict=True)],
                "loss_mask": mask,
                "log_prob": ours,
                "gap": [None if None in pair else abs(pair[0] - pair[1]) for pair in pairs],
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
    parser.add_argument("--train", type=Path, metavar="DIR", help="files of save_debug_train_data")
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
    dump = read(options.file)
    folder = options.train or options.file.parent.parent / "train_data"
    learned = trained(folder, dump["rollout_id"])
    samples = describe(dump["samples"], tokenizer, options.reward_key, learned)
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
