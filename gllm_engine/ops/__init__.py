"""Tensor operations with one interface, `Ops`, for every kind of device.

`reference` is plain torch: the CPU backend, and the oracle for the tests of the others. Knows no
models.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from gllm_engine.ops.batch import Batch, HostInts, ImageRows
from gllm_engine.ops.protocol import (
    AttentionInputs,
    AttentionLayer,
    AttentionPlan,
    AttentionPlanner,
    HeadNorm,
    IndexQueries,
    Norm,
    Ops,
    PagedPlan,
    PlainSampling,
    RecurrentState,
    RotaryInputs,
)
from gllm_engine.ops.segments import Attend, Segments
from gllm_engine.ops.weight import (
    MAX_MXFP4_SCALE,
    Fp8Weight,
    Int8Weight,
    PackedWeight,
    RoundedRows,
    Rows,
    Weight,
    dequantized,
    empty_packed,
    pack,
    pack_codes,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
    quantize_mxfp4,
)

__all__ = [
    "MAX_MXFP4_SCALE",
    "Attend",
    "AttentionInputs",
    "AttentionLayer",
    "AttentionPlan",
    "AttentionPlanner",
    "Batch",
    "RoundedRows",
    "Fp8Weight",
    "HeadNorm",
    "HostInts",
    "ImageRows",
    "IndexQueries",
    "Int8Weight",
    "Norm",
    "Ops",
    "PackedWeight",
    "PagedPlan",
    "PlainSampling",
    "RecurrentState",
    "RotaryInputs",
    "Rows",
    "Segments",
    "Weight",
    "best_device",
    "dequantized",
    "empty_packed",
    "pack",
    "pack_codes",
    "quantize_fp8",
    "quantize_int4",
    "quantize_int8",
    "quantize_mxfp4",
    "select_ops",
]


def best_device() -> torch.device:
    """cuda if a GPU is available and its operations are installed (the [gpu] extra), else cpu."""
    fast = torch.cuda.is_available() and find_spec("flashinfer") and find_spec("triton")
    return torch.device("cuda" if fast else "cpu")


def select_ops(device: torch.device) -> Ops:
    """The implementation of `Ops` for a device; chosen once, when a model is built.

    Raises ValueError for an unsupported kind of device.
    """
    if device.type == "cpu":
        from gllm_engine.ops import reference

        return reference
    if device.type == "cuda":  # imported late: only the [gpu] extra installs its kernels
        from gllm_engine.ops import flashinfer

        return flashinfer
    if device.type == "meta":
        from gllm_engine.ops import meta

        return meta
    raise ValueError(f"device {device} has no operations; supported: cpu, cuda, meta")
