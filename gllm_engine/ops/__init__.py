"""Operations on tensors behind one dispatch: the same names for every kind of device.

Knows no models. `reference` is plain torch: the CPU backend, and the oracle of any other.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from gllm_engine.ops.batch import Batch, HostInts, TensorGroup

__all__ = ["Batch", "HostInts", "TensorGroup", "best_device", "select_ops"]

# Imported on demand: the kernels of a GPU are not installed where there is none.
_BY_DEVICE = {"cpu": "reference", "cuda": "flashinfer"}


def best_device() -> torch.device:
    """The fastest device that is there and whose operations are installed (the [gpu] extra)."""
    fast = torch.cuda.is_available() and find_spec("flashinfer") and find_spec("triton")
    return torch.device("cuda" if fast else "cpu")


def select_ops(device: torch.device) -> ModuleType:
    """The implementation for a device; chosen once, when a model is built.

    Raises ValueError for a kind of device that has none.
    """
    if device.type not in _BY_DEVICE:
        raise ValueError(f"device {device} has no operations; supported: {', '.join(_BY_DEVICE)}")
    return import_module(f"gllm_engine.ops.{_BY_DEVICE[device.type]}")
