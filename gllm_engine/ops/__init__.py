"""Operations on tensors behind one dispatch: the same names for every kind of device.

Knows no models. `reference` is plain torch: the CPU backend, and the oracle of any other.
"""

from __future__ import annotations

from types import ModuleType

import torch

from gllm_engine.ops import reference
from gllm_engine.ops.batch import Batch

__all__ = ["Batch", "best_device", "select_ops"]

_BY_DEVICE: dict[str, ModuleType] = {"cpu": reference}


def best_device() -> torch.device:
    """The fastest device that is there and has operations."""
    fast = "cuda" in _BY_DEVICE and torch.cuda.is_available()
    return torch.device("cuda" if fast else "cpu")


def select_ops(device: torch.device) -> ModuleType:
    """The implementation for a device; chosen once, when a model is built.

    Raises ValueError for a kind of device that has none.
    """
    if device.type not in _BY_DEVICE:
        raise ValueError(f"device {device} has no operations; supported: {', '.join(_BY_DEVICE)}")
    return _BY_DEVICE[device.type]
