"""Which parameters learn: slime's two lists of regular expressions.

In: this rank's parameters under their global Megatron names (`decoder.layers.0.mlp...`, layers
counted over all pipeline stages). Out: `requires_grad` set, before the optimizer is built. A
pattern that matches nothing on any rank is a mistake and said so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from spmd_rl.config.schema import TrainConfig
from spmd_rl.trainer.parallel import Groups
from spmd_rl.weights.names import VALUE_LAYER


def apply(
    parameters: Sequence[tuple[str, Any]],
    train: TrainConfig,
    groups: Groups,
    values: bool = False,
) -> None:
    """Collective over pipeline stages, where a list is given. Of a critic (`values`) the layers
    that the actor has too follow the list; the value layer always learns.
    """
    only, frozen = train.only_train_params_name_list, train.freeze_params_name_list
    key = "only_train_params_name_list" if only else "freeze_params_name_list"
    patterns = only or frozen
    if not patterns:
        return
    names = _all_names([name for name, _ in parameters], groups)
    for pattern in [] if values else patterns:
        if not any(re.search(pattern, name) for name in names):
            examples = ", ".join(names[:: max(len(names) // 4, 1)])
            raise ValueError(
                f"train.{key}: '{pattern}' is found in no parameter's name (such as {examples}): "
                "correct it"
            )
    learning = [name for name in names if _learns(name, patterns, bool(only), values)]
    if not learning:
        raise ValueError(f"train.{key} leaves no parameter that learns: narrow the patterns")
    for name, parameter in parameters:
        parameter.requires_grad_(_learns(name, patterns, bool(only), values))


def _learns(name: str, patterns: list[str], only: bool, values: bool) -> bool:
    if values and name in VALUE_LAYER:
        return True
    return any(re.search(pattern, name) for pattern in patterns) == only


def _all_names(names: list[str], groups: Groups) -> list[str]:
    if groups.pp_size == 1:
        return names
    listed: list[list[str]] = [[] for _ in range(groups.pp_size)]
    dist.all_gather_object(listed, names, group=groups.pp)
    return [name for stage in listed for name in stage]
