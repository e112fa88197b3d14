"""What gives the trainer's device memory back while engines generate. The only file for it.

On GPUs, with torch_memory_saver installed, everything allocated inside `pool()` is released by
`offload()` and restored, with its contents, by `onload()`. On a CPU there is nothing to release;
the calls are made all the same.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
from typing import Any

import torch


class Memory:
    """One model's memory on this rank's device; `tag` tells it from other models'."""

    def __init__(self, device: torch.device, wanted: bool, tag: str):
        self.device, self.tag = device, tag
        self.saver: Any = None
        self.away = False
        if not wanted or device.type != "cuda":
            return
        if importlib.util.find_spec("torch_memory_saver") is None:
            raise ValueError(
                "placement.offload_train needs the package torch_memory_saver: install it, or set "
                "placement.offload_train: false"
            )
        from torch_memory_saver import torch_memory_saver

        self.saver = torch_memory_saver
        if self.saver._impl is None:  # in this process, without LD_PRELOAD
            self.saver.hook_mode = "torch"

    def pool(self) -> Any:
        """A context: long-lived allocations made in it can be released."""
        if self.saver is None:
            return contextlib.nullcontext()
        return self.saver.region(tag=self.tag, enable_cpu_backup=True)

    def offload(self) -> None:
        if self.saver is None or self.away:
            return
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        self.saver.pause(self.tag)
        self.away = True

    def onload(self) -> None:
        if self.saver is None or not self.away:
            return
        self.saver.resume(self.tag)
        self.away = False
