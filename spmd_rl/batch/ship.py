"""Rank 0 gives every train rank its own shard, over a gloo group.

A shard is one buffer: a small header and its flat, unpadded arrays. Each rank gets only its own
bytes, all at the same time; ranks that share a data-parallel rank get equal shards. Ranks on rank
0's machine use memory that it wrote; others receive theirs. The arrays of a shard are views of its
buffer.
"""

from __future__ import annotations

import json
import os
from dataclasses import fields
from functools import reduce
from math import prod
from operator import or_
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from spmd_rl.batch.near import Borrower, Lender, who_is_near
from spmd_rl.batch.plan import shard_plan, sibling_totals
from spmd_rl.types import Batch, Placement, Shard, StepPlan

ALIGN = 64  # bytes between the starts of arrays
PREFIX = 8  # bytes that hold the header's length
FAR = (0, 0, 0)  # instead of an address: the buffer follows


class Shipping:
    """Hands out a batch over the train ranks; `group` has them all, in order. All make one."""

    def __init__(self, placement: Placement, rank: int, group: dist.ProcessGroup | None):
        self.dp_ranks = data_parallel_ranks(placement)
        self.rank = placement.train_ranks.index(rank)  # in the group
        self.group = group
        self.near = who_is_near(group)
        self.lenders: dict[int, Lender] = {}  # by data-parallel rank
        self.borrower = Borrower()

    def hand_out(self, batch: Batch | None, plans: list[StepPlan] | None) -> Shard:
        """This rank's shard. Every train rank calls it; rank 0 has the batch and the plans."""
        if self.rank != 0:
            return self._receive()
        assert batch is not None and plans is not None
        return self._send(batch, plans)

    def _send(self, batch: Batch, plans: list[StepPlan]) -> Shard:
        """Cut the shards and send them; returns the own one. Shard 1 leaves while 2 is cut."""
        totals = sibling_totals(batch)
        busy = self._collect_busy()
        sending, own = [], None
        for dp_rank in sorted(set(self.dp_ranks)):
            members = [peer for peer, of in enumerate(self.dp_ranks) if of == dp_rank]
            order, rest = shard_plan(plans, dp_rank, totals)
            layout = Layout(batch.pieces(order), rest)
            address = FAR
            if any(self.near[peer] for peer in members):
                in_use = reduce(or_, (busy[peer] for peer in members))
                number, region = self.lenders.setdefault(dp_rank, Lender()).free(in_use)
                buffer = region.room(layout.size)
                address = (number, os.getpid(), region.fd)
            else:
                buffer = np.empty(layout.size, dtype=np.uint8)
            layout.write(buffer)
            for peer in members:
                if peer == 0:
                    own = from_bytes(self.borrower.open(*address, layout.size))
                else:
                    sending += self._post(peer, address, buffer)
        for work, _ in sending:
            work.wait()
        assert own is not None
        return own

    def _post(self, peer: int, address: tuple[int, int, int], buffer: np.ndarray) -> list:
        """Start to tell a peer where its shard is, or to send it; with what must stay in memory."""
        near = self.near[peer]
        messages = [torch.tensor([len(buffer), *(address if near else FAR)])]
        messages += [] if near else [torch.from_numpy(buffer)]
        return [(dist.isend(m, group=self.group, group_dst=peer), m) for m in messages]

    def _collect_busy(self) -> list[int]:
        """[train ranks] which regions each still uses."""
        found = torch.zeros(len(self.dp_ranks), dtype=torch.int64)
        found[0] = self.borrower.busy
        for peer in range(1, len(self.dp_ranks)):
            if self.near[peer]:
                dist.recv(found[peer : peer + 1], group=self.group, group_src=peer)
        return found.tolist()

    def _receive(self) -> Shard:
        if self.near[self.rank]:
            dist.send(torch.tensor([self.borrower.busy]), group=self.group, group_dst=0)
        told = torch.empty(4, dtype=torch.int64)
        dist.recv(told, group=self.group, group_src=0)
        size, number, pid, fd = told.tolist()
        if (number, pid, fd) != FAR:
            return from_bytes(self.borrower.open(number, pid, fd, size))
        buffer = torch.empty(size, dtype=torch.uint8)
        dist.recv(buffer, group=self.group, group_src=0)
        return from_bytes(buffer.numpy())


