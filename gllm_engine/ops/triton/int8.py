"""Kernels around a library's product of int8 matrices: rows to int8, and int32 sums to results.

Knows shapes and arithmetic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gllm_engine.ops.triton.fp8 import quantize
from gllm_engine.ops.triton.memory import load, load_wide, program, store_rounded
from gllm_engine.ops.triton.pdl import begin_alone, overlapping
from gllm_engine.ops.weight import Int8Weight

_COLUMNS = 1024


def round_rows(x: Tensor, norm: tuple[Tensor, float] | None = None) -> tuple[Tensor, Tensor]:
    """x [rows, dim], or its RMS norm, as int8 [padded, dim] times float32 scales [padded].

    `padded`: at least 32, and a multiple of 16; rows past the end are zeros.
    """
    rounded = quantize(x, norm=norm, dtype=torch.int8)
    return rounded.numbers, rounded.scales.flatten()


@triton.jit
def _rescale(
    sums, row_scales, scales, bias, out, width,
    BIAS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    begin_alone()
    row = program(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < width
    at = row * width + n
    y = load_wide(sums + at, inside)
    y *= tl.load(row_scales + row) * load(scales + n, inside)
    if BIAS:
        y += load_wide(bias + n, inside)
    if ADD:
        y += load_wide(out + at, inside)
    store_rounded(out + at, y, inside)


def rescale(
    sums: Tensor,
    row_scales: Tensor,
    weight: Int8Weight,
    bias: Tensor | None,
    out: Tensor,
    add: bool = False,
) -> None:
    """Write sums * row_scales * weight.scales + bias to `out` [rows, width], or add it to `out`.

    `sums`: int32 [at least rows, width], contiguous, as `out` is; `row_scales`: of each row.
    """
    rows, width = out.shape
    assert out.is_contiguous()
    _rescale[(rows, triton.cdiv(width, _COLUMNS))](
        sums, row_scales, weight.scales, weight.scales if bias is None else bias, out, width,
        BIAS=bias is not None, ADD=add, BLOCK=_COLUMNS, **overlapping(),
    )  # fmt: skip
