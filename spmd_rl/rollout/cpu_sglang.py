"""SGLang on a host without a GPU: what its CPU platform lacks, supplied through its own extension
points.

`prepare()` makes this process one that can become an engine: a stand-in for the compiled kernels,
hooks in SGLang's HookRegistry, our attention backend, and the imports that dominate a start. No
file of SGLang is changed.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import multiprocessing
import os
import secrets
import sys
import tempfile
import types
from collections.abc import Callable

import torch

from spmd_rl.attend import ROWS

_MASK = 0xFFFFFFFF
_LIBRARIES: list[torch.library.Library] = []
HEAVY = (
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.model_executor.model_runner",
    "sglang.srt.models.registry",
    "sglang.srt.layers.attention.torch_native_backend",
)


def prepare() -> None:
    """Import SGLang and register everything a CPU engine needs; forked children inherit it."""
    sys.modules["sgl_kernel"] = KernelStandIn()
    _register_murmur_hash()
    for name in HEAVY:
        importlib.import_module(name)
    _register_hooks()
    _register_hooks_of_old()
    from sglang.srt.plugins import load_plugins

    load_plugins()  # applies the hooks, and those of plugins the user has installed


class KernelStandIn(types.ModuleType):
    """`import sgl_kernel` without the package, whose wheels are CUDA only.

    SGLang's layers fall back to plain torch where the real kernels are missing; a name that is
    called all the same raises, so that a missing fallback is loud.
    """

    def __init__(self) -> None:
        super().__init__("sgl_kernel")
        self.__path__ = []
        self.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None, is_package=True)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args, **kwargs):
            raise NotImplementedError(f"sgl_kernel.{name} has no stand-in on CPU")

        return missing


def _register_hooks() -> None:
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.mem_cache.pool_host.common import ALLOC_MEMORY_FUNCS
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import (
        add_attention_backend_choices,
        add_deterministic_attention_backend_choices,
        add_radix_supported_deterministic_attention_backend_choices,
    )

    from spmd_rl.rollout.attention import NAME, backend_class

    HookRegistry.register(
        "sglang.srt.entrypoints.engine._set_envs_and_config", _fork_children, HookType.AFTER
    )
    # The batch-invariant kernels are Triton's. On CPU, batches of one thread are invariant
    # enough: seeded sampling alone and in a batch gives the same tokens
    # (tests/rollout/test_engines.py).
    HookRegistry.register(
        "sglang.srt.batch_invariant_ops.enable_batch_invariant_mode",
        lambda *args, **kwargs: None,
        HookType.REPLACE,
    )
    HookRegistry.register(
        "sglang.srt.managers.load_snapshot.shm_path_for", _load_file, HookType.REPLACE
    )
    HookRegistry.register(
        "sglang.srt.utils.stale_shm_cleanup.make_shm_name",
        _shared_memory_name,
        HookType.REPLACE,
    )
    # A product of fewer rows than this takes another path in the matrix library, with other bits:
    # the last requests of a rollout would not agree with the trainer as the others do.
    HookRegistry.register(
        "sglang.srt.layers.quantization.unquant.UnquantizedLinearMethod.apply",
        lambda apply, method, layer, x, *rest, **named: padded(
            lambda rows: apply(method, layer, rows, *rest, **named), x
        ),
        HookType.AROUND,
    )
    HookRegistry.register(
        "sglang.srt.layers.logits_processor.LogitsProcessor._compute_lm_head",
        lambda compute, processor, x, *rest, **named: padded(
            lambda rows: compute(processor, rows, *rest, **named), x
        ),
        HookType.AROUND,
    )
    add_attention_backend_choices([NAME])
    add_deterministic_attention_backend_choices(["torch_native", NAME])
    # Reading a prefix from the cache gives the same bits as computing it again.
    add_radix_supported_deterministic_attention_backend_choices(["torch_native", NAME])
    register_attention_backend(NAME)(lambda runner: backend_class()(runner))
    ALLOC_MEMORY_FUNCS["cpu"] = _pageable  # the default pins memory for CUDA


def _register_hooks_of_old() -> None:
    """What SGLang 0.5.15 lacks on CPU besides: plain forms of three things it does on a GPU
    only.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if importlib.util.find_spec("sglang.srt.layers.utils.hash") is None:
        return
    hooks = {
        "sglang.srt.layers.utils.hash.murmur_hash32": murmur_hash32,
        "sglang.srt.utils.common.support_triton": lambda backend: False,
        "torch.cuda.synchronize": lambda *args: None,  # before it hashes weights
    }
    for target, hook in hooks.items():
        HookRegistry.register(target, hook, HookType.REPLACE)


def padded(compute: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`compute(x)` for x [rows, width], with at least ROWS rows."""
    rows = x.size(0)
    if x.dim() != 2 or not 0 < rows < ROWS:
        return compute(x)
    return compute(torch.cat([x, x.new_zeros(ROWS - rows, x.size(1))]))[:rows]


def _fork_children(result, *args, **kwargs):
    """SGLang asks for spawned children, which would import everything again."""
    multiprocessing.set_start_method("fork", force=True)
    return result


def _load_file(name: str) -> str:
    """SGLang leaves this file in /dev/shm when it is killed; the scratch directory is removed
    with the engine.
    """
    return os.path.join(tempfile.gettempdir(), os.path.basename(name) + ".load")


def _shared_memory_name(kind: str) -> str:
    """Named by the engine, not by whichever of its processes asks: the fork server removes them."""
    return f"sgl_shm_{kind}_{os.getpgrp()}_{secrets.token_hex(4)}"


def _pageable(dims, dtype, device, pin_memory, allocator, *args, **kwargs):
    return allocator.allocate(dims, dtype=dtype, device=device)


def _register_murmur_hash() -> None:
    """The op behind `sampling_seed`."""
    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")
    library.impl("murmur_hash32_cpu", murmur_hash32, "CPU")
    _LIBRARIES.append(library)  # an op lives as long as its Library


def murmur_hash32(
    seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor
) -> torch.Tensor:
    """MurmurHash3 of (seed, position, column) for seeds [B], positions [B], columns [V] -> [B,
    V] uint32.
    """
    seed = seed.view(torch.int64)
    h = torch.zeros_like(seed)
    for k in (seed & _MASK, (seed >> 32) & _MASK, positions.to(torch.int64) & _MASK):
        h = _mix(h, k)
    h = _mix(h[:, None], (col_indices.to(torch.int64) & _MASK)[None, :]) ^ 16
    for shift, multiplier in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        h = ((h ^ (h >> shift)) * multiplier) & _MASK
    return h.to(torch.uint32)


def _mix(h: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    k = (k * 0xCC9E2D51) & _MASK
    k = ((k << 15) | (k >> 17)) & _MASK
    h = h ^ ((k * 0x1B873593) & _MASK)
    h = ((h << 13) | (h >> 19)) & _MASK
    return (h * 5 + 0xE6546B64) & _MASK
