"""Whole jobs of on-policy distillation: no reward but a teacher of another size, in the trainer or
behind HTTP.
"""

from __future__ import annotations

from statistics import mean

import pytest

from tests.models import tiny_model
from tests.whole.jobs import metrics, succeed, write_config


def test_a_student_gets_closer_to_its_teacher_wherever_that_is(tmp_path):
    # It has sharp opinions, the student hardly any.
    teacher = tiny_model("qwen3", hidden=96, layers=3, seed=1, initializer_range=0.2)
    write_config(
        tmp_path,
        rollout={"num_rollout": 8, "n_samples_per_prompt": 8},
        reward={"custom_rm_path": None},
        algo={"use_opd": True, "opd_type": "sglang", "opd_teacher_load": str(teacher)},
        train={"lr": 1.0e-2},
        debug={"check_weight_update_equal": False},
    )
    served = metrics(succeed(tmp_path, limit=200))
    apart = [row["train/opd_reverse_kl"][0] for row in served]
    assert mean(apart[-2:]) < 0.9 * mean(apart[:2]), apart  # 0.80 of it as measured
    run = succeed(tmp_path, "opd_type=megatron", "num_rollout=1", "name=trained", limit=200)
    [held] = metrics(run.parent / "trained")
    told = "rollout/teacher_log_probs"
    assert held[told] == pytest.approx(served[0][told], abs=1e-5)  # the same samples
    assert held["train/opd_reverse_kl"][0] == pytest.approx(apart[0], abs=1e-5)
