"""What trainer tests share: configurations, a ragged batch, trainers built inside ranks, and how
ranks must end.

Functions named `rank_*` run in real processes through tests.ranks and leave files in a folder.
"""

from __future__ import annotations

from typing import Any

from tools.parity.ranks import VOCAB, Ranks, config, placement, ragged_batch, shard_of

__all__ = ["VOCAB", "Ranks", "config", "ok", "placement", "ragged_batch", "shard_of"]


def ok(outcome: Any) -> None:
    """The ranks ended well, and left nothing behind."""
    assert set(outcome.statuses) == {0}, outcome.last(40)
    assert not outcome.left