def data_parallel_ranks(placement: Placement) -> list[int]:
    """[train ranks] data-parallel rank of each: Megatron counts tp, cp, dp, pp, fastest first."""
    inner = placement.tp * placement.cp
    return [(k // inner) % placement.dp for k in range(len(placement.train_ranks))]


class Layout:
    """A shard as bytes: header length, header (JSON), arrays at aligned offsets."""

    def __init__(self, columns: dict[str, list[np.ndarray]], rest: dict[str, Any]):
        """`columns`: the pieces of each; `rest`: the shard's other fields."""
        self.pieces = dict(columns, shard_mask_totals=[rest["mask_totals"]])
        for name, bins in (("steps", rest["steps"]), ("forward", [rest["forward"]])):
            self.pieces |= {f"shard_{name}_{k}": [v] for k, v in enumerate(_flatten(bins))}
        self.table, offset = {}, 0
        for name, parts in self.pieces.items():
            shape = (sum(map(len, parts)), *parts[0].shape[1:])
            self.table[name] = (parts[0].dtype.str, shape, offset)
            offset += -(-prod(shape) * parts[0].itemsize // ALIGN) * ALIGN
        counts = {name: rest[name] for name in ("num_rollouts", "num_tokens")}
        self.header = json.dumps({"arrays": self.table, **counts}).encode()
        self.size = _data_start(len(self.header)) + offset

    def write(self, buffer: np.ndarray) -> None:
        """[size] uint8 <- everything, each array copied once."""
        start = _data_start(len(self.header))
        buffer[:PREFIX] = np.array([len(self.header)], dtype=np.int64).view(np.uint8)
        buffer[PREFIX : PREFIX + len(self.header)] = np.frombuffer(self.header, np.uint8)
        for name, (dtype, shape, at) in self.table.items():
            nbytes = prod(shape) * np.dtype(dtype).itemsize
            into = buffer[start + at : start + at + nbytes].view(dtype).reshape(shape)
            np.concatenate(self.pieces[name], out=into)


def to_bytes(shard: Shard) -> np.ndarray:
    """[bytes] uint8, as they travel."""
    columns = {f.name: getattr(shard.batch, f.name) for f in fields(Batch)}
    rest = {f.name: getattr(shard, f.name) for f in fields(Shard)}
    layout = Layout({name: [v] for name, v in columns.items() if v is not None}, rest)
    buffer = np.empty(layout.size, dtype=np.uint8)
    layout.write(buffer)
    return buffer


def from_bytes(buffer: np.ndarray) -> Shard:
    """The shard whose arrays are views of `buffer`."""
    size = int(buffer[:PREFIX].view(np.int64)[0])
    header = json.loads(buffer[PREFIX : PREFIX + size].tobytes())
    start = _data_start(size)

    def array(name: str) -> np.ndarray | None:
        if name not in header["arrays"]:
            return None
        dtype, shape, at = header["arrays"][name]
        nbytes = prod(shape) * np.dtype(dtype).itemsize
        return buffer[start + at : start + at + nbytes].view(dtype).reshape(shape)

    def bins(name: str) -> list[list[list[int]]]:
        return _unflatten([array(f"shard_{name}_{k}") for k in range(3)])

    return Shard(
        batch=Batch(**{f.name: array(f.name) for f in fields(Batch)}),  # type: ignore[arg-type]
        steps=bins("steps"),
        num_rollouts=header["num_rollouts"],
        num_tokens=header["num_tokens"],
        mask_totals=array("shard_mask_totals"),  # type: ignore[arg-type]
        forward=bins("forward")[0],
    )


def _data_start(header_bytes: int) -> int:
    return -(-(PREFIX + header_bytes) // ALIGN) * ALIGN


def _flatten(steps: list[list[list[int]]]) -> list[np.ndarray]:
    """[step][micro-batch] -> indices as three flat arrays: counts, sizes, indices."""
    counts = [len(step) for step in steps]
    sizes = [len(members) for step in steps for members in step]
    members = [i for step in steps for bins in step for i in bins]
    return [np.array(values, dtype=np.int32) for values in (counts, sizes, members)]


def _unflatten(flat: list[np.ndarray | None]) -> list[list[list[int]]]:
    counts, sizes, members = (array.tolist() for array in flat if array is not None)
    rest, widths = iter(members), iter(sizes)
    return [[[next(rest) for _ in range(next(widths))] for _ in range(count)] for count in counts]
