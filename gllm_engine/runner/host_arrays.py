"""Numbers that the host makes for the device: packed, and copied without anybody waiting."""

from __future__ import annotations

import struct

import numpy as np
import torch
from torch import Tensor

from gllm_engine.ops import HostInts


def int_array(*lists: list[int]) -> HostInts:
    """An int64 array of all lists, read-only; np.array takes two to three times as long."""
    packed = [struct.pack(f"{len(values)}q", *values) for values in lists]
    return np.frombuffer(b"".join(packed), np.int64)


def pack(device: torch.device, *arrays: HostInts) -> Tensor:
    """Arrays of one type and one dimension after each other on the host, in memory from which
    copies to `device` need not be waited for.
    """
    dtype = torch.from_numpy(np.empty(0, arrays[0].dtype)).dtype
    packed = torch.empty(sum(map(len, arrays)), dtype=dtype, pin_memory=device.type != "cpu")
    np.concatenate(arrays, out=packed.numpy())
    return packed


def to_device(device: torch.device, *arrays: HostInts) -> tuple[Tensor, ...]:
    """Arrays of one type and one dimension, in a single copy that the host does not wait for."""
    there = pack(device, *arrays).to(device, non_blocking=True)
    return torch.split(there, [len(array) for array in arrays])
