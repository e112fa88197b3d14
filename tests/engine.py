"""Real CPU engines for tests: a configuration, a host, and requests with the key."""

from __future__ import annotations

import itertools
import json
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from spmd_rl.config import Config
from spmd_rl.rollout.admin import EngineAdmin
from spmd_rl.rollout.engines import EngineHost
from spmd_rl.types import EngineSpec

KEY = "key-of-the-tests"


def engine_config(model: Path | str, **sections: Any) -> Config:
    values: dict[str, Any] = {
        "placement": {"device": "cpu"},
        "model": {"hf_checkpoint": str(model)},
        "rollout": {"rollout_batch_size": 4},
        "sglang": {"max_total_tokens": 16384},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return Config.model_validate(values)


def engine_host(cfg: Config, run_dir: Path, width: int = 1) -> EngineHost:
    """One engine of the given tensor-parallel size."""
    specs = [EngineSpec(0, tuple(range(width)), 0, 0)]
    return EngineHost(cfg, specs, run_dir, SimpleNamespace(host="127.0.0.1"), KEY)


@contextmanager
def another_engine(
    engine: LiveEngine,
    cfg: Config,
    run_dir: Path,
    width: int = 1,
    teacher: bool = False,
    **more: Any,
):
    """An engine forked from the process the session's engine came from: no imports to wait for."""
    host = EngineHost(
        cfg,
        [EngineSpec(next(_indices), tuple(range(width)), 0, 0, teacher)],
        run_dir,
        SimpleNamespace(host="127.0.0.1"),
        KEY,
        **more,
    )
    host.launcher = engine.host.launcher
    host.launch()
    try:
        yield host
    finally:
        host.monitor.close()
        for index in host.engines:
            host.launcher.stop(index)


_indices = itertools.count(1)


@dataclass
class LiveEngine:
    """A running engine and the model it was started from."""

    url: str
    model: Path
    run_dir: Path
    host: EngineHost

    @property
    def admin(self) -> EngineAdmin:
        return EngineAdmin(self.url, KEY)

    def generate(self, input_ids: list, sampling: dict[str, Any], **more: Any) -> Any:
        return post(
            self.url,
            "/generate",
            {"input_ids": input_ids, "sampling_params": sampling, "return_logprob": True} | more,
        )


def post(url: str, path: str, body: dict[str, Any], key: str | None = KEY) -> Any:
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.loads(reply.read())


def log_probs(reply: dict[str, Any]) -> list[float]:
    return [entry[0] for entry in reply["meta_info"]["output_token_logprobs"]]


def hf_log_probs(
    model: Path | str, prompts: list[list[int]], outputs: list[list[int]]
) -> list[list[float]]:
    """The same tokens' log-probabilities by transformers, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    results = []
    with torch.no_grad():
        for prompt, output in zip(prompts, outputs, strict=True):
            logits = net(torch.tensor([prompt + output])).logits[0].float()
            table = torch.log_softmax(logits, -1)
            first = len(prompt)
            results.append([table[first + i - 1, t].item() for i, t in enumerate(output)])
    return results
