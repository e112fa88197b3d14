"""What megatron-core (0.15, 0.16) needs to run on a host without CUDA. The only file that knows.

megatron-core names the CUDA device in three ways, and each has its own answer here:
  1. calls such as torch.cuda.current_device(), Stream(), get_rng_state(): replaced by CPU stand-
     ins;
  2. device="cuda", .cuda(), pin_memory=True in tensor factories: redirected by a TorchFunctionMode;
  3. Tensor.type() compared with "torch.cuda.FloatTensor" (optimizer, gradient clipping): the same
     mode.
`enable()` does nothing for a CUDA device.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


class _CudaMeansCpu(TorchFunctionMode):
    """Gives tensors that are asked for on "cuda" on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": _CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
            return func(*args, **kwargs)
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args)


class _InOrder:
    """Stands for a CUDA stream or event: on the CPU everything has happened already."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: None

    def query(self):
        return True

    def record_event(self, event=None):
        return event or _InOrder()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None

    def __eq__(self, other):
        return isinstance(other, _InOrder)

    def __hash__(self):
        return 0


_process_ready = False
_thread = threading.local()


def enable(device: torch.device) -> None:
    """Make this thread able to run megatron-core on a CPU; nothing to do for another device."""
    if device.type != "cpu":
        return
    global _process_ready
    if not _process_ready:
        _process_ready = True
        _replace_cuda_calls()
        _mend_megatron()
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if not getattr(_thread, "ready", False):  # function modes are per thread
        _thread.ready = True
        _CudaMeansCpu().__enter__()


def _replace_cuda_calls() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.set_device = lambda *_: None
    cuda.synchronize = lambda *_args, **_kwargs: None
    cuda.empty_cache = lambda: None
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    cuda.Stream = cuda.Event = _InOrder
    cuda.current_stream = cuda.default_stream = lambda *_: _InOrder()
    cuda.stream = lambda _: contextlib.nullcontext()


def _mend_megatron() -> None:
    import torch._dynamo.config as dynamo

    dynamo.disable = True  # jit_fuser is torch.compile; an environment variable comes too late here
    from megatron.core.tensor_parallel import random as tp_random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    modules: tuple[Any, ...] = (tp_random, moe_utils, token_dispatcher)
    tp_random, moe_utils, token_dispatcher = modules
    tp_random._get_cuda_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    tp_random._set_cuda_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)
    if not hasattr(moe_utils, "te_general_gemm"):  # 0.16 without TE: NameError in the router
        moe_utils.te_general_gemm = None

    def split_sizes(tensor, as_numpy=False, record_stream=False):
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = split_sizes
