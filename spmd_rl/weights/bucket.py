"""Many tensors as one: flat buckets of bounded size, and the bytes that carry their handles.

Comes in: (name, tensor) pairs; goes out: SGLang's `flattened_bucket` form. SGLang's own classes
for it are not imported: they pull 5,600 modules and 7 s into every train rank, and the engine
reads nothing but the attributes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.multiprocessing
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from spmd_rl import control

NamedTensor = tuple[str, torch.Tensor]


class Bucket(NamedTuple):
    """Tensors laid end to end."""

    flat: torch.Tensor  # [bytes] uint8
    names: list[str]
    dtypes: list[torch.dtype]
    shapes: list[torch.Size]

    def entries(self) -> list[SimpleNamespace]:
        """Where each tensor lies, with the attributes of SGLang's FlattenedTensorMetadata."""
        found, start = [], 0
        for name, dtype, shape in zip(self.names, self.dtypes, self.shapes, strict=True):
            size = shape.numel() * dtype.itemsize
            place = {"start_idx": start, "end_idx": start + size, "numel": size}
            found.append(SimpleNamespace(name=name, shape=shape, dtype=dtype, **place))
            start += size
        return found


def split(tensors: Iterable[NamedTensor], limit: int) -> Iterator[list[NamedTensor]]:
    """Runs of tensors of at most `limit` bytes; a larger tensor is a run of its own.

    Lazy: it asks for the next tensor only when it is needed. A run ends early rather than lay a
    tensor where its dtype is not aligned.
    """
    run: list[NamedTensor] = []
    size = 0
    for name, tensor in tensors:
        if run and (size + tensor.nbytes > limit or size % tensor.element_size()):
            yield run
            run, size = [], 0
        run.append((name, tensor.detach()))
        size += tensor.nbytes
    if run:
        yield run


def pack(run: list[NamedTensor], shared: bool) -> Bucket:
    """Copy a run into a new flat tensor; `shared`: one whose handle another process can open."""
    size = sum(tensor.nbytes for _, tensor in run)
    flat = allocate(size, run[0][1].device, shared)
    start = 0
    for _, tensor in run:
        end = start + tensor.nbytes
        flat[start:end].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        start = end
    if flat.is_cuda:
        torch.cuda.current_stream().synchronize()  # the engine's stream does not wait for ours
    return Bucket(
        flat,
        [name for name, _ in run],
        [tensor.dtype for _, tensor in run],
        [tensor.shape for _, tensor in run],
    )


def allocate(size: int, device: torch.device, shared: bool) -> torch.Tensor:
    if device.type == "cpu" and shared:
        with control.unheard():  # the first starts torch_shm_manager, which all later ones need
            storage = torch.UntypedStorage._new_using_filename_cpu(size)
        return torch.empty(0, dtype=torch.uint8).set_(storage)
    # Outside torch_memory_saver's regions, which the trainer opens only while it is built: memory
    # of its pools cannot be exported over CUDA IPC.
    return torch.empty(size, dtype=torch.uint8, device=device)


def serialize(bucket: Bucket) -> str:
    """Base64 of a pickle that holds the bucket's handle, not its bytes; the engine opens it once.

    The bucket must live until the engine has answered.
    """
    payload = {"flattened_tensor": bucket.flat, "metadata": bucket.entries()}
    buffer = io.BytesIO()
    with _by_file_name():
        _HandlePickler(buffer).dump(payload)
    return base64.b64encode(buffer.getvalue()).decode()


class _HandlePickler(ForkingPickler):
    """Names a GPU by its UUID, which both sides agree on whatever each calls device 0."""

    def reducer_override(self, obj):
        if not (isinstance(obj, torch.Tensor) and obj.is_cuda):
            return NotImplemented
        rebuild, args = torch.multiprocessing.reductions.reduce_tensor(obj)
        assert rebuild is rebuild_cuda_tensor
        uuid = str(torch.cuda.get_device_properties(obj.device).uuid)
        return rebuild, (*args[:6], uuid, *args[7:])


@contextmanager
def _by_file_name() -> Iterator[None]:
    """Share CPU memory by name: the default, passing descriptors, works between relatives only."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
