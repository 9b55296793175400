"""Operations on tensors behind one dispatch: the same names for every kind of device.

Knows no models. `reference` is plain torch: the CPU backend, and the oracle of any other.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch

from gllm_engine.ops.batch import Batch

__all__ = ["Batch", "select_ops"]

# Imported on demand: the kernels of a GPU are not installed where there is none.
_BY_DEVICE = {"cpu": "reference", "cuda": "flashinfer"}


def select_ops(device: torch.device) -> ModuleType:
    """The implementation for a device; chosen once, when a model is built.

    Raises ValueError for a kind of device that has none.
    """
    if device.type not in _BY_DEVICE:
        raise ValueError(f"device {device} has no operations; supported: {', '.join(_BY_DEVICE)}")
    return import_module(f"gllm_engine.ops.{_BY_DEVICE[device.type]}")
