#!/usr/bin/env python3
"""Every family in every layout against transformers, with tiny random models of awkward sizes.

  python tools/check_parity.py                   # everything; 10 minutes on 2 cores
  python tools/check_parity.py --families glm4,qwen3_moe --layouts tp2_pp2,ep2_tp2_cp2
  python tools/check_parity.py --push            # into a real SGLang engine; 2 minutes
  python tools/check_parity.py --formats         # files from every layout, and back; 3 minutes

One packed step of unequal samples in real processes over gloo for each cell. fp32: the largest
difference of a logit over the largest logit, and of a gradient over its tensor's largest (at most
1e-5). bf16: the error of logits or gradients, whichever is worse, as a multiple of transformers'
own (at most 2); ~ marks cells where rounding sent a token to other experts, whose gradients are not
compared. Weights that are read and written again must keep their bits. What a family cannot have
is said with the sentence that refuses a run. Status 1 when a cell fails. Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.parity.models import LAYOUTS, MODELS  # noqa: E402

NO_ENGINE = ("moonlight",)  # on a CPU: docs/models.md
EXACT = 1e-5
COARSE = 2.0
FEW = 4  # tokens of 225 that bf16 may send to other experts where transformers' sends none
WORDS = {"logits": EXACT, "grads": EXACT, "bf16": COARSE, "bf16 grads": COARSE}


def refusal(model: Path, layout: str, layers: int) -> str | None:
    """The sentence with which a run of this model in this layout is refused."""
    from spmd_rl import architecture
    from spmd_rl import layout as places
    from spmd_rl.config import parallel
    from spmd_rl.config.load import fill
    from tools.parity.ranks import config

    alone = {"debug_train_only": True}
    cfg = config(model, megatron=LAYOUTS[layout].whole(layers), debug=alone)
    fill(cfg, "parity")
    world = LAYOUTS[layout].world
    faults = [*parallel.check(cfg, architecture.read(model)), *places.misfits(cfg, world, world)]
    return faults[0].text if faults else None


class Table:
    """Cells as they come in; printed with a row for each layout and a column for each family."""

    def __init__(self, families: list[str], layouts: list[str]):
        self.families, self.layouts = families, layouts
        self.cells: dict[tuple[str, str], dict[str, Any]] = {}
        self.refused: dict[str, list[str]] = {}

    def refuse(self, family: str, layout: str, sentence: str) -> None:
        self.cells[family, layout] = {"refused": sentence}
        self.refused.setdefault(sentence, []).append(f"{family} {layout}")

    def failures(self) -> list[str]:
        return [
            f"{family} {layout}: {fault}"
            for (family, layout), cell in self.cells.items()
            for fault in faults(cell)
        ]

    def __str__(self) -> str:
        width = max(map(len, self.layouts)) + 1
        lines = [" " * width + "".join(f"{name:^19}" for name in self.families)]
        head = f"{'logits':>7}{'grads':>6}{'bf16':>5}"
        lines.append(" " * width + "".join(f"{head:<19}" for _ in self.families))
        for layout in self.layouts:
            cells = (self._cell(family, layout) for family in self.families)
            lines.append(f"{layout:<{width}}" + "".join(f"{cell:<19}" for cell in cells).rstrip())
        return "\n".join(lines)

    def _cell(self, family: str, layout: str) -> str:
        cell = self.cells.get((family, layout), {})
        if "refused" in cell:
            return "refused".rjust(18)
        if "failed" in cell:
            return "FAILED".rjust(18)
        exact = "".join(f"{cell.get(k, float('nan')):>7.0e}"[-7:] for k in ("logits", "grads"))
        ratios = [cell[k] for k in ("bf16", "bf16 grads") if k in cell]
        mark = "!" if faults(cell) else "~" if cell.get("other experts") else ""
        return exact + (f"{max(ratios):>5.2f}" if ratios else "") + mark


def faults(cell: dict[str, Any]) -> list[str]:
    """What is wrong with a cell."""
    found = [cell["failed"]] if "failed" in cell else []
    for what, limit in WORDS.items():
        if what in cell and not cell[what] <= limit:
            found.append(f"{what} {cell[what]:.1e}, at most {limit:g} is right")
    ours, theirs = cell.get("other experts", (0, 0))
    if ours > COARSE * theirs + FEW:
        found.append(f"bf16: {ours} tokens went through other experts, {theirs} in transformers")
    if cell.get("differ"):
        names = cell["differ"]
        found.append(f"{len(names)} tensors come out otherwise than they went in: {names[:3]}")
    return found


def check(families: list[str], layouts: list[str], kinds: list[str], folder: Path) -> Table:
    """The table of families x layouts; `kinds`: float32, bfloat16."""
    from tools.parity import compare, launch
    from tools.parity.models import layers_of, make, variant

    table = Table(families, layouts)
    cells = []
    for layout in layouts:
        for family in families:
            name = variant(family, LAYOUTS[layout])
            paths = {dtype: make(folder, name, dtype) for dtype in kinds}
            sentence = refusal(next(iter(paths.values())), layout, layers_of(name))
            if sentence:
                table.refuse(family, layout, sentence)
                continue
            for dtype, path in paths.items():
                cells.append(
                    {"name": f"{family}.{layout}.{dtype}", "family": family, "model": name,
                     "path": str(path), "layout": layout, "dtype": dtype}
                )  # fmt: skip
    for world in sorted({LAYOUTS[layout].world for layout in layouts}):
        mine = [cell for cell in cells if LAYOUTS[cell["layout"]].world == world]
        failed = launch.run("tools.parity.measure", world, mine, folder)
        for cell in mine:
            found = table.cells.setdefault((cell["family"], cell["layout"]), {})
            if cell["name"] in failed:
                found["failed"] = f"{cell['dtype']}: {failed[cell['name']]}"
            else:
                found |= compare.cell(cell, world, folder)
        print(f"{len(mine)} cells on {world} ranks", file=sys.stderr, flush=True)
    return table


def push(families: list[str]) -> int:
    """The part with engines; status as main's."""
    from tools.parity import push as parity

    quieten()
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        found = parity.check(families, Path(folder))
    good = True
    print(f"{'family':12} engine - transformers, log-probs   every tensor bit for bit")
    for family, cell in found.items():
        fine = cell.get("log-probs", 1.0) <= EXACT
        good &= fine
        bits = "yes" if cell.get("bits") else "not compared"
        said = cell.get("failed")
        if not said:
            said = f"{cell['log-probs']:.1e}{'' if fine else ' FAILED':<29} {bits}"
        print(f"{family:12} {said}")
    print(json.dumps(found))
    return int(not good)


