"""Matrix products with weights of 4-bit numbers, which are decoded in registers.

The weight is the first operand of a product, because only a first operand may be in registers: its
numbers never pass through shared memory. The words of a run (see PackedWeight) give four matrices
of 32 columns, each with one scale per row. Side by side they are 128 columns, in the order of x:
threads hold the same rows and columns of all four, so that no number has to move.

    words of a run    [lines, 32]
    their numbers     [lines, 32] [lines, 32] [lines, 32] [lines, 32]    each times its scales
    product           [lines, 128] x [128, rows of x]

On a Hopper GPU a bfloat16 number takes about two instructions, with two numbers in a register. An
e2m1 code, shifted and masked, is the bits of its value times 2^-126, and one product with the scale
makes a number of it; sums are 2^-_SHIFT of the true ones, so that no factor is infinite. An INT4
code in the last bits of 128 gives a bfloat16 number, from which 136 is subtracted. If the scales
have another dtype than x, or if there are zero points, the numbers become float32 in between, which
takes about twice as many instructions. All of this is exact but the product with an INT4 scale: a
number is rounded once, as in PackedWeight.dequantized.
Knows shapes and arithmetic.
"""

from __future__ import annotations

from typing import NamedTuple, TypeGuard

import torch
import triton
import triton.language as tl
from torch import Tensor

from gllm_engine.ops.kernels import PACKED_ROWS
from gllm_engine.ops.triton.launch_sizes import cdiv, next_power_of_2
from gllm_engine.ops.triton.memory import load, own_range
from gllm_engine.ops.triton.norm_act import rms_norm
from gllm_engine.ops.triton.parts import finish_tile, num_parts, shared_sums
from gllm_engine.ops.triton.pdl import ON_GPU, begin, begin_alone, overlapping
from gllm_engine.ops.weight import (
    E2M1_PLACES,
    MAX_MXFP4_SCALE,
    RUN,
    RUN_WORDS,
    PackedWeight,
    Weight,
)

_RUN, _WORDS = tl.constexpr(RUN), tl.constexpr(RUN_WORDS)
_PLACES = tl.constexpr(E2M1_PLACES)
_KINDS = {
    torch.uint8: tl.uint8,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}
# Number of programs that saturates the memory bandwidth; least loop iterations of a part.
_PROGRAMS, _MIN_TURNS = 256, 4
_LINES = 32  # rows of a program of _dequantize_packed
# A factor is 2^126, of the code, times 2^(s - 127), of the scale, times 2^-_SHIFT. As a bfloat16 it
# is s + _EXPONENT in bits 7 to 14.
_SHIFT = MAX_MXFP4_SCALE - 128
_EXPONENT = tl.constexpr(126 - _SHIFT)
_TO_TRUE = tl.constexpr(2.0**_SHIFT)


def _shift(into: str, places: int) -> str:
    """Assembly: the words $1, shifted to the left, or to the right by -places."""
    return f"shl.b32 {into}, $1, {places};" if places >= 0 else f"shr.b32 {into}, $1, {-places};"


def _e2m1_code(first: int, others: int) -> str:
    """Assembly: of two words $1, the bits of two bfloat16 numbers, the values of e2m1 codes times
    2^-126, in a; see E2M1_PLACES.
    """
    both = (15 - first, 6 - others)
    code = _shift("a", both[0])
    if both[0] == both[1]:
        return code + "and.b32 a, a, 0x81c081c0;"
    if min(both) > 0:  # a product shifts both; of these places, no two bits meet
        code = f"and.b32 a, $1, {(1 << first | 7 << others) * 0x10001};"
        code += f"mul.lo.u32 a, a, {(1 << both[0]) + (1 << both[1])};"
        return code + "and.b32 a, a, 0x81c081c0;"
    code += _shift("b", both[1])
    return code + "and.b32 b, b, 0x01c001c0; lop3.b32 a, a, 0x80008000, b, 0xea;"


def _int4_code(index: int, base: int) -> str:
    """Assembly: of two words $1, two numbers base + code in a. `base`: the bits of a number of
    which the last bit counts 1.
    """
    return _shift("a", -4 * index) + f"and.b32 a, a, 0x000f000f; or.b32 a, a, {base * 0x10001};"


