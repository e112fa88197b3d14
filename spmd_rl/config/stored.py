"""Where the weights of a torch_dist checkpoint lie: in our own directories and in Megatron's."""

from __future__ import annotations

import re
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"  # Megatron's
NAME = re.compile(r"rollout_(\d{6,})")  # ours


def number(path: Path) -> int:
    """Rollouts done before the checkpoint of this name."""
    found = NAME.fullmatch(path.name)
    return int(found.group(1)) if found else -1


def complete(root: Path) -> list[Path]:
    """Directories below `root` that are named as our checkpoints, oldest first."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if number(path) >= 0), key=number)


def of_megatron(root: Path, step: int | None) -> Path | None:
    """The directory of Megatron's checkpoint `root`, or below it of `step` (None: its tracker's);
    None where `root` is none of its.
    """
    if (root / "metadata.json").is_file():
        return root
    if not (root / TRACKER).is_file():
        return None
    word = (root / TRACKER).read_text().strip() if step is None else str(step)
    return root / (f"iter_{int(word):07d}" if word.isdigit() else word)


def weights(root: str | Path, step: int | None = None) -> Path | None:
    """The torch_dist directory of `step` (None: the newest), Megatron's or ours; None where `root`
    has none.
    """
    root = Path(root)
    found = of_megatron(root, step)
    if found is None:
        wanted = [path for path in complete(root) if step in (None, number(path))]
        found = (root if (root / "model").is_dir() else wanted[-1] if wanted else root) / "model"
    return found if (found / "metadata.json").is_file() else None
