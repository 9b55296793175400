"""Memory of a rank into which other processes, the encoders, write embeddings of images.

The rank owns it, so an encoder that dies while it writes leaves only a place that nobody reads.
This module knows places and numbers; the engine says what is where.
"""

from __future__ import annotations

import mmap
import os
import weakref
from functools import partial
from math import prod

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


def _share(memory: Tensor) -> SharedGpuMemory:
    shared = SharedGpuMemory(*memory.untyped_storage()._share_cuda_())
    # Torch would keep the memory until every process has closed it, which a killed one never does.
    torch.UntypedStorage._release_ipc_counter(
        shared.counter, shared.counter_offset, device=memory.device
    )
    return shared


def _open(shared: SharedGpuMemory) -> Tensor:
    """uint8. Every process of a machine must see the same GPUs."""
    torch.cuda.init()
    storage = torch.UntypedStorage._new_shared_cuda(
        shared.device,
        shared.handle,
        shared.num_bytes,
        shared.offset,
        shared.counter,
        shared.counter_offset,
        shared.event,
        shared.waits,
    )
    memory = torch.empty(0, dtype=torch.uint8, device=torch.device("cuda", shared.device))
    return memory.set_(storage)
