"""What one cell of the table is: a trainer in one layout, its logits, gradients and files.

`python -m torch.distributed.run ... -m tools.parity.measure TASKS` runs cells one after another and
leaves a file for each rank and cell in the tasks' folder; `compare` reads them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spmd_rl.types import Batch
from tools.parity.models import LAYOUTS, layers_of
from tools.parity.ranks import Ranks, config, ragged_batch
from tools.parity.reference import ALGO, TEMPERATURE


def batch() -> Batch:
    return ragged_batch(siblings=False)


def main(path: str) -> None:
    """Runs the tasks of a file: [{name, model, path, layout, dtype}]."""
    tasks = json.loads(Path(path).read_text())
    with Ranks() as ranks:
        for task in tasks["cells"]:
            found = cell(ranks, task)
            aside = f"{tasks['folder']}/{ranks.rank}.partial"
            torch.save(found, aside)
            os.replace(aside, f"{tasks['folder']}/{task['name']}.{ranks.rank}.pt")


def cell(ranks: Ranks, task: dict[str, Any]) -> dict[str, Any]:
    """One step of the trainer in the layout; what this rank saw of it."""
    layout = LAYOUTS[task["layout"]]
    cfg = config(
        task["path"],
        algo=ALGO,
        rollout={"rollout_temperature": TEMPERATURE},
        megatron=layout.megatron(layers_of(task["model"])) | {"bf16": task["dtype"] == "bfloat16"},
    )
    trainer = ranks.trainer(cfg, **layout.sizes)
    differ = differing(trainer, task["path"])
    seen = Seen(trainer)
    metrics = ranks.train(trainer, batch())
    gradients = ranks.gradients(trainer)
    return {
        "logits": seen.logits,
        "gradients": gradients if ranks.rank == 0 else None,
        "differ": differ,
        "loss": metrics["train/loss"][0],
    }


def differing(trainer: Any, path: str | Path) -> list[str]:
    """Names of exported tensors that have not the bits of the files the trainer was loaded from."""
    from safetensors import safe_open

    with safe_open(Path(path) / "model.safetensors", framework="pt") as file:
        names, wrong = set(file.keys()), []
        for name, tensor in trainer.hf_tensors():
            if name not in names or not torch.equal(file.get_tensor(name).to(tensor), tensor):
                wrong.append(name)
            names.discard(name)
    return wrong + sorted(names)


class Seen:
    """Keeps the logits that a trainer's loss is made from: (rows of the batch's responses, first
    column, values).
    """

    def __init__(self, trainer: Any):
        self.logits: list[tuple[Tensor, int, Tensor]] = []
        self.trainer, self.head = trainer, trainer.actor.passes.head
        self.columns = self.head.columns
        trainer.actor.passes.head = self

    def __call__(self, logits: Tensor, piece: Any) -> Any:
        made, groups = piece.micro_batch, self.trainer.groups
        rows = self._rows()[made.response_rows]
        first = groups.tp_rank * logits.size(2)
        self.logits.append((rows, first, logits[0].detach().float().clone()))
        return self.head(logits, piece)

    def _rows(self) -> Tensor:
        """Where the shard's response tokens are in the whole batch, whose samples are numbered."""
        lengths = batch().response_lengths.tolist()
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        ids = self.trainer.data.shard.batch.rollout_ids.tolist()
        return torch.cat([torch.arange(starts[i], starts[i] + lengths[i]) for i in ids])


def joined(parts: list[dict[str, Any]], rows: int, vocabulary: int) -> Tensor:
    """The logits of all ranks as one [rows, vocabulary]; NaN where nobody had them."""
    whole = torch.full((rows, vocabulary), float("nan"))
    for part in parts:
        for places, first, values in part["logits"]:
            columns = min(vocabulary - first, values.size(1))
            whole[places, first : first + columns] = values[:, :columns]
    return whole


if __name__ == "__main__":
    main(sys.argv[1])
