"""Matrix products with 2 to 64 rows, where reading the weight takes most of the time.

A program multiplies a tile of the weight's rows with all rows of x on tensor cores. The weight is
the first operand: the few rows of x would fill only part of it. The kernel also adds the bias,
applies the activation and adds the residual. Knows shapes and arithmetic.

With fewer tiles than the GPU runs programs at once, several programs share a tile, and each program
takes one part of its depth (split-K). Here a tile has 4 parts, and part 1 is the last to finish:

    depth           |-- part 0 --|-- part 1 --|-- part 2 --|-- part 3 --|    of tile t
                          |            |            |            |
    store in sums     partial 0    partial 1    partial 2    partial 3       float32
                          |            |            |            |
    arrived[t]         0 -> 1       3 -> 4       1 -> 2       2 -> 3         atomic add,
                                       |                                     acquire and release
                          the old value is PARTS - 1: part 1 arrived last
                          sets arrived[t] back to 0 for the next launch
                          adds partials 0, 1, 2, 3 and writes the tile of the output

The partials are always added in the order of the depth, so the result does not depend on which part
arrives last. No program waits for another one. A tile of one part is written directly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gllm_engine.ops.kernels import HALF
from gllm_engine.ops.triton.norm_act import rms_norm
from gllm_engine.ops.triton.pdl import OVERLAP, begin, overlapping

_MAX_ROWS = 64
# Number of programs that saturates the memory bandwidth, and least depth of a part.
_PROGRAMS, _MIN_DEPTH = 96, 512
# Bytes of shared memory for one program's pipelined tiles: nearly all that a multiprocessor has.
# More pipeline stages than _MAX_STAGES bring no speed.
_TILE_BYTES, _MAX_STAGES = 226 << 10, 8
_BLOCK_K = 128
_MULTIPROCESSORS, _SHARED_ROWS = 132, 32
# Elements of each weight row that the prologue prefetches, before x is complete.
_AHEAD = 256
# Arrival counters of tiles that several programs share: fewer than _PROGRAMS tiles.
_arrived: dict[torch.device, Tensor] = {}


class Tiling(NamedTuple):
    """How a product is divided into programs and loop iterations."""

    block_n: int  # weight rows in a tile; if gated, as many rows of gate as of up
    block_k: int  # depth of one loop iteration
    parts: int  # parts of the depth, one program for each
    stages: int  # loop iterations whose tiles are in shared memory at once
    warps: int = 4


@triton.jit
def _prefetch(rows, first, end, NUMBERS: tl.constexpr):
    """Prefetch up to NUMBERS 16-bit elements of `rows` [n, 1], from `first` to at most `end`, into
    the L2 cache, in sectors of 32 bytes.
    """
    at = first + tl.arange(0, NUMBERS // 16)[None, :] * 16
    address = (rows + tl.minimum(at, end - 1)).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _load(rows, at, end, EVEN: tl.constexpr):
    return tl.load(rows + at, mask=None if EVEN else at < end, other=None if EVEN else 0.0)


@triton.jit
def _store(
    y, z, bias, out, n, m, rows, width,
    GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Store the float32 sums y (and z, the up half, if GATED), [n, m], at out[m, n]."""
    kind: tl.constexpr = out.dtype.element_ty
    if BIAS:
        y += tl.load(bias + n, mask=n < width, other=0.0).to(tl.float32)[:, None]
    if GATED:
        if BIAS:
            z += tl.load(bias + width + n, mask=n < width, other=0.0).to(tl.float32)[:, None]
        y = y.to(kind).to(tl.float32)
        y = (y / (1.0 + tl.exp(-y))).to(kind).to(tl.float32) * z.to(kind).to(tl.float32)
    place = out + m[None, :].to(tl.int64) * width + n[:, None]
    inside = (m < rows)[None, :] & (n < width)[:, None]
    if ADD:
        y += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, y.to(kind), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _skinny(
    x, weight, bias, out, sums, arrived, rows, width, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    AHEAD: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    EVEN: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    tile, part = tl.program_id(0), tl.program_id(1)
    first = tl.cdiv(tl.cdiv(depth, PARTS), BLOCK_K) * BLOCK_K
    end = tl.minimum((part + 1) * first, depth)
    first *= part
    n, m = tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    # Rows past the end repeat the last row; their results are not stored.
    row = tl.minimum(n, width - 1).to(tl.int64)[:, None]
    w_rows, up_rows = weight + row * depth, weight + (row + width) * depth
    x_rows = x + (tl.minimum(m, rows - 1) * depth)[None, :]
    if OVERLAPS:
        _prefetch(w_rows, first, end, AHEAD)
        if GATED:
            _prefetch(up_rows, first, end, AHEAD)
    begin(OVERLAPS)
    y = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    z = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(first, end, BLOCK_K):
        v = _load(x_rows, start + k[:, None], end, EVEN)
        y = tl.dot(_load(w_rows, start + k[None, :], end, EVEN), v, y)
        if GATED:
            z = tl.dot(_load(up_rows, start + k[None, :], end, EVEN), v, z)
    last = True
    if PARTS > 1:
        SIZE: tl.constexpr = BLOCK_N * BLOCK_M
        at = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + m[None, :]
        tile_sums = sums + tile * PARTS * (1 + GATED) * SIZE + at
        tl.store(tile_sums + part * SIZE, y)
        if GATED:
            tl.store(tile_sums + (PARTS + part) * SIZE, z)
        tl.debug_barrier()  # all threads have stored their partial before the arrival
        before = tl.atomic_add(arrived + tile, 1, sem="acq_rel")
        tl.debug_barrier()
        last = before == PARTS - 1
    if last:
        if PARTS > 1:
            tl.store(arrived + tile, 0)
            y, z = tl.zeros_like(y), tl.zeros_like(z)
            for i in tl.static_range(PARTS):
                y += tl.load(tile_sums + i * SIZE, cache_modifier=".cg")
                if GATED:
                    z += tl.load(tile_sums + (PARTS + i) * SIZE, cache_modifier=".cg")
        _store(y, z, bias, out, n, m, rows, width, GATED, BIAS, ADD)


def is_skinny(x: Tensor, weight: Tensor, gated: bool) -> bool:
    """Whether `skinny` takes x [rows, depth] and, as measured on Hopper, beats cuBLAS.

    A product with shared tiles loses if its programs do not all run at once, or if x has more than
    _SHARED_ROWS rows.
    """
    rows, depth = x.shape
    if not 0 < rows <= _MAX_ROWS or x.dtype not in HALF or not x.is_contiguous():
        return False
    width = weight.shape[0] // 2 if gated else weight.shape[0]
    tiling = choose_tiling(_block_m(rows), width, depth, gated)
    programs = triton.cdiv(width, tiling.block_n) * tiling.parts
    return tiling.parts == 1 or rows <= _SHARED_ROWS and programs <= _MULTIPROCESSORS


def _block_m(rows: int) -> int:
    size: int = triton.next_power_of_2(rows)
    return max(16, size)


def choose_tiling(block_m: int, width: int, depth: int, gated: bool) -> Tiling:
    """The tiling for up to `block_m` rows of `depth` and a result of `width` columns."""
    # A wide result has enough tiles even if they are larger; larger tiles read x less often.
    wide = block_m == 64 and not gated and width >= 128 * _PROGRAMS
    block_n, parts = 128 if wide else 64, 1
    while triton.cdiv(width, block_n) * parts < _PROGRAMS and depth >= 2 * parts * _MIN_DEPTH:
        parts *= 2
    step_bytes = (block_n * (1 + gated) + block_m) * _BLOCK_K * 2
    stages = min(_MAX_STAGES, _TILE_BYTES // step_bytes)
    return Tiling(block_n, _BLOCK_K, parts, stages, warps=8 if wide else 4)


def skinny(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
    out: Tensor | None = None,
    add: bool = False,
    tiling: Tiling | None = None,
) -> Tensor:
    """As `gemv`, for x [rows, depth] of 1 to 64 rows; the norm runs first, in its own kernel.

    `tiling`: default `choose_tiling`'s. Two streams of one device must not call this at once: they
    would share the arrival counters.
    """
    x = x if norm is None else rms_norm(x, *norm)
    rows, depth = x.shape
    width = weight.shape[0] // 2 if gated else weight.shape[0]
    out = x.new_empty(rows, width) if out is None else out
    block_m = _block_m(rows)
    tiling = tiling or choose_tiling(block_m, width, depth, gated)
    block_n, block_k, parts, stages, warps = tiling
    tiles = triton.cdiv(width, block_n)
    sums = arrived = x
    if parts > 1:
        sums = x.new_empty(tiles * parts * (1 + gated) * block_n * block_m, dtype=torch.float32)
        if x.device not in _arrived:
            _arrived[x.device] = torch.zeros(1024, dtype=torch.int32, device=x.device)
        arrived = _arrived[x.device]
        assert tiles <= len(arrived)
    _skinny[(tiles, parts)](
        x, weight, x if bias is None else bias, out, sums, arrived, rows, width, depth,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, PARTS=parts, AHEAD=_AHEAD,
        GATED=gated, BIAS=bias is not None, ADD=add,
        EVEN=depth % block_k == 0, OVERLAPS=OVERLAP,
        num_warps=warps, num_stages=stages, **overlapping(),
    )  # fmt: skip
    return out
