"""Compile, without a GPU, every Triton kernel that a model's forward passes launch on a Hopper GPU.

`python compile_offline.py MODEL_DIRECTORY DTYPE`. Tensors are on the meta device, so nothing is computed
and real sizes cost no memory; FlashInfer is replaced, because its kernels are not ours. Prints the
number of compiled kernels, or fails with the error of Triton's compiler or of ptxas.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

SHARED_BYTES = 232_448  # that one program may have on Hopper
PAGE = 16


class _Hopper:
    """What Triton asks of a driver until a kernel is compiled."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _Wrapper:
    """In place of FlashInfer's wrappers of attention kernels."""

    _pin_memory_int_workspace_buffer = torch.empty(1)

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def plan(self, *args: Any, **options: Any) -> None:
        pass

    def run(self, *args: Any, **options: Any) -> None:
        pass

    def reset_workspace_buffer(self, *args: Any) -> None:
        pass


class _Event:
    def synchronize(self) -> None:
        pass

    def record(self) -> None:
        pass


kernels: dict[str, Any] = {}


def _compile_only(launch: Any) -> Any:
    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        kernels[kernel.hash] = kernel
        if kernel.metadata.shared > SHARED_BYTES:
            raise RuntimeError(
                f"{kernel.name} takes {kernel.metadata.shared} bytes of shared memory"
            )
        return kernel

    return run


def _pretend() -> None:
    """Make this process believe that it has a Hopper GPU, whose memory is the meta device."""
    driver.set_active(_Hopper())
    JITFunction.run = _compile_only(JITFunction.run)
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.Event = _Event
    torch.cuda.set_device = lambda *_: None
    torch.Tensor.pin_memory = lambda self: self
    flashinfer = types.ModuleType("flashinfer")
    flashinfer.__version__ = "0"
    flashinfer.BatchPrefillWithPagedKVCacheWrapper = _Wrapper
    flashinfer.BatchPrefillWithRaggedKVCacheWrapper = _Wrapper
    sys.modules["flashinfer"] = flashinfer
    real = torch.empty
    unpinned = lambda *args, pin_memory=False, **options: real(*args, **options)
    torch.empty = unpinned
