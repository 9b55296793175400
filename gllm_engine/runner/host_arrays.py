"""Integers from the host to the device: packed into one array, copied without a wait."""

from __future__ import annotations

import struct

import numpy as np
import torch
from torch import Tensor

from gllm_engine.ops import HostInts
from gllm_engine.types import ImagePixels


def int_array(*lists: list[int]) -> HostInts:
    """One read-only int64 array of all lists in order; np.array is two to three times slower."""
    packed = [struct.pack(f"{len(values)}q", *values) for values in lists]
    return np.frombuffer(b"".join(packed), np.int64)


def pack(device: torch.device, *arrays: HostInts) -> Tensor:
    """Concatenate 1-D arrays of one dtype on the host, in pinned memory if `device` is a GPU.

    The host need not wait for a copy from pinned memory.
    """
    dtype = torch.from_numpy(np.empty(0, arrays[0].dtype)).dtype
    packed = torch.empty(sum(map(len, arrays)), dtype=dtype, pin_memory=device.type == "cuda")
    np.concatenate(arrays, out=packed.numpy())
    return packed


def to_device(device: torch.device, *arrays: HostInts) -> tuple[Tensor, ...]:
    """Copy 1-D arrays of one dtype to `device` in a single copy; the host does not wait for it."""
    there = pack(device, *arrays).to(device, non_blocking=True)
    return torch.split(there, [len(array) for array in arrays])


def pixels_of(image: ImagePixels, device: torch.device) -> Tensor:
    """uint8 [frames, height, width, 3] on `device`; the host does not wait for the copy."""
    (pixels,) = to_device(device, np.frombuffer(image.pixels, np.uint8))
    return pixels.view(-1, image.height, image.width, 3)
