"""Memory of a rank into which other processes, the encoders, write embeddings of images.

The rank owns it, so an encoder that dies while it writes leaves only a place that nobody reads.
This module knows places and numbers; the engine says what is where.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from functools import partial
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gllm_engine.types import LandingHandle, SharedGpuMemory

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
}


class Landing:
    """Numbers of `tokens` tokens. The place of an image is the index of its first token's.

    A token has `numbers` of them: (1 + num_deep) * the model's dim.
    """

    def __init__(self, handle: LandingHandle, memory: Tensor) -> None:
        """See `make` and `open`. memory: uint8, as many bytes as the handle says."""
        self.handle = handle
        self._numbers = memory.view(dtype_of(handle.dtype)).view(handle.tokens, handle.numbers)

    @classmethod
    def make(cls, tokens: int, numbers: int, dtype: torch.dtype, device: torch.device) -> Landing:
        """The rank's end. Other processes of the same user may open its handle."""
        num_bytes = tokens * numbers * dtype.itemsize
        known = partial(
            LandingHandle, tokens, numbers, str(dtype).removeprefix("torch."), dtype.itemsize
        )
        if device.type == "cuda":
            memory = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
            return cls(known(_share(memory)), memory)
        # A file without a name: it is gone with the last process that has it, however that ends.
        file = os.memfd_create("gllm-landing")
        os.ftruncate(file, num_bytes)
        memory = torch.frombuffer(mmap.mmap(file, num_bytes), dtype=torch.uint8)
        landing = cls(known(f"/proc/{os.getpid()}/fd/{file}"), memory)
        weakref.finalize(landing, os.close, file)
        return landing

    @classmethod
    def open(cls, handle: LandingHandle) -> Landing:
        """An encoder's end. Raises ValueError if the memory has another size than the handle says,
        OSError or RuntimeError if its owner is gone.
        """
        num_bytes = handle.tokens * handle.numbers * dtype_of(handle.dtype).itemsize
        shared = handle.memory
        if isinstance(shared, SharedGpuMemory):
            _check_size(shared.num_bytes, num_bytes)
            return cls(handle, _open(shared))
        file = os.open(shared, os.O_RDWR | os.O_CLOEXEC)
        try:
            _check_size(os.fstat(file).st_size, num_bytes)
            return cls(handle, torch.frombuffer(mmap.mmap(file, num_bytes), dtype=torch.uint8))
        finally:
            os.close(file)

    def read(self, place: int, shape: tuple[int, ...]) -> Tensor:
        """What is at `place`, as a view. Raises ValueError for what is not within the memory."""
        tokens, numbers = self._numbers.shape
        count = prod(shape)
        start = place * numbers
        if not 0 <= place or start + count > tokens * numbers:
            raise ValueError(f"place {place}: {count} numbers there are not within {tokens} tokens")
        return self._numbers.view(-1)[start : start + count].view(shape)

    def write(self, place: int, embeddings: Tensor | bytes) -> None:
        """Copy embeddings to `place`. A GPU may still copy after the return, in the order of the
        current stream of the tensor's device. Raises ValueError as `read`.
        """
        if isinstance(embeddings, bytes):
            numbers = torch.frombuffer(bytearray(embeddings), dtype=torch.uint8)
            embeddings = numbers.view(self._numbers.dtype)
        self.read(place, tuple(embeddings.shape)).copy_(embeddings)


def dtype_of(name: str) -> torch.dtype:
    """Of a handle. Raises ValueError for one that embeddings do not have."""
    if name not in _DTYPES:
        raise ValueError(f"dtype: {name[:40]!r} is none of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _check_size(found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(
            f"a landing has {found} bytes, its tokens and numbers take {expected}: the handle is "
            "not that of this memory"
        )


class _IpcHandle(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_byte * 64)]


def _driver(name: str, *arguments: Any) -> None:
    """Call CUDA's driver. Torch shares memory too, with a file that a killed rank leaves behind."""
    if error := ctypes.CDLL("libcuda.so.1")[name](*arguments):
        raise RuntimeError(f"{name} fails with CUDA's error {error}")


def _share(memory: Tensor) -> SharedGpuMemory:
    first = ctypes.c_uint64()  # address of the allocation
    handle = _IpcHandle()
    here = memory.data_ptr()
    _driver("cuMemGetAddressRange_v2", ctypes.byref(first), None, ctypes.c_uint64(here))
    try:
        _driver("cuIpcGetMemHandle", ctypes.byref(handle), first)
    except RuntimeError as error:
        reason = "encoders cannot share it if PYTORCH_ALLOC_CONF has expandable_segments"
        raise RuntimeError(f"memory for embeddings: {error}; {reason}") from None
    torch.cuda.synchronize(memory.device)  # other processes do not know when it is filled
    return SharedGpuMemory(memory.device.index, bytes(handle), here - first.value, memory.nbytes)


def _open(shared: SharedGpuMemory) -> Tensor:
    """uint8, until this process ends. Every process of a machine must see the same GPUs."""
    first = ctypes.c_uint64()
    with torch.cuda.device(shared.device):
        torch.cuda.synchronize()  # then it has a context
        # 1: with access from other GPUs where it is needed.
        handle = _IpcHandle.from_buffer_copy(shared.handle)
        _driver("cuIpcOpenMemHandle_v2", ctypes.byref(first), handle, 1)
        place = first.value + shared.offset
        known = {
            "data": (place, False),
            "shape": (shared.num_bytes,),
            "typestr": "|u1",
            "version": 3,
        }
        opened = SimpleNamespace(__cuda_array_interface__=known)
        return torch.as_tensor(opened, device="cuda")
