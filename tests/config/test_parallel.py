"""Layouts that a model cannot have, or that would silently compute something else, are refused."""

from __future__ import annotations

import json

import pytest

from spmd_rl.architecture import parse
from spmd_rl.config.parallel import check
from spmd_rl.config.schema import Config
from tests.models import ROOT

QWEN, GLM = "qwen3-4b", "glm4.5-355b-a32b"


def faults(model: str, megatron: dict, device: str = "cuda") -> list[str]:
    hf = json.loads((ROOT / "configs/models" / model / "config.json").read_text())
    values = {
        "model": {"hf_checkpoint": "x"}, "rollout": {"rollout_batch_size": 8},
        "placement": {"device": device}, "megatron": megatron,
    }  # fmt: skip
    return [fault.text for fault in check(Config.model_validate(values), parse(hf))]


@pytest.mark.parametrize(
    "model,megatron,words",
    [
        (QWEN, {"pipeline_model_parallel_size": 5}, "does not divide the model's 36 layers: set"),
        (QWEN, {"virtual_pipeline_model_parallel_size": 2}, "needs megatron.pipeline_model"),
        (
            QWEN,
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 4},
            "4 does not divide the 18 layers of a pipeline stage: choose a divisor",
        ),
        (
            QWEN,
            {
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 2,
                "batch_p2p_comm": True,
            },
            "gives wrong results",
        ),
        (QWEN, {"recompute_granularity": "full"}, "needs recompute_method"),
        (
            QWEN,
            {"recompute_granularity": "selective", "recompute_method": "uniform"},
            "is for recompute_granularity: full",
        ),
        (
            GLM,
            {"tensor_model_parallel_size": 2, "sequence_parallel": False},
            "a mixture of experts with tensor parallelism needs it",
        ),
        (
            QWEN,
            {
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 5,
                "pipeline_model_parallel_size": 2,
            },
            "5 does not divide the 18 layers of a pipeline stage, as recompute_method: uniform",
        ),
        (
            QWEN,
            {"tensor_model_parallel_size": 3},
            "3 does not divide the model's 32 attention heads: choose a divisor",
        ),
        (QWEN, {"expert_model_parallel_size": 2}, "2: the model has no experts, leave the key out"),
        (GLM, {"expert_model_parallel_size": 7}, "7 does not divide the model's 160 experts"),
        (GLM, {"expert_tensor_parallel_size": 5}, "5 does not divide the experts' width 1536"),
        (GLM, {"moe_aux_loss_coeff": 0.001}, "moe_aux_loss_coeff is not supported"),
    ],
)
def test_one_sentence_with_the_key_and_the_fix(model, megatron, words):
    (text,) = faults(model, megatron)
    assert text.startswith("megatron.") and words in text


def test_what_only_a_cpu_cannot():
    tp = {"tensor_model_parallel_size": 2}
    (text,) = faults(GLM, tp, "cpu")
    assert "set it to 1" in text and not faults(GLM, tp) and not faults(QWEN, tp, "cpu")
    modules = {"recompute_granularity": "selective", "recompute_modules": ["layernorm", "mlp"]}
    (text,) = faults(QWEN, modules, "cpu")
    assert "layernorm cannot be recomputed" in text and not faults(QWEN, modules)
    offload = {"optimizer_cpu_offload": True}
    assert faults(QWEN, offload, "cpu") and not faults(QWEN, offload)


def test_uneven_stages_and_virtual_ones_are_fine():
    assert not faults(
        GLM, {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 23}
    )
    uneven = {"pipeline_model_parallel_size": 5, "num_layers_in_first_pipeline_stage": 4}
    assert not faults(QWEN, uneven)
