"""On-policy distillation: a teacher's opinion of the student's own tokens, as advantages.

In and out: flat [R] float32 tensors. Source: slime's `apply_opd_kl_to_advantages`, after
https://thinkingmachines.ai/blog/on-policy-distillation.
"""

from __future__ import annotations

from torch import Tensor


def distill(
    advantages: Tensor, student: Tensor, teacher: Tensor, coef: float
) -> tuple[Tensor, Tensor]:
    """(advantages less `coef` x reverse KL, reverse KL [R]): the mean of log p_student - log
    p_teacher over the student's samples is its KL divergence from the teacher.
    """
    reverse_kl = student - teacher
    return advantages - coef * reverse_kl, reverse_kl
