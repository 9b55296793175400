"""Matrix products with one row of x, where reading the weight takes all the time.

A program holds a few whole weight rows in registers. It issues all their loads together, before the
kernel that computes x has ended (see pdl.py). The kernel also applies the RMS norm, adds the bias,
applies the activation and adds the residual. Not only bytes but also instructions limit its speed:
a row is cut into chunks in which each thread loads 16 bytes at once, and only a last, incomplete
chunk is masked. Knows shapes and arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gllm_engine.ops.kernels import HALF
from gllm_engine.ops.triton.pdl import OVERLAP, begin, overlapping

# Weight elements of one load of a thread, and most weight elements in a thread's registers.
_LOADED: tl.constexpr = tl.constexpr(8)
_HELD = 128
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
def _widen(numbers, PAIRS: tl.constexpr):
    """To float32. PAIRS: bfloat16 on a GPU, by one instruction per element instead of two."""
    if PAIRS:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [numbers],
            dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return numbers.to(tl.float32)


@triton.jit
def _gemv(
    x, gain, weight, bias, out, width, eps,
    DEPTH: tl.constexpr, BLOCK_N: tl.constexpr, LANES: tl.constexpr, EVEN: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = (DEPTH + LANES * _LOADED - 1) // (LANES * _LOADED)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < width
    # Rows past the end repeat the last row; their results are not stored.
    row = (n if EVEN else tl.minimum(n, width - 1)).to(tl.int64)[None, :, None]
    w, up, g, v = (), (), (), ()
    for i in tl.static_range(CHUNKS):
        w += (_load_chunk(weight + row * DEPTH, i, DEPTH, LANES, True),)
        if GATED:
            up += (_load_chunk(weight + (row + width) * DEPTH, i, DEPTH, LANES, True),)
    if NORM:
        for i in tl.static_range(CHUNKS):
            g += (_load_chunk(gain + tl.zeros((1, 1, 1), tl.int32), i, DEPTH, LANES, False),)
    begin(OVERLAPS)
    kind: tl.constexpr = out.dtype.element_ty
    PAIRS: tl.constexpr = OVERLAPS and kind == tl.bfloat16
    for i in tl.static_range(CHUNKS):
        v += (_load_chunk(x + tl.zeros((1, 1, 1), tl.int32), i, DEPTH, LANES, False),)
    if NORM:
        squares = tl.zeros((LANES, 1), tl.float32)
        for i in tl.static_range(CHUNKS):
            squares += tl.sum(_widen(v[i], PAIRS) * _widen(v[i], PAIRS), 2)
        scale = tl.rsqrt(tl.sum(squares, 0) / DEPTH + eps)[None, :, None]
    y, z = tl.zeros((LANES, BLOCK_N), tl.float32), tl.zeros((LANES, BLOCK_N), tl.float32)
    for i in tl.static_range(CHUNKS):
        number = _widen(v[i], PAIRS)
        if NORM:
            number = _widen((number * scale).to(kind), PAIRS) * _widen(g[i], PAIRS)
            number = _widen(number.to(kind), PAIRS)
        y += tl.sum(_widen(w[i], PAIRS) * number, 2)
        if GATED:
            z += tl.sum(_widen(up[i], PAIRS) * number, 2)
    y = tl.sum(y, 0)
    if BIAS:
        y += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        z = tl.sum(z, 0)
        if BIAS:
            z += tl.load(bias + width + n, mask=inside, other=0.0).to(tl.float32)
        y = y.to(kind).to(tl.float32)
        y = (y / (1.0 + tl.exp(-y))).to(kind).to(tl.float32)
        y *= z.to(kind).to(tl.float32)
    if ADD:
        y += tl.load(out + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + n, y.to(kind), mask=inside)


def is_single(x: Tensor) -> bool:
    """Whether `gemv` supports x [rows, depth]: one row, of a 16-bit dtype."""
    return x.shape[0] == 1 and x.dtype in HALF


def gemv(
    x: Tensor,
    weight: Tensor,
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
    depth = x.shape[1]
    width = weight.shape[0] // 2 if gated else weight.shape[0]
    out = x.new_empty(1, width) if out is None else out
    warps = _WARPS if depth <= _SHORT else _LONG_WARPS
    lanes = min(32 * warps, triton.next_power_of_2(triton.cdiv(depth, _LOADED.value)))
    held = max(1, 32 * warps * _HELD // (depth * (1 + gated)))
    block_n = 1 << (held.bit_length() - 1)
    gain, eps = (x, 0.0) if norm is None else norm
    _gemv[(triton.cdiv(width, block_n),)](
        x, gain, weight, x if bias is None else bias, out, width, eps,
        DEPTH=depth, BLOCK_N=block_n, LANES=lanes, EVEN=width % block_n == 0,
        NORM=norm is not None, GATED=gated, BIAS=bias is not None, ADD=add, OVERLAPS=OVERLAP,
        num_warps=warps, **overlapping(),
    )  # fmt: skip
    return out
