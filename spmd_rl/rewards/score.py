"""Which verifier judges a sample, and its answer.

Comes in: finished samples; goes out: their rewards (a number, or an object with several). The
user's function comes first, then the sample's own metadata["rm_type"], then reward.rm_type.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from typing import Any

from spmd_rl import hooks
from spmd_rl.config.check import RM_TYPES
from spmd_rl.config.schema import Config
from spmd_rl.rewards.answers import last_boxed
from spmd_rl.rewards.code import code
from spmd_rl.rewards.dapo import dapo
from spmd_rl.rewards.form import form
from spmd_rl.rewards.ifbench import ifbench
from spmd_rl.rewards.math import deepscaler, math
from spmd_rl.rewards.pool import Pool
from spmd_rl.rewards.remote import RemoteReward
from spmd_rl.rewards.text import f1, gpqa
from spmd_rl.sandbox import Sandbox
from spmd_rl.tasks import together
from spmd_rl.types import Group, Sample, Status

BOXED = "boxed_"


class Scorer:
    """All reward functions of a run."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        workers = cfg.reward.reward_num_workers or default_workers()
        self.pool = Pool(workers, cfg.reward.reward_timeout)
        self.sandbox = Sandbox(at_once=workers)
        self.custom = hooks.optional(cfg.reward.custom_rm_path)
        self.remote = RemoteReward(cfg.reward.rm_url) if cfg.reward.rm_url else None
        if cfg.reward.rm_type:
            self._check(cfg.reward.rm_type, "reward.rm_type")

    async def group(self, group: Group) -> None:
        """Reward every sample of a finished group that has none yet."""
        waiting = [s for s in group if s.reward is None and s.status is not Status.ABORTED]
        if not waiting:
            return
        if self.cfg.reward.group_rm and self.custom:
            rewards = await hooks.call(self.custom, self.cfg, group)
            if len(rewards) != len(group):
                raise ValueError(
                    f"reward.custom_rm_path returned {len(rewards)} rewards for a group of "
                    f"{len(group)} samples"
                )
            for sample, reward in zip(group, rewards, strict=True):
                sample.reward = reward
        else:
            await together(self.sample(sample) for sample in waiting)

    async def sample(self, sample: Sample) -> None:
        """Reward one sample that has no reward yet."""
        await self.judge(sample, self.custom)

    async def judge(self, sample: Sample, custom: Callable[..., Any] | None) -> None:
        """The same by a user's function, or, with None, a built-in reward."""
        if sample.reward is not None or sample.status is Status.ABORTED:
            return
        if custom:
            sample.reward = await hooks.call(custom, self.cfg, sample)
        else:
            sample.reward = await self._built_in(sample)

    async def close(self) -> None:
        await self.pool.close()
        await self.sandbox.close()
        if self.remote:
            await self.remote.close()

    async def _built_in(self, sample: Sample) -> Any:
        kind = sample.metadata.get("rm_type") or self.cfg.reward.rm_type
        if not kind and self.cfg.algo.use_opd:
            return 0.0  # the teacher alone says what is good
        if not kind:
            raise ValueError(
                "nothing rewards the samples: set reward.rm_type or reward.custom_rm_path"
            )
        self._check(kind, "metadata['rm_type']")
        response, label = sample.response, sample.label
        if kind.startswith(BOXED):
            kind, response = kind[len(BOXED) :], last_boxed(response) or ""
        if kind in ("math", "deepscaler"):
            return await (math if kind == "math" else deepscaler)(response, label, self.pool)
        if kind == "remote_rm":
            assert self.remote
            return await self.remote(sample.prompt, response, label)
        if kind == "gpqa":
            return gpqa(response, label, sample.metadata)
        if kind == "ifbench":
            return ifbench(response, label, sample.metadata)
        if kind == "format":
            return form(response, sample.prompt)
        if kind == "code":
            timeout = self.cfg.reward.reward_timeout
            return await code(response, label, sample.metadata, self.sandbox, timeout)
        if kind == "random":  # as good as random, and the same in every run
            return zlib.crc32(f"{self.cfg.data.rollout_seed} {sample.index}".encode()) & 1
        return (dapo if kind == "dapo" else f1)(response, label)

    def _check(self, kind: str, key: str) -> None:
        if kind.removeprefix(BOXED) not in RM_TYPES:
            raise ValueError(f"{key} '{kind}' is unknown: choose one of {', '.join(RM_TYPES)}")
        if kind.removeprefix(BOXED) == "remote_rm" and self.remote is None:
            raise ValueError(f"{key} remote_rm needs reward.rm_url: give the service's address")


def default_workers() -> int:
    """Half of the processors this process may use: engines and trainers want some as well."""
    return max(1, min(16, len(os.sched_getaffinity(0)) // 2))
