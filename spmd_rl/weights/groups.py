"""A process group between a train rank and engines that are in no group of ours.

Both sides must call torch the same way, and the engine's side is SGLang's
`init_custom_process_group`; importing that here would pull all of SGLang into every train rank.
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


def listen(address: str, world: int, timeout: timedelta) -> dist.TCPStore:
    """The meeting place of a new group, on a free port of ours.

    Not `dist.rendezvous`: below torchrun it would look for a store of torchrun's at that address.
    """
    return dist.TCPStore(address, 0, world, is_master=True, timeout=timeout, wait_for_workers=False)


def join(
    store: dist.TCPStore, rank: int, world: int, name: str, backend: str, timeout: timedelta
) -> dist.ProcessGroup:
    """Blocks until all members have come."""
    group, _ = c10d._new_process_group_helper(
        world,
        rank,
        [],
        dist.Backend(backend),
        dist.PrefixStore(name, store),
        group_name=name,  # pyright: ignore[reportArgumentType]
        timeout=timeout,
    )
    c10d._world.pg_group_ranks[group] = {i: i for i in range(world)}
    assert isinstance(group, dist.ProcessGroup)
    return group
