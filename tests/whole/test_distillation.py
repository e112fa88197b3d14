"""A whole job of on-policy distillation: no reward but a teacher of another size."""

from __future__ import annotations

from statistics import mean

from tests.models import tiny_model
from tests.whole.jobs import metrics, succeed, write_config


def test_a_student_gets_closer_to_its_teacher(tmp_path):
    # It has sharp opinions, the student hardly any.
    teacher = tiny_model("qwen3", hidden=96, layers=3, seed=1, initializer_range=0.2)
    write_config(
        tmp_path,
        rollout={"num_rollout": 8, "n_samples_per_prompt": 8},
        reward={"custom_rm_path": None},
        algo={"use_opd": True, "opd_type": "megatron", "opd_teacher_load": str(teacher)},
        train={"lr": 1.0e-2},
        debug={"check_weight_update_equal": False},
    )
    apart = [row["train/opd_reverse_kl"][0] for row in metrics(succeed(tmp_path, limit=200))]
    assert mean(apart[-2:]) < 0.9 * mean(apart[:2]), apart  # 0.80 of it as measured
