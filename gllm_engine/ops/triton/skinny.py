"""Matrix products with 2 to 64 rows, where reading the weight takes most of the time; with FP8
weights, of any number of rows.

A program multiplies a tile of the weight's rows with up to 64 rows of x, or 128, on tensor cores.
The weight is the first operand: the few rows of x would fill only part of it. The kernel also adds
the bias, applies the activation and adds the residual. Knows shapes and arithmetic.

For an FP8 weight, x is rounded to float8 too, after its norm: a row by one scale if each row of the
weight has one scale, else each 128 numbers of a row by one. Then the product of each loop iteration
is multiplied by its scales.

If several programs share a tile, each takes one part of its depth; see parts.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gllm_engine.ops.kernels import HALF, has_fp8_tiles
from gllm_engine.ops.triton.fp8 import (
    SCALE_GROUP,
    common_columns,
    quantize,
    rounding_group,
    scale_lines,
    scale_options,
)
from gllm_engine.ops.triton.launch_sizes import cdiv, next_power_of_2
from gllm_engine.ops.triton.memory import own_range
from gllm_engine.ops.triton.norm_act import rms_norm
from gllm_engine.ops.triton.parts import finish_tile, num_parts, shared_sums
from gllm_engine.ops.triton.pdl import ON_GPU, begin, overlapping
from gllm_engine.ops.weight import Fp8Weight, Rows

_MAX_ROWS = 64
# Number of programs that saturates the memory bandwidth, and least depth of a part.
_PROGRAMS, _MIN_DEPTH = 96, 512
# Bytes of shared memory for one program's pipelined tiles: nearly all that a multiprocessor has.
# More pipeline stages than _MAX_STAGES bring no speed.
_TILE_BYTES, _MAX_STAGES = 226 << 10, 8
# The same for FP8 weights and few rows: two programs share a multiprocessor, because an iteration
# waits for its product.
_FP8_PROGRAMS, _FP8_TILE_BYTES = 128, 108 << 10
_BLOCK_K = 128
# Depth of an iteration with FP8 weights whose rows have one scale, if rows are few and it has only
# one matrix.
_FP8_BLOCK_K = 256
# Most rows of a tile of x, and the pipeline stages of such tiles: more take too many registers.
_TILE_ROWS, _TILE_STAGES = 128, 4
_GROUP = tl.constexpr(SCALE_GROUP)
_MULTIPROCESSORS, _SHARED_ROWS = 132, 32
# Bytes of each weight row that the prologue prefetches, before x is complete.
_AHEAD = 512


class Tiling(NamedTuple):
    """How a product is divided into programs and loop iterations."""

    block_n: int  # weight rows in a tile; if gated, as many rows of gate as of up
    block_k: int  # depth of one loop iteration
    parts: int  # parts of the depth, one program for each
    stages: int  # loop iterations whose tiles are in shared memory at once
    warps: int = 4


@triton.jit
def _prefetch(rows, first, end, BYTES: tl.constexpr):
    """Prefetch up to BYTES bytes of `rows` [n, 1], from element `first` to at most `end`, into the
    L2 cache, in sectors of 32 bytes.
    """
    SECTOR: tl.constexpr = 256 // rows.dtype.element_ty.primitive_bitwidth
    at = first + tl.arange(0, BYTES // 32)[None, :] * SECTOR
    address = (rows + tl.minimum(at, end - 1)).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _load(rows, at, end, EVEN: tl.constexpr):
    return tl.load(rows + at, mask=None if EVEN else at < end, other=None if EVEN else 0.0)


@triton.jit
def _add_product(sums, w, v, scale, x_scale, FP8: tl.constexpr, BLOCKS: tl.constexpr):
    """sums + w v; if BLOCKS, w v times scale [n] and x_scale [m].

    FP8 tensor cores sum to some 14 bits, so float32 sums take over each product.
    """
    if BLOCKS:
        sums += tl.dot(w, v) * (scale[:, None] * x_scale[None, :])
    elif FP8:
        sums += tl.dot(w, v)
    else:
        sums = tl.dot(w, v, sums)
    return sums


@triton.jit
def _load_scales(
    at, scales, up_scales, x_scales, padded, first_column, GATED: tl.constexpr, FP8: tl.constexpr,
    COLUMNS_PER_SCALE: tl.constexpr,
):  # fmt: skip
    """Of the iteration that begins with element `at`: scales [n], of up [n], and of x [m]; zeros
    for a plain weight.
    """
    w_scale, up_scale, x_scale = 0.0, 0.0, 0.0
    if FP8:
        column = (first_column + at) // COLUMNS_PER_SCALE if COLUMNS_PER_SCALE else 0
        group = at // _GROUP if COLUMNS_PER_SCALE else 0
        w_scale = tl.load(scales + column)
        up_scale = tl.load(up_scales + column) if GATED else w_scale
        x_scale = tl.load(x_scales + group * padded)
    return w_scale, up_scale, x_scale


@triton.jit
def multiply_tile(
    w_rows, up_rows, x_rows, w_scales, up_scales, x_scales, first, end, padded, first_column,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, GATED: tl.constexpr,
    EVEN: tl.constexpr, FP8: tl.constexpr, COLUMNS_PER_SCALE: tl.constexpr,
):  # fmt: skip
    """The sums [n, m] of the elements from `first` to `end`, and those of up; zeros if not GATED.

    Rows are given by where they begin: of the weight [n, 1], of x [1, m]. So are their scales, [n]
    and [m].
    """
    k = tl.arange(0, BLOCK_K)
    y = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    z = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    w_scale, up_scale, x_scale = _load_scales(
        tl.minimum(first, end - 1), w_scales, up_scales, x_scales, padded, first_column,
        GATED, FP8, COLUMNS_PER_SCALE,
    )  # fmt: skip
    for start in range(first, end, BLOCK_K):
        if COLUMNS_PER_SCALE:  # the next iteration's scales arrive during this one
            next_w, next_up, next_x = _load_scales(
                tl.minimum(start + BLOCK_K, end - 1), w_scales, up_scales, x_scales, padded,
                first_column, GATED, FP8, COLUMNS_PER_SCALE,
            )  # fmt: skip
        v = _load(x_rows, start + k[:, None], end, EVEN)
        w = _load(w_rows, start + k[None, :], end, EVEN)
        y = _add_product(y, w, v, w_scale, x_scale, FP8, COLUMNS_PER_SCALE > 0)
        if GATED:
            w = _load(up_rows, start + k[None, :], end, EVEN)
            z = _add_product(z, w, v, up_scale, x_scale, FP8, COLUMNS_PER_SCALE > 0)
        if COLUMNS_PER_SCALE:
            w_scale, up_scale, x_scale = next_w, next_up, next_x
    if FP8 and COLUMNS_PER_SCALE == 0:
        y *= w_scale[:, None] * x_scale[None, :]
        if GATED:
            z *= up_scale[:, None] * x_scale[None, :]
    return y, z


@triton.jit
def _tile_rows(
    weight, row, depth, scales, scale_row, scale_columns,
    ROWS_PER_SCALE: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """Where rows `row` [n] of a weight begin, [n, 1], and where their scales do, [n]."""
    scales = scale_lines(scales, scale_row, row, scale_columns, ROWS_PER_SCALE, INDEXED)
    return weight + row.to(tl.int64)[:, None] * depth, scales


@triton.jit(do_not_specialize=["rows", "padded"])
def _skinny(
    x, x_scales, weight, bias, out, sums, arrived, rows, padded, width, depth,
    scales, scale_row, scale_columns, first_column,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    AHEAD: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr,
    EVEN: tl.constexpr, ROWS_PER_SCALE: tl.constexpr, COLUMNS_PER_SCALE: tl.constexpr,
    INDEXED: tl.constexpr,
):  # fmt: skip
    """See fp8.scale_options for the scales of a weight; x_scales: [groups, padded]."""
    tile, part = tl.program_id(1), tl.program_id(2)
    first = tl.cdiv(tl.cdiv(depth, PARTS), BLOCK_K) * BLOCK_K
    end = tl.minimum((part + 1) * first, depth)
    first *= part
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = own_range(0, BLOCK_M)
    # Rows past the end repeat the last row; their results are not stored.
    row, x_row = tl.minimum(n, width - 1), tl.minimum(m, rows - 1)
    w_rows, w_scales = _tile_rows(
        weight, row, depth, scales, scale_row, scale_columns, ROWS_PER_SCALE, INDEXED
    )
    up_rows, up_scales = _tile_rows(
        weight, row + width if GATED else row, depth, scales, scale_row, scale_columns,
        ROWS_PER_SCALE, INDEXED,
    )  # fmt: skip
    x_rows = x + (x_row.to(tl.int64) * depth)[None, :]
    if ON_GPU:
        _prefetch(w_rows, first, end, AHEAD)
        if GATED:
            _prefetch(up_rows, first, end, AHEAD)
    begin()
    y, z = multiply_tile(
        w_rows, up_rows, x_rows, w_scales, up_scales, x_scales + x_row, first, end, padded,
        first_column, BLOCK_N, BLOCK_M, BLOCK_K, GATED, EVEN, ROWS_PER_SCALE > 0,
        COLUMNS_PER_SCALE,
    )  # fmt: skip
    finish_tile(
        y, z, sums, arrived, tile * tl.num_programs(0) + tl.program_id(0), part, bias, out, n, m,
        rows, width, PARTS, GATED, ADD,
    )  # fmt: skip


def is_skinny(x: Tensor, weight: Tensor, gated: bool) -> bool:
    """Whether `skinny` takes x [rows, depth] and, as measured on Hopper, beats cuBLAS.

    A product with shared tiles loses if its programs do not all run at once, or if x has more than
    _SHARED_ROWS rows.
    """
    rows, depth = x.shape
    if not 0 < rows <= _MAX_ROWS or x.dtype not in HALF:
        return False
    width = len(weight) // (1 + gated)
    tiling = choose_tiling(rows, width, depth, gated)
    programs = cdiv(width, tiling.block_n) * tiling.parts
    return tiling.parts == 1 or rows <= _SHARED_ROWS and programs <= _MULTIPROCESSORS


def has_tiles(x: Rows, weight: Fp8Weight) -> bool:
    """Whether `skinny` multiplies x [rows, depth] by the weight."""
    return len(x) > 0 and has_fp8_tiles(x.dtype, common_columns(weight))


def _block_m(rows: int) -> int:
    size: int = next_power_of_2(rows)
    return min(max(16, size), _TILE_ROWS)


def choose_tiling(rows: int, width: int, depth: int, gated: bool) -> Tiling:
    """The tiling for a plain weight, up to _MAX_ROWS `rows` of `depth` and `width` columns."""
    # A wide result has enough tiles even if they are larger; larger tiles read x less often.
    wide = rows > 32 and not gated and width >= 128 * _PROGRAMS
    block_n = 128 if wide else 64
    parts = num_parts(cdiv(width, block_n), _PROGRAMS, depth, _MIN_DEPTH)
    step_bytes = (block_n * (1 + gated) + _block_m(rows)) * _BLOCK_K * 2
    stages = min(_MAX_STAGES, _TILE_BYTES // step_bytes)
    return Tiling(block_n, _BLOCK_K, parts, stages, warps=8 if wide else 4)


def choose_fp8_tiling(rows: int, width: int, depth: int, gated: bool, columns: int) -> Tiling:
    """As choose_tiling, for an FP8 weight and any number of rows; `columns`: its common_columns."""
    block_m = _block_m(rows)
    many = rows > _MAX_ROWS
    # With blocks, sums of 128 x 128 and their scales would not fit in the registers of 8 warps.
    block_n = 128 if many and not gated and not columns else 64
    block_k = min(columns, SCALE_GROUP)
    if not columns:
        block_k = _BLOCK_K if many or gated else _FP8_BLOCK_K
    tiles = cdiv(width, block_n) * cdiv(rows, block_m)
    parts = num_parts(tiles, _FP8_PROGRAMS, depth, _MIN_DEPTH)
    step_bytes = (block_n * (1 + gated) + block_m) * block_k
    stages = _TILE_STAGES if many else min(_MAX_STAGES, _FP8_TILE_BYTES // step_bytes)
    large = block_n * (1 + gated) > 64
    return Tiling(block_n, block_k, parts, stages, warps=8 if many and large else 4)


def skinny(
    x: Rows,
    weight: Tensor | Fp8Weight,
    bias: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
    out: Tensor | None = None,
    add: bool = False,
    tiling: Tiling | None = None,
) -> Tensor:
    """As `gemv`, for x [rows, depth] of 1 to 64 rows, or of any number with an FP8 weight. The norm
    runs first, in its own kernel, which also rounds x for an FP8 weight.

    `tiling`: default `choose_tiling`'s. Two streams of one device must not call this at once: they
    would share the arrival counters.
    """
    rows, depth = x.shape
    width = len(weight) // (1 + gated)
    if out is None:
        out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if isinstance(weight, Tensor):
        assert isinstance(x, Tensor)
        numbers = weight
        x_numbers = x if norm is None else rms_norm(x, *norm)
        x_scales = x
        tiling = tiling or choose_tiling(rows, width, depth, gated)
    else:
        numbers = weight.numbers
        columns = common_columns(weight)
        rounded = quantize(x, rounding_group(weight), norm)
        x_numbers = rounded.numbers
        x_scales = rounded.scales
        tiling = tiling or choose_fp8_tiling(rows, width, depth, gated, columns)
    block_n, block_k, parts, stages, warps = tiling
    block_m = _block_m(rows)
    grid = cdiv(rows, block_m), cdiv(width, block_n), parts
    size = (1 + gated) * block_n * block_m
    sums, arrived = shared_sums(out, grid[0] * grid[1], parts, size)
    _skinny[grid](
        x_numbers, x_scales, numbers, bias, out, sums, arrived, rows,
        len(x_numbers), width, depth, **scale_options(weight),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, PARTS=parts, AHEAD=_AHEAD,
        GATED=gated, ADD=add,
        EVEN=depth % block_k == 0,
        num_warps=warps, num_stages=stages, **overlapping(),
    )  # fmt: skip
    return out