def formats(families: list[str]) -> int:
    """The part with files; status as main's."""
    from tools.parity import formats as parity

    quieten()
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        found = parity.check(families, Path(folder))
    failures = []
    print("equal bit for bit after HF -> layout -> HF and torch_dist -> HF; saved in")
    print(f"{parity.BEGUN} and gone on with elsewhere: how far a later loss is off, relatively")
    for family, cells in found.items():
        words = []
        for name, cell in cells.items():
            wrong = parity.faults(cell)
            failures += [f"{family} {name}: {fault}" for fault in wrong]
            value = f"{cell['loss']:.0e}" if "loss" in cell else "equal"
            words.append(f"{name.removeprefix('write ')} {'FAILED' if wrong else value}")
        print(f"{family:12} {'  '.join(words)}")
    for line in failures:
        print(f"FAILED {line}")
    print(f"{sum(map(len, found.values()))} cells, {len(failures)} faults")
    return int(bool(failures))


def chosen(words: str | None, known: dict[str, Any], what: str) -> list[str]:
    names = words.split(",") if words else list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"--{what}: {', '.join(unknown)} is unknown; there are {', '.join(known)}")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--layouts", help=f"of {', '.join(LAYOUTS)}")
    parser.add_argument("--push", action="store_true", help="push into a real engine instead")
    parser.add_argument("--formats", action="store_true", help="write, convert, resume instead")
    parser.add_argument("--no-bf16", action="store_true", help="fp32 only: half the time")
    parser.add_argument("--json", type=Path, help="write every number there, too")
    options = parser.parse_args()
    families = chosen(options.families, MODELS, "families")
    if options.push:
        return push([name for name in families if name not in NO_ENGINE])
    if options.formats:
        return formats(families)
    layouts = chosen(options.layouts, LAYOUTS, "layouts")
    quieten()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        kinds = ["float32"] + ([] if options.no_bf16 else ["bfloat16"])
        table = check(families, layouts, kinds, Path(folder))
    print(table)
    for sentence, where in table.refused.items():
        print(f"refused ({', '.join(where)}): {sentence}")
    failures = table.failures()
    for line in failures:
        print(f"FAILED {line}")
    done = sum("refused" not in cell for cell in table.cells.values())
    print(f"{done} cells, {len(failures)} faults, {time.monotonic() - began:.0f} s")
    found = {f"{family} {layout}": cell for (family, layout), cell in table.cells.items()}
    if options.json:
        options.json.write_text(json.dumps({"faults": failures, "cells": found}, indent=1))
    return int(bool(failures))


def quieten() -> None:
    warnings.simplefilter("ignore")
    from transformers.utils import logging as words

    words.disable_progress_bar()
    words.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
