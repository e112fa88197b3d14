"""Weights of a real trainer pushed into a real SGLang engine on the CPU: its log-probs are
transformers'.

`check` starts one engine for each family, with other weights; a rank of its own builds a trainer
and pushes. `python -m ... tools.parity.push TASKS` is that rank.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import Request, urlopen

from spmd_rl import architecture
from spmd_rl.config.schema import Config
from spmd_rl.rollout.admin import EngineAdmin
from spmd_rl.rollout.engines import EngineHost
from spmd_rl.types import EngineSpec, Placement
from spmd_rl.weights import equal
from tools.parity import launch, reference
from tools.parity.models import make
from tools.parity.ranks import config

KEY = "key-of-the-parity-check"
PROMPTS = [[5, 6, 7], [8, 9], list(range(20, 57)), [11]]
NEW_TOKENS = 16


def check(families: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """By family: the largest difference of a log-prob, and what failed."""
    found: dict[str, dict[str, Any]] = {}
    host: EngineHost | None = None
    try:
        for index, family in enumerate(families):
            before, after = (make(folder / f"seed{seed}", family, seed=seed) for seed in (0, 1))
            cell = {"name": f"push-{family}", "path": str(after), "index": index}
            with _engine(_config(before), index, folder, host) as engine:
                host = engine
                [(_, cell["url"])] = engine.wait_ready()
                failed = launch.run("tools.parity.push", 1, [cell], folder)
                if failed:
                    found[family] = {"failed": failed[cell["name"]]}
                else:
                    off = _difference(cell["url"], after)
                    found[family] = {"log-probs": off, "bits": known(after)}
    finally:
        if host is not None:
            host.stop()
    return found


@contextmanager
def _engine(
    cfg: Config, index: int, folder: Path, first: EngineHost | None
) -> Iterator[EngineHost]:
    """An engine; all are forked from one process, which imports everything once."""
    spec = EngineSpec(index, (0,), 0, 0)
    host = EngineHost(cfg, [spec], folder, SimpleNamespace(host="127.0.0.1"), KEY)
    if first is not None:
        host.launcher = first.launcher
    host.launch()
    try:
        yield host
    finally:
        host.monitor.close()
        host.launcher.stop(index)


def known(model: Path | str) -> bool:
    """Whether the engine's layout of the model is known tensor by tensor."""
    return architecture.read(model).family in equal.FAMILIES


def _config(model: Path | str) -> Config:
    return config(
        model,
        sglang={"max_total_tokens": 16384},
        debug={"check_weight_update_equal": known(model)},
    )


def _difference(url: str, model: Path) -> float:
    """Between the engine's log-probs of what it generates and transformers' of the same."""
    EngineAdmin(url, KEY).resume()
    body = {
        "input_ids": PROMPTS,
        "sampling_params": {"max_new_tokens": NEW_TOKENS, "ignore_eos": True},
        "return_logprob": True,
    }
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    request = Request(f"{url}/generate", json.dumps(body).encode(), headers)
    with urlopen(request, timeout=120) as reply:
        replies = json.loads(reply.read())
    outputs = [reply["output_ids"] for reply in replies]
    expected = reference.log_probs(model, PROMPTS, outputs)
    return max(
        abs(entry[0] - want.item())
        for reply, row in zip(replies, expected, strict=True)
        for entry, want in zip(reply["meta_info"]["output_token_logprobs"], row, strict=True)
    )


def main(path: str) -> None:
    """The rank that pushes."""
    import torch

    from spmd_rl import control
    from spmd_rl.trainer.actor import Trainer
    from spmd_rl.weights.push import Pusher

    tasks = json.loads(Path(path).read_text())
    [task] = tasks["cells"]
    job = control.join()
    place = Placement(1, 1, (0,), (0,), (EngineSpec(0, (0,), 0, 0),), True)
    job.train_group(place.train_ranks)
    cfg = _config(task["path"])
    trainer = Trainer(cfg, place, 0, 1)
    _, failed = Pusher(cfg, place, job, [task["url"]], KEY).push(trainer, 1)
    if failed:
        raise RuntimeError(f"push failed: {failed}")
    torch.save({}, Path(tasks["folder"]) / f"{task['name']}.0.pt")
    job.leave()


if __name__ == "__main__":
    main(sys.argv[1])
