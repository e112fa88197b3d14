"""A whole job whose samples are made by agents on the official clients."""

from __future__ import annotations

import json

from tests.agent.caller import QUESTION, TOOL, caller
from tests.whole.jobs import metrics, succeed, write_config


def test_agents_through_the_gateway_are_trained_on(tmp_path):
    write_config(
        tmp_path,
        model={"hf_checkpoint": str(caller())},
        data={"apply_chat_template": False, "label_key": None},
        rollout={
            "num_rollout": 1,
            "rollout_batch_size": 2,
            "rollout_max_response_len": 200,
            "custom_generate_function_path": "tests.agent.agents:official",
        },
        reward={"custom_rm_path": "tests.agent.agents.praise"},
        algo={"disable_rewards_normalization": True},  # all say the same
        train={"max_tokens_per_gpu": 2048},
        sglang={"tool_call_parser": "qwen25"},
    )
    row = json.dumps({"prompt": QUESTION, "tools": [TOOL]}) + "\n"
    (tmp_path / "prompts.jsonl").write_text(row * 2)
    [rollout] = metrics(succeed(tmp_path, limit=200))
    # The log-probs that the gateway recorded are the trainer's own, token for token.
    assert max(rollout["train/train_rollout_logprob_abs_diff_max"]) < 1e-4
    assert max(rollout["train/grad_norm"]) > 0
