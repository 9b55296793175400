"""Matrix products with one row of x, where reading the weight takes all the time.

A program holds a few whole weight rows in registers. It issues all their loads together, before the
kernel that computes x has ended (see pdl.py). The kernel also applies the RMS norm, adds the bias,
applies the activation and adds the residual. Not only bytes but also instructions limit its speed:
a row is cut into chunks in which each thread loads 8 numbers at once, and only a last, incomplete
chunk is masked. The norm's scale is a factor of the results, so that no product waits for it.

x is not rounded for an FP8 or int8 weight, whose numbers are exact in float32. If scales belong to
blocks, a thread multiplies the sum over each of its loads by a scale. Knows shapes and arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gllm_engine.ops.kernels import HALF, has_fp8_gemv
from gllm_engine.ops.triton.fp8 import common_columns, scale_lines, scale_options
from gllm_engine.ops.triton.launch_sizes import cdiv, next_power_of_2
from gllm_engine.ops.triton.memory import load_wide, own_range, store_rounded
from gllm_engine.ops.triton.pdl import ON_GPU, begin, overlapping
from gllm_engine.ops.weight import Fp8Weight, Int8Weight, Rows

# Weight elements of one load of a thread. With as many elements of x, 16 bytes, a thread has the
# elements of x that it multiplies its weights by; with more, they would go through shared memory.
_LOADED: tl.constexpr = tl.constexpr(8)
# Most bytes of weight in a thread's registers.
_HELD = 256
# Longest short row in elements; warps of a program for short rows and for longer rows.
_SHORT, _WARPS, _LONG_WARPS = 8192, 4, 8


@triton.jit
def _load_chunk(
    rows, i: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr, ONCE: tl.constexpr
):  # fmt: skip
    """Chunk i, [LANES, n, _LOADED], of n rows of DEPTH elements; `rows`: [1, n, 1] their starts.

    ONCE: no other program reads these rows.
    """
    at = (tl.arange(0, LANES) * _LOADED)[:, None, None] + tl.arange(0, _LOADED)[None, None, :]
    at += i * LANES * _LOADED
    FULL: tl.constexpr = (i + 1) * LANES * _LOADED <= DEPTH
    return tl.load(
        rows + at, mask=None if FULL else at < DEPTH, other=None if FULL else 0.0,
        eviction_policy="evict_first" if ONCE else "",
    )  # fmt: skip


@triton.jit
def widen(numbers, ON_GPU: tl.constexpr):
    """To float32; bfloat16 on a GPU by one instruction per element instead of two."""
    if ON_GPU and numbers.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [numbers],
            dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return numbers.to(tl.float32)


@triton.jit
def _load_rows(
    weight, row, scales, scale_row, scale_columns, first_column,
    DEPTH: tl.constexpr, LANES: tl.constexpr, ROWS_PER_SCALE: tl.constexpr,
    COLUMNS_PER_SCALE: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """(the chunks of rows `row` [n], scales): of each chunk [LANES, n], or one of each row, [n]."""
    w, s = (), ()
    rows = weight + row.to(tl.int64)[None, :, None] * DEPTH
    for i in tl.static_range((DEPTH + LANES * _LOADED - 1) // (LANES * _LOADED)):
        w += (_load_chunk(rows, i, DEPTH, LANES, True),)
    if ROWS_PER_SCALE:
        lines = scale_lines(scales, scale_row, row, scale_columns, ROWS_PER_SCALE, INDEXED)
        if COLUMNS_PER_SCALE:
            for i in tl.static_range(len(w)):
                at = tl.minimum((i * LANES + tl.arange(0, LANES)) * _LOADED, DEPTH - 1)
                column = (first_column + at) // COLUMNS_PER_SCALE
                s += (tl.load(lines[None, :] + column[:, None]),)
        else:
            s += (tl.load(lines),)
    return w, s


@triton.jit
def _dot_rows(
    w, s, v, LANES: tl.constexpr, COLUMNS_PER_SCALE: tl.constexpr, ON_GPU: tl.constexpr
):  # fmt: skip
    """Products with x, float32 [n], of what _load_rows returns; v: the chunks of x in float32."""
    y = tl.zeros((LANES, w[0].shape[1]), tl.float32)
    for i in tl.static_range(len(w)):
        part = tl.sum(widen(w[i], ON_GPU) * v[i], 2)
        y += part * s[i] if COLUMNS_PER_SCALE else part
    y = tl.sum(y, 0)
    return y * s[0] if len(s) == 1 and not COLUMNS_PER_SCALE else y


@triton.jit
def _gemv(
    x, gain, weight, bias, out, width, eps, scales, scale_row, scale_columns, first_column,
    DEPTH: tl.constexpr, BLOCK_N: tl.constexpr, LANES: tl.constexpr, EVEN: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr,
    ROWS_PER_SCALE: tl.constexpr, COLUMNS_PER_SCALE: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """See fp8.scale_options for the scales of a weight."""
    n = own_range(0, BLOCK_N)
    inside = n < width
    # Rows past the end repeat the last row; their results are not stored.
    row = n if EVEN else tl.minimum(n, width - 1)
    w, s = _load_rows(
        weight, row, scales, scale_row, scale_columns, first_column,
        DEPTH, LANES, ROWS_PER_SCALE, COLUMNS_PER_SCALE, INDEXED,
    )  # fmt: skip
    if GATED:
        up, up_s = _load_rows(
            weight, row + width, scales, scale_row, scale_columns, first_column,
            DEPTH, LANES, ROWS_PER_SCALE, COLUMNS_PER_SCALE, INDEXED,
        )  # fmt: skip
    g, v = (), ()
    if NORM:
        for i in tl.static_range(len(w)):
            g += (_load_chunk(gain + tl.zeros((1, 1, 1), tl.int32), i, DEPTH, LANES, False),)
    begin()
    for i in tl.static_range(len(w)):
        x_chunk = _load_chunk(x + tl.zeros((1, 1, 1), tl.int32), i, DEPTH, LANES, False)
        v += (widen(x_chunk, ON_GPU),)
    if NORM:
        squares, weighted = tl.zeros((LANES, 1), tl.float32), ()
        for i in tl.static_range(len(w)):
            squares += tl.sum(v[i] * v[i], 2)
            weighted += (v[i] * widen(g[i], ON_GPU),)
        v = weighted
        scale = tl.rsqrt(tl.sum(squares, 0) / DEPTH + eps)
    y = _dot_rows(w, s, v, LANES, COLUMNS_PER_SCALE, ON_GPU)
    if NORM:
        y *= scale
    kind: tl.constexpr = out.dtype.element_ty
    if bias is not None:
        y += load_wide(bias + n, inside)
    if GATED:
        z = _dot_rows(up, up_s, v, LANES, COLUMNS_PER_SCALE, ON_GPU)
        if NORM:
            z *= scale
        if bias is not None:
            z += load_wide(bias + width + n, inside)
        y = y.to(kind).to(tl.float32)
        y = (y / (1.0 + tl.exp(-y))).to(kind).to(tl.float32)
        y *= z.to(kind).to(tl.float32)
    if ADD:
        y += load_wide(out + n, inside)
    store_rounded(out + n, y, inside)


def is_single(x: Rows, weight: Tensor | Fp8Weight | Int8Weight) -> bool:
    """Whether `gemv` multiplies x [rows, depth] by the weight: one row, of a 16-bit dtype."""
    if x.shape[0] != 1:
        return False
    if isinstance(weight, Tensor):
        return x.dtype in HALF
    return has_fp8_gemv(x.dtype, common_columns(weight))


def gemv(
    x: Tensor,
    weight: Tensor | Fp8Weight | Int8Weight,
    bias: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
    out: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """x W' + b: [1, width], for x [1, depth] and weight [width, depth].

    `norm`: (gain, eps) of an RMS norm of x. `gated`: the weight is [gate, up], the result
    silu(gate) * up, [1, width / 2]. `out`: receives the result; with `add` it is added to `out`.
    """
    numbers = weight if isinstance(weight, Tensor) else weight.numbers
    depth = x.shape[1]
    width = len(weight) // (1 + gated)
    out = x.new_empty(1, width) if out is None else out
    warps = _WARPS if depth <= _SHORT else _LONG_WARPS
    lanes = min(32 * warps, next_power_of_2(cdiv(depth, _LOADED.value)))
    held = max(1, 32 * warps * _HELD // (depth * numbers.itemsize * (1 + gated)))
    block_n = 1 << (held.bit_length() - 1)
    gain, eps = (x, 0.0) if norm is None else norm
    _gemv[(cdiv(width, block_n),)](
        x, gain, numbers, bias, out, width, eps, **scale_options(weight),
        DEPTH=depth, BLOCK_N=block_n, LANES=lanes, EVEN=width % block_n == 0,
        NORM=norm is not None, GATED=gated, ADD=add,
        num_warps=warps, **overlapping(),
    )  # fmt: skip
    return out
