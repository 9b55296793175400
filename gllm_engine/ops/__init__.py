"""Operations on tensors behind one dispatch: the same names for every kind of device.

Knows no models. `reference` is plain torch: the CPU backend, and the oracle of any other.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from gllm_engine.ops.batch import Batch, HostInts, TensorGroup
from gllm_engine.ops.protocol import (
    AttentionInputs,
    AttentionPlan,
    Norm,
    Ops,
    PlainSampling,
    RotaryInputs,
)

__all__ = [
    "AttentionInputs",
    "AttentionPlan",
    "Batch",
    "HostInts",
    "Norm",
    "Ops",
    "PlainSampling",
    "RotaryInputs",
    "TensorGroup",
    "best_device",
    "select_ops",
]


def best_device() -> torch.device:
    """The fastest device that is there and whose operations are installed (the [gpu] extra)."""
    fast = torch.cuda.is_available() and find_spec("flashinfer") and find_spec("triton")
    return torch.device("cuda" if fast else "cpu")


def select_ops(device: torch.device) -> Ops:
    """The implementation for a device; chosen once, when a model is built.

    Raises ValueError for a kind of device that has none.
    """
    if device.type == "cpu":
        from gllm_engine.ops import reference

        return reference
    if device.type == "cuda":  # its kernels are not installed where there is no GPU
        from gllm_engine.ops import flashinfer

        return flashinfer
    raise ValueError(f"device {device} has no operations; supported: cpu, cuda")
