"""What is written is what was read: Hugging Face and torch_dist from every layout, bit for bit, and
a checkpoint that goes on in other layouts.

`check` is the whole; `python -m torch.distributed.run ... -m tools.parity.formats TASKS` are its
ranks. Cells of the kind `write` leave names of tensors whose bits changed, `begin` trains a step
and saves, `go on` loads that in its own layout; both of the latter leave the loss after another
step: weights, moments and schedule must be right for it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tools.parity import launch
from tools.parity.models import LAYOUTS, MODELS, layers_of, make, variant
from tools.parity.ranks import Ranks, config, ragged_batch

WRITTEN = {  # layouts that write; of a mixture of experts the last is another
    False: ("tp2", "pp2_vpp2", "tp2_pp2", "pp2_cp2"),
    True: ("tp2", "pp2_vpp2", "tp2_pp2", "ep2_pp2"),
}
BEGUN = "tp2_pp2"
GONE_ON = ("dp2", "pp2", "ep2")
TRAIN = {"lr": 1e-2, "clip_grad": 1.0}
EXACT = 1e-5


def experts(family: str) -> bool:
    return "experts" in MODELS[family] or MODELS[family].get("like", family) == "deepseek_v3"


def check(families: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """family -> cell name -> what changed (a list of names, or a relative difference of losses)."""
    cells = []
    for family in families:
        moe = experts(family)
        kinds = [("write", name) for name in WRITTEN[moe]] + [("begin", BEGUN)]
        kinds += [("go on", name) for name in GONE_ON if moe or name != "ep2"]
        for kind, layout in kinds:
            name = variant(family, LAYOUTS[layout])
            cells.append(
                {"name": f"{family}.{kind}.{layout}", "family": family, "kind": kind,
                 "model": name, "path": str(make(folder, name)), "layout": layout}
            )  # fmt: skip
    failed: dict[str, str] = {}
    for world in (4, 2):  # those that begin, before those that go on
        mine = [cell for cell in cells if LAYOUTS[cell["layout"]].world == world]
        failed |= launch.run("tools.parity.formats", world, mine, folder)
    found: dict[str, dict[str, Any]] = {family: {} for family in families}
    for cell in cells:
        file = folder / f"{cell['name']}.0.pt"
        value = {"failed": failed[cell["name"]]} if cell["name"] in failed else torch.load(file)
        found[cell["family"]][f"{cell['kind']} {cell['layout']}"] = value
    for family in families:
        _compare_losses(found[family])
    return found


def _compare_losses(cells: dict[str, Any]) -> None:
    begun = cells.pop(f"begin {BEGUN}")
    for name, cell in cells.items():
        if name.startswith("go on") and "failed" not in cell:
            if "failed" in begun:
                cells[name] = begun
            else:
                cell["loss"] = abs(cell["loss"] - begun["loss"]) / abs(begun["loss"])


def faults(cell: dict[str, Any]) -> list[str]:
    """What is wrong with a cell of `check`."""
    found = [cell["failed"]] if "failed" in cell else []
    for kind in ("Hugging Face", "torch_dist"):
        if cell.get(kind):
            found.append(f"{kind}: {len(cell[kind])} tensors differ: {cell[kind][:3]}")
    if "loss" in cell and not cell["loss"] <= EXACT:
        found.append(f"a later loss is {cell['loss']:.1e} off")
    return found


def main(path: str) -> None:
    tasks = json.loads(Path(path).read_text())
    folder = Path(tasks["folder"])
    with Ranks() as ranks:
        for task in tasks["cells"]:
            found = KINDS[task["kind"]](ranks, task, folder)
            dist.barrier()
            aside = folder / f"{ranks.rank}.partial"
            torch.save(found, aside)
            os.replace(aside, folder / f"{task['name']}.{ranks.rank}.pt")


def trainer_of(ranks: Ranks, task: dict[str, Any]) -> Any:
    layout = LAYOUTS[task["layout"]]
    megatron = layout.megatron(layers_of(task["model"]))
    del megatron["use_distributed_optimizer"]  # the default: state is dealt out over ranks
    cfg = config(task["path"], megatron=megatron, train=TRAIN, algo={"loss_type": "sft_loss"})
    return ranks.trainer(cfg, **layout.sizes)


def write(ranks: Ranks, task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Names of tensors that changed on the way through each format."""
    from tools.convert_torch_dist_to_hf import convert

    trainer, out = trainer_of(ranks, task), folder / f"{task['name']}.out"
    trainer.save_hf(out / "hf")
    save(trainer, out / "torch_dist")
    if ranks.rank:
        return {}
    convert(out / "torch_dist", out / "back", Path(task["path"]))
    return {
        "Hugging Face": differing(out / "hf", task["path"]),
        "torch_dist": differing(out / "back", task["path"]),
    }


def differing(path: Path, source: str) -> list[str]:
    from safetensors.torch import load_file

    ours, theirs = load_file(path / "model.safetensors"), load_file(f"{source}/model.safetensors")
    odd = ours.keys() ^ theirs.keys()
    return sorted(odd | {n for n in ours.keys() & theirs.keys() if not ours[n].equal(theirs[n])})


def begin(ranks: Ranks, task: dict[str, Any], folder: Path) -> dict[str, Any]:
    trainer = trainer_of(ranks, task)
    step(ranks, trainer, 0)
    save(trainer, folder / f"{task['family']}.begun")
    return {"loss": later(ranks, trainer)}


def go_on(ranks: Ranks, task: dict[str, Any], folder: Path) -> dict[str, Any]:
    trainer = trainer_of(ranks, task)
    trainer.load_checkpoint(folder / f"{task['family']}.begun")
    return {"loss": later(ranks, trainer)}


def later(ranks: Ranks, trainer: Any) -> float:
    step(ranks, trainer, 1)
    return step(ranks, trainer, 2)


def step(ranks: Ranks, trainer: Any, number: int) -> float:
    batch = ragged_batch(seed=number, siblings=False)
    return ranks.train(trainer, batch, number)["train/loss"][0]


def save(trainer: Any, path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    trainer.begin_save(path)
    failure = trainer.finish_save().get("failure")
    if failure:
        raise OSError(failure)
    dist.barrier()


KINDS = {"write": write, "begin": begin, "go on": go_on}

if __name__ == "__main__":
    main(sys.argv[1])
