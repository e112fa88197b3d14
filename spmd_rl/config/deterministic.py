"""What `train.deterministic` needs of the environment, beside what load.py sets in the sections.

The recipe is slime's (docs, "Reproducibility"): SGLang's deterministic inference, Megatron's
deterministic mode, and these variables, which must be set before CUDA is first used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from spmd_rl.config.errors import Fault
from spmd_rl.config.schema import Config

ENVIRONMENT = {
    "NCCL_ALGO": "Ring",  # a sum's order is then that of the ranks
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",  # Transformer Engine's backward of attention
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS otherwise picks kernels by the memory it finds
}

MODES = {"megatron": "deterministic_mode", "sglang": "enable_deterministic_inference"}


def check(cfg: Config) -> Iterator[Fault]:
    if not cfg.train.deterministic:
        return
    for name, value in ENVIRONMENT.items():
        given = os.environ.get(name, value)
        if given != value:
            yield Fault(
                ("train.deterministic",),
                f"train.deterministic needs {name}={value}, but the environment says {given}: "
                f"unset {name}",
            )
    for section, key in MODES.items():
        if getattr(cfg, section).get(key) is False:
            yield Fault(
                (f"{section}.{key}", "train.deterministic"),
                f"{section}.{key}: false contradicts train.deterministic: true: leave it out",
            )


def environment(cfg: Config) -> dict[str, str]:
    """Variables of every process that trains or generates."""
    return dict(ENVIRONMENT) if cfg.train.deterministic else {}
