"""A whole job of a mixture of experts: trained on spread experts that follow the engine's choice,
pushed, resumed otherwise.
"""

from __future__ import annotations

from tests.models import tiny_model
from tests.whole.jobs import metrics, succeed, write_config


def test_a_mixture_of_experts_trains_and_resumes_with_its_experts_gathered(tmp_path):
    model = tiny_model("qwen3_moe", tied=False, positions=1024)
    write_config(
        tmp_path,
        model={"hf_checkpoint": str(model)},
        rollout={"num_rollout": 1},
        algo={"use_rollout_routing_replay": True},
        checkpoint={"save_interval": 1},
        megatron={"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
        debug={"check_weight_update_equal": False},  # does not know this engine's layout
    )
    succeed(tmp_path, limit=200)
    # Adam's state of spread experts, too, is taken over by ranks that hold all of them.
    run = succeed(tmp_path, "num_rollout=2", "megatron.expert_model_parallel_size=1", limit=200)
    rollouts = metrics(run)
    assert [row["rollout"] for row in rollouts] == [0, 1]
    for row in rollouts:  # the second one's engine was filled from the resumed trainer
        assert max(row["train/train_rollout_logprob_abs_diff_max"]) < 1e-5
        assert row["train/routing_replay_changed"] < 0.01
