"""A rollout's samples as a file, for eyes and for comparing runs (`save_debug_rollout_data`).

Comes in: finished groups; goes out: `{rollout_id, samples}` under slime's names, as torch.save
writes it when the name ends in .pt (it loads with weights_only), else as JSON.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from spmd_rl import disk
from spmd_rl.types import Group


def save(path: str | None, rollout: int, groups: list[Group]) -> None:
    """Write the file for this rollout: whole, or not at all. `path` None: nothing."""
    if path is None:
        return
    samples = [sample.to_dict() for group in groups for sample in group]
    # Plain values, whatever user code put into a sample's metadata.
    data = orjson.dumps({"rollout_id": rollout, "samples": samples}, default=str, option=OPTIONS)
    target = Path(path.format(rollout_id=rollout))
    target.parent.mkdir(parents=True, exist_ok=True)
    with disk.replacing(target) as file:
        _write(file, data, target.suffix == ".pt")


OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS


def _write(file: Any, data: bytes, as_torch: bool) -> None:
    if not as_torch:
        file.write(data)
        return
    import torch  # only here: the process does without it otherwise

    torch.save(orjson.loads(data), file)
