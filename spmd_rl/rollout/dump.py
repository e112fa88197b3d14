"""A rollout's samples as a file, for eyes and for comparing runs (`save_debug_rollout_data`).

Comes in: finished samples; goes out: `{rollout_id, samples}` under slime's names, as torch.save
writes it when the name ends in .pt (it loads with weights_only), else as JSON.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import orjson

from spmd_rl import disk
from spmd_rl.config.schema import DebugConfig
from spmd_rl.data.rows import DataError
from spmd_rl.types import Sample


def save(path: str | None, rollout: int | str, found: list[Sample]) -> None:
    """Write the file for this rollout (`eval_3`: an evaluation): whole, or not at all. `path` None:
    nothing."""
    if path is None:
        return
    samples = [sample.to_dict() for sample in found]
    # Plain values, whatever user code put into a sample's metadata.
    data = orjson.dumps({"rollout_id": rollout, "samples": samples}, default=str, option=OPTIONS)
    target = Path(path.format(rollout_id=rollout))
    target.parent.mkdir(parents=True, exist_ok=True)
    with disk.replacing(target) as file:
        _write(file, data, target.suffix == ".pt")


def load(debug: DebugConfig, rollout: int) -> list[Sample]:
    """The samples that a run saved; nothing of the file is executed. Raises DataError."""
    assert debug.load_debug_rollout_data
    path = Path(debug.load_debug_rollout_data.format(rollout_id=rollout))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"debug.load_debug_rollout_data: {path} cannot be read ({error.strerror}): lower "
            "rollout.num_rollout, or give the files of a longer run"
        ) from error
    if path.suffix == ".pt":
        import torch

        found = torch.load(io.BytesIO(data), weights_only=True)
    else:
        found = orjson.loads(data)
    samples = [Sample.from_dict(values) for values in found["samples"]]
    share = debug.load_debug_rollout_data_subsample
    if share is None:
        return samples
    count = int(len(samples) * share)
    first = count // 2
    return samples[:first] + samples[len(samples) - (count - first) :]


OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS


def _write(file: Any, data: bytes, as_torch: bool) -> None:
    if not as_torch:
        file.write(data)
        return
    import torch  # only here: the process does without it otherwise

    torch.save(orjson.loads(data), file)
