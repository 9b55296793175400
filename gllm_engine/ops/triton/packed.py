"""Matrix products with weights of 4-bit numbers, which are decoded in registers.

The weight is the first operand of a product, because only a first operand may be in registers: its
numbers never pass through shared memory. A tile of words of a run gives four matrices of 32
columns, each with one scale per row (see PackedWeight), and so four products:

    words       [rows, 32]                       of a run of 128 columns
    first       [rows, 32] x [32, rows of x]     columns  0 .. 31 of the run, and of x
    second      [rows, 32] x [32, rows of x]     columns 32 .. 63
    ...

Knows shapes and arithmetic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gllm_engine.ops.weight import E2M1_PLACES, RUN, RUN_WORDS, PackedWeight

_RUN, _WORDS = tl.constexpr(RUN), tl.constexpr(RUN_WORDS)
_PLACES = tl.constexpr(E2M1_PLACES)
_KINDS = {
    torch.uint8: tl.uint8,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}


@triton.jit
def _load(at, inside, EVEN: tl.constexpr):
    return tl.load(at, mask=None if EVEN else inside, other=None if EVEN else 0)


@triton.jit
def _codes(words, INDEX: tl.constexpr, IS_FLOAT: tl.constexpr):
    """The codes of number INDEX of each word."""
    words = words.to(tl.int32)
    if IS_FLOAT:
        codes = ((words >> _PLACES[INDEX][0] & 1) << 3) | (words >> _PLACES[INDEX][1] & 7)
    else:
        codes = words >> 4 * INDEX & 15
    return codes


@triton.jit
def _values(codes, zero, IS_FLOAT: tl.constexpr):
    """The float32 values of codes: of whole numbers code - zero. Those of e2m1: sign, 2 bits of
    exponent, 1 of mantissa.
    """
    if IS_FLOAT:
        size = codes & 7
        bits = tl.where(size >= 2, (size + 252) << 22, tl.where(size == 1, 0x3F000000, 0))
        values = (bits | (codes >> 3 << 31)).to(tl.float32, bitcast=True)
    else:
        values = codes.to(tl.float32) - zero
    return values


@triton.jit
def _factors(bits, kind: tl.constexpr):
    """The float32 values of scales, from their bits; `kind`: of the scales, uint8 for e2m1."""
    if kind == tl.uint8:
        factors = tl.where(bits > 0, bits << 23, 0x400000).to(tl.float32, bitcast=True)
    elif kind == tl.float16:
        factors = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif kind == tl.bfloat16:
        factors = (bits << 16).to(tl.float32, bitcast=True)
    else:
        factors = bits.to(tl.float32, bitcast=True)
    return factors


@triton.jit
def _add_run(
    sums, words, x_0, x_1, x_2, x_3, scales, line, run, width,
    GROUP: tl.constexpr, SCALE: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """sums [lines, n] + the product of a run of the rows `line` of a PackedWeight with x.

    words: [lines, 32]. x_0 to x_3: [32, n], columns of the run.
    """
    IS_FLOAT: tl.constexpr = SCALE == tl.uint8
    BITS: tl.constexpr = SCALE.primitive_bitwidth
    NUM: tl.constexpr = 1 if ZEROS else 32 // BITS
    word = tl.zeros_like(line)
    for i in tl.static_range(4):
        group = (run * _RUN + 32 * i) // GROUP
        if i == 0 or 32 * i % (GROUP * NUM) == 0:
            word = tl.load(scales + group // NUM * width + line)
        bits = word >> group % NUM * BITS
        zero = 8.0
        if ZEROS:
            zero = _factors((bits >> BITS) & ((1 << BITS) - 1), SCALE)[:, None]
        if BITS < 32:
            bits = bits & ((1 << BITS) - 1)
        x = x_0 if i == 0 else x_1 if i == 1 else x_2 if i == 2 else x_3
        values = (
            _values(_codes(words, i, IS_FLOAT), zero, IS_FLOAT) * _factors(bits, SCALE)[:, None]
        )
        sums = tl.dot(values.to(x.dtype), x, sums, input_precision="ieee")
    return sums


@triton.jit
def run_words(depth):
    """Words of a row of a PackedWeight."""
    return tl.cdiv(depth, _RUN) * _WORDS


@triton.jit
def multiply_packed(
    x, numbers, scales, line, up_line, width, depth,
    GROUP: tl.constexpr, SCALE: tl.constexpr, ZEROS: tl.constexpr, GATED: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """The float32 products of rows of a PackedWeight with rows of x, [lines, n]; if GATED, of the
    rows `line` and of the rows `up_line`, else the same ones twice.

    x: [1, n], where rows of x begin. `scales`: of the weight [width, depth], as int32. SCALE: their
    dtype. ZEROS: there are zero points beside them.
    """
    column, at = tl.arange(0, _WORDS)[:, None], tl.arange(0, _WORDS)[None, :]
    words = run_words(depth)
    tile = numbers + line.to(tl.int64)[:, None] * words + at
    up_tile = numbers + up_line.to(tl.int64)[:, None] * words + at
    sums = tl.zeros([line.shape[0], x.shape[1]], tl.float32)
    ups = sums
    x += column
    for run in range(tl.cdiv(depth, _RUN)):
        k = run * _RUN
        x_0 = tl.load(x + k)
        x_1 = _load(x + k + 32, k + 32 < depth, EVEN)
        x_2 = _load(x + k + 64, k + 64 < depth, EVEN)
        x_3 = _load(x + k + 96, k + 96 < depth, EVEN)
        w = tl.load(tile + run * _WORDS)
        sums = _add_run(sums, w, x_0, x_1, x_2, x_3, scales, line, run, width, GROUP, SCALE, ZEROS)
        if GATED:
            w = tl.load(up_tile + run * _WORDS)
            ups = _add_run(
                ups, w, x_0, x_1, x_2, x_3, scales, up_line, run, width, GROUP, SCALE, ZEROS
            )
    return sums, ups


def scale_words(weight: PackedWeight) -> tuple[Tensor, tl.dtype]:
    """A weight's scales as int32 [..., n, width], and their dtype."""
    scales = weight.scales
    return scales.view(torch.int32).squeeze(-1), _KINDS[scales.dtype]
