"""Kernels for float8_e4m3fn and int8: the rows of a product, after an RMS norm or an activation;
weights back to numbers. For other kernels: float8 numbers in another dtype, and where the scales of
a weight are.

Sums are float32; intermediate results are rounded where torch rounds. Knows shapes and arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gllm_engine.ops.triton.launch_sizes import cdiv, next_power_of_2
from gllm_engine.ops.triton.memory import own_range, program
from gllm_engine.ops.triton.norm_act import activated
from gllm_engine.ops.triton.pdl import begin, begin_alone, overlapping
from gllm_engine.ops.weight import Fp8Weight, Int8Weight, RoundedRows, Rows

# The least scale: of a row of zeros, which stays zero.
LEAST_SCALE: tl.constexpr = tl.constexpr(1e-10)
# Rows of an input are filled up to a multiple of this, which the library's products need.
_ROW_MULTIPLE = 16
_LEAST_ROWS = {torch.float8_e4m3fn: 0, torch.int8: 32}
LARGEST_FLOAT8, _LARGEST_INT8 = tl.constexpr(448.0), tl.constexpr(127.0)
_COLUMNS = 1024
_QUANTIZED = 2048  # columns of a program, at least a group, if there is no norm
# Numbers of a row of x that share a scale, if scales of the weight belong to blocks.
SCALE_GROUP = 128


@triton.jit
def from_float8(numbers, kind: tl.constexpr):
    """Numbers in another dtype; those of float8_e4m3fn are exact in all, and NaN stays NaN.

    A GPU has instructions from float8 to float16, and from there to float32 and to bfloat16. The
    last one, which Triton would use, takes eight times as long as the way over float32.
    """
    if numbers.dtype == tl.float8e4nv and kind == tl.bfloat16:
        numbers = numbers.to(tl.float32)
    return numbers.to(kind)


@triton.jit
def split_float8(pairs, ON_GPU: tl.constexpr):
    """The first and the second float8_e4m3fn number of each int16, exactly, in float16.

    Of a tile in shared memory, threads load pairs where they would load transposed float8 numbers
    one byte at a time.
    """
    if ON_GPU:  # of registers with two pairs
        return tl.inline_asm_elementwise(
            "{.reg .b32 t; .reg .b16 l, h; prmt.b32 t, $2, 0, 0x3120; mov.b32 {l, h}, t;"
            "cvt.rn.f16x2.e4m3x2 $0, l; cvt.rn.f16x2.e4m3x2 $1, h;}", "=r,=r,r", [pairs],
            dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        first = (pairs & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        second = (pairs >> 8 & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        return first.to(tl.float16), second.to(tl.float16)


@triton.jit
def scale_to_float8(v):
    """Rows v [rows, columns] over their scales [rows], so that they fit float8; the scales."""
    s = tl.maximum(tl.max(tl.abs(v), 1) / LARGEST_FLOAT8, LEAST_SCALE)
    # Division may round a little above the largest number, beyond which float8 has none.
    v /= s[:, None]
    return tl.clamp(v, -LARGEST_FLOAT8, LARGEST_FLOAT8, propagate_nan=tl.PropagateNan.ALL), s


@triton.jit
def scale_lines(
    scales, scale_row, row, scale_columns, ROWS_PER_SCALE: tl.constexpr, INDEXED: tl.constexpr
):  # fmt: skip
    """Where the scales of each row of a weight begin, if it has scales; see scale_options."""
    if INDEXED:
        scales += tl.load(scale_row + row) * scale_columns
    elif ROWS_PER_SCALE > 0:
        scales += row // ROWS_PER_SCALE * scale_columns
    return scales


def scale_options(weight: Tensor | Fp8Weight | Int8Weight) -> dict[str, Any]:
    """The scales of a weight or a stack, as named arguments of a kernel.

    ROWS_PER_SCALE is 0 without scales, COLUMNS_PER_SCALE is 0 if a row has only one.
    """
    if isinstance(weight, Tensor):
        return {
            "scales": weight,
            "scale_row": weight,
            "scale_columns": 0,
            "first_column": 0,
            "ROWS_PER_SCALE": 0,
            "COLUMNS_PER_SCALE": 0,
            "INDEXED": False,
        }
    index = weight.scale_row
    columns = weight.scales.shape[-1]
    return {
        "scales": weight.scales,
        "scale_row": weight.scales if index is None else index,
        "scale_columns": columns,
        "first_column": weight.first_column,
        "ROWS_PER_SCALE": weight.rows_per_scale,
        "COLUMNS_PER_SCALE": weight.columns_per_scale if columns > 1 else 0,
        "INDEXED": index is not None,
    }


def common_columns(weight: Fp8Weight | Int8Weight) -> int:
    """The largest power of two c so that each c columns of a weight or a stack, from the first on,
    have one scale; 0: all columns have.
    """
    if weight.scales.shape[-1] == 1:
        return 0
    ends = weight.columns_per_scale | weight.first_column
    return ends & -ends


def rounding_group(weight: Fp8Weight) -> int | None:
    """The numbers of a row that share a scale, if it is rounded for a product; None: all."""
    return SCALE_GROUP if weight.scales.shape[-1] > 1 else None


@triton.jit
def _quantize(
    x, gain, numbers, scales, rows, dim, x_row, eps,
    NORM: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """GROUPS of a row; GROUP numbers share a scale. `scales`: [groups, rows of the grid]. ACT: "":
    none. A norm takes all of a row.
    """
    row = program(0)
    group = own_range(1, GROUPS)
    at = (group * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
    inside = at < dim
    if NORM:
        g = tl.load(gain + at, mask=inside, other=0.0).to(tl.float32)
    begin()
    kind: tl.constexpr = x.dtype.element_ty
    line = x + row * x_row
    mask = inside & (row < rows)
    v = tl.load(line + at, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(tl.sum(v * v, 1), 0) / dim + eps)
        v = ((v * scale).to(kind).to(tl.float32) * g).to(kind).to(tl.float32)
    if ACT != "":
        v = activated(v, ACT).to(kind).to(tl.float32)
        if GATED:
            up = tl.load(line + dim + at, mask=mask, other=0.0).to(tl.float32)
            v = (v * up).to(kind).to(tl.float32)
    if numbers.dtype.element_ty == tl.int8:
        s = tl.maximum(tl.max(tl.abs(v), 1) / _LARGEST_INT8, LEAST_SCALE)
        s += tl.sum(v * 0.0, 1)  # int8 has no NaN, so the scale of a row with one is NaN
        v = tl.floor(v / s[:, None] + 0.5)
        v = tl.where(v == v, v, 0.0)
    else:
        v, s = scale_to_float8(v)
    tl.store(numbers + row * dim + at, v.to(numbers.dtype.element_ty), mask=inside)
    tl.store(scales + group * tl.num_programs(0) + row, s, mask=group * GROUP < dim)


def new_rounded(
    like: Rows,
    size: tuple[int, int],
    columns: int | None,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> RoundedRows:
    """Memory for rows [size], on the device and of the dtype of `like`, to be rounded to `dtype`;
    see quantize.
    """
    rows, dim = size
    padded = max(_LEAST_ROWS[dtype], cdiv(rows, _ROW_MULTIPLE) * _ROW_MULTIPLE)
    numbers = torch.empty(padded, dim, dtype=dtype, device=like.device)
    groups = 1 if columns is None else cdiv(dim, columns)
    scales = torch.empty(groups, padded, dtype=torch.float32, device=like.device)
    return RoundedRows(numbers, scales.T, rows, like.dtype)


def quantize(
    x: Rows,
    columns: int | None = None,
    norm: tuple[Tensor, float] | None = None,
    act: tuple[str, bool] | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> RoundedRows:
    """x [rows, dim], its RMS norm, or its activation, rounded to `dtype`, float8_e4m3fn or int8; x
    itself if it has been rounded.

    Rows of x may lie apart. `columns`: a power of two, so many numbers of a row share a scale;
    None: all of them. The rows of the result are filled up to a multiple of 16, and those of int8
    to 32 at least. The scales of a group lie side by side in memory. `act`: (act, gated) of
    Ops.activate; the result has the bits of its rounded result.
    """
    if not isinstance(x, Tensor):
        assert norm is None and act is None
        return x
    rows, dim = x.shape
    name, gated = ("", False) if act is None else act
    dim //= 1 + gated
    group = next_power_of_2(dim) if columns is None else columns
    groups = cdiv(dim, group)
    some = next_power_of_2(groups)
    if norm is None:
        some = min(some, max(_QUANTIZED // group, 1))
    warps = group * some // (512 if norm is None or columns else 1024)
    found = new_rounded(x, (rows, dim), columns, dtype)
    gain, eps = (x, 0.0) if norm is None else norm
    if rows:
        _quantize[(len(found.numbers), cdiv(groups, some))](
            x, gain, found.numbers, found.scales, rows, dim, x.stride(0), eps,
            NORM=norm is not None, ACT=name, GATED=gated,
            GROUPS=some, GROUP=group,
            num_warps=min(max(warps, 1), 16), **overlapping(),
        )  # fmt: skip
    return found


@triton.jit
def _dequantize(
    numbers, scales, scale_row, out, depth, columns, first_column,
    ROWS_PER_SCALE: tl.constexpr, COLUMNS_PER_SCALE: tl.constexpr, INDEXED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`columns`: of the scales."""
    begin_alone()
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < depth
    line = tl.load(scale_row + row) if INDEXED else row // ROWS_PER_SCALE
    column = (first_column + at) // COLUMNS_PER_SCALE
    s = tl.load(scales + line * columns + column, mask=inside, other=0.0)
    number = tl.load(numbers + row * depth + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * depth + at, (number * s).to(out.dtype.element_ty), mask=inside)


def dequantize(weight: Fp8Weight | Int8Weight, dtype: torch.dtype) -> Tensor:
    """The matrix [width, depth] that a weight stands for, in `dtype`."""
    width, depth = weight.shape
    out = torch.empty(width, depth, dtype=dtype, device=weight.numbers.device)
    index = weight.scale_row
    _dequantize[(width, cdiv(depth, _COLUMNS))](
        weight.numbers, weight.scales, weight.scales if index is None else index, out, depth,
        weight.scales.shape[1], weight.first_column, ROWS_PER_SCALE=weight.rows_per_scale,
        COLUMNS_PER_SCALE=weight.columns_per_scale, INDEXED=index is not None, BLOCK=_COLUMNS,
        **overlapping(),
    )  # fmt: skip
    return out
