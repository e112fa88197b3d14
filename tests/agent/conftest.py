"""An engine with the model that calls a tool, and configurations for it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from spmd_rl.rollout.fleet import EngineAddresses
from tests.agent.caller import QUESTION, TOOL, caller
from tests.engine import KEY, LiveEngine, another_engine, engine_config
from tests.rollout.collecting import config


@pytest.fixture(scope="package")
def calling(engine, tmp_path_factory):
    """The running engine; `.addresses`, and `.config(folder, **sections)` of a rollout with it."""
    model, folder = caller(), tmp_path_factory.mktemp("calling")
    with another_engine(engine, engine_config(model), folder) as host:
        [(_, url)] = host.wait_ready(120)

        def configured(folder, function, samples=4, **sections):
            """`samples` of one question, by the named custom function."""
            defaults = {
                "model": {"hf_checkpoint": str(model)},
                "data": {"label_key": None},
                "rollout": {
                    "rollout_batch_size": 1,
                    "n_samples_per_prompt": samples,
                    "rollout_max_response_len": 200,
                    "custom_generate_function_path": f"tests.agent.agents:{function}",
                },
                "reward": {"rm_type": "random"},
                "sglang": {"tool_call_parser": "qwen25"},
            }
            merged = {k: defaults.get(k, {}) | sections.get(k, {}) for k in defaults | sections}
            row = {"prompt": QUESTION, "tools": [TOOL]}
            return config(folder, [row], **merged)

        yield SimpleNamespace(
            engine=LiveEngine(url, model, folder, host),
            addresses=EngineAddresses([url], url, KEY),
            config=configured,
        )