def _scaled_e2m1(first: int, others: int) -> str:
    """Two bfloat16 numbers $0 from two words $1 and their factors $2."""
    return "{.reg .b32 a, b;" + _e2m1_code(first, others) + "mul.bf16x2 $0, a, $2;}"


def _scaled_int4(index: int, kind: str, base: int) -> str:
    """Two numbers $0 from two words $1 and their scales $2: base + code - (base + 8)."""
    code = _int4_code(index, base) + f"mov.b32 b, {(base + 8) * 0x10001}; sub.{kind} a, a, b;"
    return "{.reg .b32 a, b;" + code + f"mul.{kind} $0, a, $2;" + "}"


def _float32(code: str) -> str:
    """Two float32 numbers $0, $1 from two words $2, which `code` turns into bfloat16 numbers."""
    code = code.replace("$1", "$2")
    return "{.reg .b32 a, b;" + code + "shl.b32 $0, a, 16; and.b32 $1, a, 0xffff0000;}"


_BFLOAT_128, _HALF_1024 = 0x4300, 0x6400  # the bits of these numbers
_E2M1_ASSEMBLY = tl.constexpr(tuple(_scaled_e2m1(*places) for places in E2M1_PLACES))
_INT4_ASSEMBLY = tl.constexpr(tuple(_scaled_int4(i, "bf16x2", _BFLOAT_128) for i in range(4)))
_HALF_INT4_ASSEMBLY = tl.constexpr(tuple(_scaled_int4(i, "f16x2", _HALF_1024) for i in range(4)))
_WIDE_E2M1_ASSEMBLY = tl.constexpr(tuple(_float32(_e2m1_code(*places)) for places in E2M1_PLACES))
_WIDE_INT4_ASSEMBLY = tl.constexpr(tuple(_float32(_int4_code(i, _BFLOAT_128)) for i in range(4)))
INT4_BASE = tl.constexpr(128.0)  # what wide_numbers adds to whole numbers on a GPU


@triton.jit
def _decode_pairs(words, bits, INDEX: tl.constexpr, IS_FLOAT: tl.constexpr, kind: tl.constexpr):
    """As _decode, by a Hopper GPU's instructions for two 16-bit numbers. `kind`: of INT4 scales."""
    factors = (bits + _EXPONENT) * 0x00800080 if IS_FLOAT else bits * 0x00010001
    if kind == tl.float16:
        return tl.inline_asm_elementwise(
            _HALF_INT4_ASSEMBLY[INDEX], "=r,r,r,r", [words, factors[:, None]],
            dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            (_E2M1_ASSEMBLY if IS_FLOAT else _INT4_ASSEMBLY)[INDEX], "=r,r,r,r",
            [words, factors[:, None]], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def wide_numbers(words, INDEX: tl.constexpr, IS_FLOAT: tl.constexpr, ON_GPU: tl.constexpr):
    """Number INDEX of each word in float32, without scales and zero points. On a GPU, whole numbers
    are INT4_BASE greater, and others are multiplied by 2^-126.
    """
    if ON_GPU:
        return tl.inline_asm_elementwise(
            (_WIDE_E2M1_ASSEMBLY if IS_FLOAT else _WIDE_INT4_ASSEMBLY)[INDEX], "=r,=r,r", [words],
            dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return code_values(word_codes(words, INDEX, IS_FLOAT), 0.0, IS_FLOAT)


@triton.jit
def word_codes(words, INDEX: tl.constexpr, IS_FLOAT: tl.constexpr):
    """The codes of number INDEX of each word."""
    words = words.to(tl.int32)
    if IS_FLOAT:
        codes = ((words >> _PLACES[INDEX][0] & 1) << 3) | (words >> _PLACES[INDEX][1] & 7)
    else:
        codes = words >> 4 * INDEX & 15
    return codes


@triton.jit
def code_values(codes, zero, IS_FLOAT: tl.constexpr):
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
def scale_values(bits, SCALE: tl.constexpr):
    """The float32 values of scales, from their bits."""
    if SCALE == tl.uint8:
        factors = tl.where(bits > 0, bits << 23, 0x400000).to(tl.float32, bitcast=True)
    elif SCALE == tl.float16:
        factors = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif SCALE == tl.bfloat16:
        factors = (bits << 16).to(tl.float32, bitcast=True)
    else:
        factors = bits.to(tl.float32, bitcast=True)
    return factors


@triton.jit
def _decode(
    words, bits, zero, INDEX: tl.constexpr, SCALE: tl.constexpr, kind: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """Number INDEX of each word [lines, 32] times the scale of its line, whose bits are `bits`.

    `zero`: the zero point of whole numbers, [lines, 1].
    """
    IS_FLOAT: tl.constexpr = SCALE == tl.uint8
    scale = scale_values(bits, SCALE)[:, None]
    if NATIVE and not IS_FLOAT:  # (base + code) * scale - (base + zero) * scale: rounded once
        numbers = wide_numbers(words, INDEX, False, True) * scale - (INT4_BASE + zero) * scale
    else:
        numbers = code_values(word_codes(words, INDEX, IS_FLOAT), zero, IS_FLOAT) * scale
    return numbers.to(kind)


@triton.jit
def _load(at, inside, EVEN: tl.constexpr):
    return tl.load(at, mask=None if EVEN else inside, other=None if EVEN else 0)


@triton.jit
def _decode_run(
    words, scales, line, first, width, inside, INDEX: tl.constexpr,
    GROUP: tl.constexpr, SCALE: tl.constexpr, ZEROS: tl.constexpr, kind: tl.constexpr,
    PAIRS: tl.constexpr, NATIVE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The numbers [lines, 128] of the run first + INDEX of rows, from its words [lines, 32].

    `scales`: of the row 0. The scales of the run `first` begin 4 bytes. `inside`: whether the run
    exists, unless EVEN.
    """
    BITS: tl.constexpr = SCALE.primitive_bitwidth
    # Columns whose scales are in the same 4 bytes.
    SPAN: tl.constexpr = GROUP if ZEROS else GROUP * (32 // BITS)
    parts = ()
    four = tl.zeros_like(line)
    for i in tl.static_range(4):
        column = _RUN * INDEX + 32 * i
        if i == 0 or column % SPAN == 0:
            place = scales + (first * _RUN // SPAN + column // SPAN) * width + line
            four = _load(place, inside, EVEN)
        bits = four >> column % SPAN // GROUP * BITS
        zero = 8.0
        if ZEROS:
            zero = scale_values((bits >> BITS) & ((1 << BITS) - 1), SCALE)[:, None]
        if BITS < 32:
            bits = bits & ((1 << BITS) - 1)
        if PAIRS:
            parts += (_decode_pairs(words, bits, i, SCALE == tl.uint8, kind),)
        else:
            parts += (_decode(words, bits, zero, i, SCALE, kind, NATIVE),)
    first_parts = tl.join(parts[0], parts[1])  # type: ignore[misc]
    all_parts = tl.join(first_parts, tl.join(parts[2], parts[3]))  # type: ignore[misc]
    return tl.reshape(tl.permute(all_parts, [0, 3, 2, 1]), [line.shape[0], _RUN])


@triton.jit
def run_words(depth):
    """Words of a row of a PackedWeight."""
    return tl.cdiv(depth, _RUN) * _WORDS


@triton.jit
def multiply_packed(
    x, present, numbers, scales, line, up_line, width, depth, start, end,
    GROUP: tl.constexpr, SCALE: tl.constexpr, ZEROS: tl.constexpr, RUNS: tl.constexpr,
    GATED: tl.constexpr, EVEN: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The float32 products of rows of a PackedWeight with rows of x, [lines, n], in the columns
    `start` to `end` - 1; if GATED, of the rows `line` and of the rows `up_line`, else the same ones
    twice.

    x: [1, n], where rows of x begin. `present`: [1, n]; other rows are zeros, and are not read: it
    would take as much of the L2 cache's bandwidth as the weight. `scales`: of the weight [width,
    depth], as int32. SCALE: their dtype. ZEROS: whether there are zero points beside them. RUNS: of
    one turn, whose scales begin 4 bytes; `start` begins a turn. EVEN: all turns have 128 * RUNS
    columns. NATIVE: a Hopper GPU.
    """
    kind: tl.constexpr = x.dtype.element_ty
    IS_FLOAT: tl.constexpr = SCALE == tl.uint8
    HALF: tl.constexpr = kind == tl.bfloat16 or (kind == tl.float16 and not IS_FLOAT)
    PAIRS: tl.constexpr = NATIVE and HALF and (IS_FLOAT or (SCALE == kind and not ZEROS))
    at, word = tl.arange(0, _RUN)[:, None], tl.arange(0, _WORDS)[None, :]
    tile = numbers + line.to(tl.int64)[:, None] * run_words(depth) + word
    up_tile = numbers + up_line.to(tl.int64)[:, None] * run_words(depth) + word
    sums = tl.zeros([line.shape[0], x.shape[1]], tl.float32)
    ups = sums
    runs = tl.cdiv(end, _RUN)
    WHOLE: tl.constexpr = EVEN or RUNS == 1
    for first in range(start // _RUN, runs, RUNS):
        for i in tl.static_range(RUNS):
            run = first + i
            inside = run < runs
            here = present if EVEN else present & (run * _RUN + at < end)
            v = load(x + (run * _RUN + at), here)
            words = _load(tile + run * _WORDS, inside, WHOLE)
            w = _decode_run(
                words, scales, line, first, width, inside, i, GROUP, SCALE, ZEROS, kind, PAIRS,
                NATIVE, WHOLE,
            )  # fmt: skip
            sums = tl.dot(w, v, sums, input_precision="ieee")
            if GATED:
                words = _load(up_tile + run * _WORDS, inside, WHOLE)
                w = _decode_run(
                    words, scales, up_line, first, width, inside, i, GROUP, SCALE, ZEROS, kind,
                    PAIRS, NATIVE, WHOLE,
                )  # fmt: skip
                ups = tl.dot(w, v, ups, input_precision="ieee")
    if PAIRS and IS_FLOAT:
        sums *= _TO_TRUE
        ups *= _TO_TRUE
    return sums, ups


@triton.jit(do_not_specialize=["rows"])
def _packed(
    x, numbers, scales, bias, out, sums, arrived, rows, width, depth,
    GROUP: tl.constexpr, SCALE: tl.constexpr, ZEROS: tl.constexpr, RUNS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    GATED: tl.constexpr, ADD: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Program (tile, part) multiplies one part of the depth; see parts.py."""
    begin()
    tile, part = tl.program_id(0), tl.program_id(1)
    turns = tl.cdiv(width, COLUMNS)
    row = tile // turns * ROWS + tl.arange(0, ROWS)
    column = tile % turns * COLUMNS + tl.arange(0, COLUMNS)
    line = tl.minimum(column, width - 1)
    up_line = line + width if GATED else line
    start = tl.cdiv(tl.cdiv(depth, PARTS), _RUN * RUNS) * (_RUN * RUNS)
    end = tl.minimum((part + 1) * start, depth)
    y, z = multiply_packed(
        x + row.to(tl.int64)[None, :] * depth, (row < rows)[None, :],
        numbers, scales, line, up_line, width * 2 if GATED else width, depth, part * start, end,
        GROUP, SCALE, ZEROS, RUNS, GATED, EVEN, ON_GPU,
    )  # fmt: skip
    finish_tile(
        y, z, sums, arrived, tile, part, bias, out, column, row, rows, width, PARTS, GATED, ADD,
    )  # fmt: skip


class PackedTiles(NamedTuple):
    """The tile that one program computes, and its launch parameters."""

    rows: int  # of x
    columns: int  # rows of the weight; if gated, as many of gate as of up
    runs: int  # of one loop iteration
    warps: int
    stages: int


# (most rows of x, tiles). The first operand of a Hopper GPU's warpgroup product has 64 rows.
_TILES = (
    (16, PackedTiles(16, 64, 2, 4, 4)),
    (32, PackedTiles(32, 64, 2, 4, 3)),
    (64, PackedTiles(64, 64, 1, 4, 3)),
    (PACKED_ROWS, PackedTiles(128, 128, 1, 8, 3)),
)
_EXACT_TILES = PackedTiles(16, 32, 1, 4, 2)  # for float32, which tensor cores would round


def _choose_tiles(rows: int, runs: int) -> PackedTiles:
    """`runs`: that a turn needs; with 128 rows of x, two would exceed the registers."""
    found = next(tiles for most, tiles in _TILES if rows <= most)
    return found if runs <= found.runs or found.rows <= 64 else _TILES[-2][1]


def is_packed_product(weight: Weight, x: Tensor) -> TypeGuard[PackedWeight]:
    """Whether packed_linear is to multiply x [rows, depth]; see PACKED_ROWS."""
    return isinstance(weight, PackedWeight) and 0 < len(x) <= PACKED_ROWS


def packed_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
    out: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """As `gemv`, for x [rows, depth] of 1 to PACKED_ROWS rows and 4-bit numbers.

    Two streams of one device must not call this at once: they would share the arrival counters.
    """
    x = x.contiguous() if norm is None else rms_norm(x, *norm)
    rows, depth = x.shape
    width = len(weight) // (1 + gated)
    out = x.new_empty(rows, width) if out is None else out
    exact = x.dtype == torch.float32
    tiles = _EXACT_TILES if exact else _choose_tiles(rows, runs_of_turn(weight))
    columns = min(tiles.columns, max(16, next_power_of_2(width)))
    runs = runs_of_turn(weight, tiles.runs)
    programs = cdiv(rows, tiles.rows) * cdiv(width, columns)
    parts = num_parts(programs, _PROGRAMS, depth, _MIN_TURNS * runs * RUN)
    sums, arrived = shared_sums(out, programs, parts, (1 + gated) * tiles.rows * columns)
    scales, kind = scale_words(weight)
    _packed[(programs, parts)](
        x, weight.numbers, scales, bias, out, sums, arrived, rows, width,
        depth, GROUP=weight.group, SCALE=kind, ZEROS=weight.zeros, RUNS=runs, ROWS=tiles.rows,
        COLUMNS=columns, PARTS=parts, GATED=gated, ADD=add,
        EVEN=depth % (RUN * runs) == 0,
        num_warps=tiles.warps, num_stages=tiles.stages, **overlapping(),
    )  # fmt: skip
    return out


@triton.jit
def _dequantize_packed(
    numbers, scales, out, width, depth,
    GROUP: tl.constexpr, SCALE: tl.constexpr, ZEROS: tl.constexpr, RUNS: tl.constexpr,
    LINES: tl.constexpr,
):  # fmt: skip
    """Program (i, j) makes LINES rows of the runs of turn j."""
    begin_alone()
    first = tl.program_id(1) * RUNS
    at = own_range(0, LINES)
    line = tl.minimum(at, width - 1)
    tile = numbers + line.to(tl.int64)[:, None] * run_words(depth) + tl.arange(0, _WORDS)[None, :]
    kind: tl.constexpr = out.dtype.element_ty
    for i in tl.static_range(RUNS):
        run = first + i
        inside = run * _RUN < depth
        words = _load(tile + run * _WORDS, inside, RUNS == 1)
        matrix = _decode_run(
            words, scales, line, first, width, inside, i, GROUP, SCALE, ZEROS, kind, False,
            False, RUNS == 1,
        )  # fmt: skip
        column = run * _RUN + tl.arange(0, _RUN)
        place = out + line.to(tl.int64)[:, None] * depth + column[None, :]
        tl.store(place, matrix, mask=(at < width)[:, None] & (column < depth)[None, :])


def dequantize_packed(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """PackedWeight.dequantized of a matrix [width, depth]."""
    width, depth = weight.shape
    scales, kind = scale_words(weight)
    runs = runs_of_turn(weight)
    out = torch.empty(width, depth, dtype=dtype, device=scales.device)
    _dequantize_packed[(cdiv(width, _LINES), cdiv(depth, RUN * runs))](
        weight.numbers, scales, out, width, depth, GROUP=weight.group, SCALE=kind,
        ZEROS=weight.zeros, RUNS=runs, LINES=_LINES, **overlapping(),
    )  # fmt: skip
    return out


def runs_of_turn(weight: PackedWeight, least: int = 1) -> int:
    """Runs of 128 columns in a turn of multiply_packed; `least` is a power of two."""
    groups = 1 if weight.zeros else weight.scales.shape[-1]  # whose scales are 4 bytes
    return max(1, least, weight.group * groups // RUN)


def scale_words(weight: PackedWeight) -> tuple[Tensor, tl.dtype]:
    """A weight's scales as int32 [..., n, width], and their dtype."""
    scales = weight.scales
    return scales.view(torch.int32).squeeze(-1), _KINDS[scales.dtype]
