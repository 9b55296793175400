"""The experts of a few tokens, where reading their matrices takes all the time.

A pair is a token and one of its experts. Each pair reads its expert's matrices for itself, so that
pairs need no sorting; two pairs of one expert run at about the same time and find its matrix in the
L2 cache. There are two kernels:

    gate_up   program (pair, columns)     hidden[pair] = silu(gate x) * up x
    down      program (token, columns)    the sum over the token's experts, added to the output

As in gemv.py, a program holds some whole rows in registers, issues all their loads together, and
multiplies by ordinary instructions. Lanes are the threads of a row; if a row is short, several
groups of lanes have rows of their own. The routing says which rows, so gate_up cannot load them
before the routing has ended; but down can while gate_up runs, see pdl.py.

A thread loads 8 numbers of a row at once, or 8 words of 4-bit numbers, whose 32 numbers have the
columns of 4 loads of x. Knows shapes and arithmetic.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from gllm_engine.ops.triton.fp8 import common_columns, scale_lines, scale_options
from gllm_engine.ops.triton.gemv import widen
from gllm_engine.ops.triton.launch_sizes import cdiv, next_power_of_2
from gllm_engine.ops.triton.packed import (
    INT4_BASE,
    scale_values,
    scale_words,
    wide_numbers,
)
from gllm_engine.ops.triton.pdl import ON_GPU, begin, begin_alone, overlapping
from gllm_engine.ops.weight import RUN, RUN_WORDS, Fp8Weight, PackedWeight, Weight
from gllm_engine.routing import Clamp

# Numbers or words of one load of a thread.
_LOADED: tl.constexpr = tl.constexpr(8)
_RUN = tl.constexpr(RUN)
_WORDS = tl.constexpr(RUN_WORDS)
# For e2m1 numbers, x is multiplied by _FACTOR and the scales' exponents grow by _EXPONENT, which
# cancel the 2^-126 of wide_numbers: so no product is subnormal.
_EXPONENT = tl.constexpr(63)
_FACTOR = tl.constexpr(2.0**63)
# Most bytes of weights in a thread's registers: more of 4-bit numbers, whose rows take x through
# more instructions, which several rows of a thread share.
_HELD = 256
_PACKED_HELD = 384
_THREADS = 32  # of a warp
_MOST_COLUMNS = 32  # of a program
# Warps of a program; of one with rows of more bytes than _LONG_BYTES, which 4 would not hold.
_WARPS = 4
_LONG_WARPS = 8
_LONG_BYTES = 16384
# Most pairs, as a share of all experts: with more pairs, many would read the same matrices.
_MOST_PAIRS = 0.5


@triton.jit
def activate_gated(gate, up, LIMIT: tl.constexpr, SLOPE: tl.constexpr):
    """See Clamp; without a LIMIT silu(gate) * up."""
    if LIMIT is None:
        out = gate / (1.0 + tl.exp(-gate)) * up
    else:  # tl.minimum would lose NaN
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        out = gate / (1.0 + tl.exp(-SLOPE * gate)) * (up + 1.0)
    return out


@triton.jit
def _load_rows(
    numbers, scales, scale_row, row, lines, here, scale_columns, first_column,
    DEPTH: tl.constexpr, LANES: tl.constexpr, KIND: tl.constexpr, SPAN: tl.constexpr,
    ROWS_PER_SCALE: tl.constexpr, COLUMNS_PER_SCALE: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """(chunks, scales) of rows `row` [g, n] of one expert's matrix of `lines` rows, zeros unless
    `here`.

    A chunk is what all threads load at once, [LANES, g, n, _LOADED]. Its scales are those of each
    load, [LANES, g, n]; of 4-bit numbers, words of 4 bytes for each SPAN columns of a load. All
    rows may have one scale each, [1, g, n], which comes first and alone.
    """
    PACKED: tl.constexpr = KIND == "packed"
    WIDTH: tl.constexpr = (DEPTH + _RUN - 1) // _RUN * _WORDS if PACKED else DEPTH
    w, s = (), ()
    starts = numbers + row.to(tl.int64)[None, :, :, None] * WIDTH
    if KIND == "fp8":
        scales = scale_lines(scales, scale_row, row, scale_columns, ROWS_PER_SCALE, INDEXED)
        scales = scales[None, :, :]
        if COLUMNS_PER_SCALE == 0:
            s += (tl.load(scales, mask=here, other=0.0),)
    for i in tl.static_range((WIDTH + LANES * _LOADED - 1) // (LANES * _LOADED)):
        load = (i * LANES + tl.arange(0, LANES))[:, None, None]
        at = (load * _LOADED)[:, :, :, None] + tl.arange(0, _LOADED)[None, None, None, :]
        inside = (at < WIDTH) & here
        w += (tl.load(starts + at, mask=inside, other=0.0, eviction_policy="evict_first"),)
        first = tl.minimum(load * _LOADED, WIDTH - 1)  # of an existing load
        if KIND == "fp8" and COLUMNS_PER_SCALE > 0:
            column = (first_column + first) // COLUMNS_PER_SCALE
            s += (tl.load(scales + column, mask=here, other=0.0),)
        if PACKED:
            column = first // _WORDS * _RUN
            for part in tl.static_range(0, _RUN, SPAN if SPAN < _RUN else _RUN):
                place = (column + part) // SPAN * lines + row[None, :, :]
                s += (tl.load(scales + place, mask=here, other=0),)
    return w, s


@triton.jit
def _load_x(
    x, here, DEPTH: tl.constexpr, LANES: tl.constexpr, GROUPS: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """What each thread multiplies its loads of weights by, [LANES, GROUPS, 1, _LOADED]: a load of x
    for each chunk, or 4 for each chunk of 4-bit numbers. `x`: where a row begins.

    All threads load, though those of all groups load the same: so x is where its products are.
    """
    PACKED: tl.constexpr = KIND == "packed"
    PARTS: tl.constexpr = 4 if PACKED else 1
    WIDTH: tl.constexpr = (DEPTH + _RUN - 1) // _RUN * _WORDS if PACKED else DEPTH
    v = ()
    for i in tl.static_range((WIDTH + LANES * _LOADED - 1) // (LANES * _LOADED)):
        column = (i * LANES + tl.arange(0, LANES)) * _LOADED
        if PACKED:
            column = column // _WORDS * _RUN + column % _WORDS
        column = column[:, None, None, None] + tl.zeros((1, GROUPS, 1, 1), tl.int32)
        column += tl.arange(0, _LOADED)[None, None, None, :]
        for part in tl.static_range(PARTS):
            at = column + _WORDS * part
            v += (tl.load(x + at, mask=(at < DEPTH) & here, other=0.0),)
    return v


@triton.jit
def _plain_sums(
    w, s, v, KIND: tl.constexpr, COLUMNS_PER_SCALE: tl.constexpr, ON_GPU: tl.constexpr
):  # fmt: skip
    """What each lane adds to the products of rows with x, [LANES, g, n]."""
    y = tl.zeros((w[0].shape[0], w[0].shape[1], w[0].shape[2]), tl.float32)
    for i in tl.static_range(len(w)):
        part = tl.sum(widen(w[i], ON_GPU) * widen(v[i], ON_GPU), 3)
        if KIND == "fp8" and COLUMNS_PER_SCALE > 0:
            part *= s[i]
        y += part
    if KIND == "fp8" and COLUMNS_PER_SCALE == 0:
        y *= s[0]
    return y


@triton.jit
def _widen_scaled(numbers, SCALED: tl.constexpr):
    """Numbers in float32; if SCALED, times _FACTOR, on a GPU."""
    if SCALED and numbers.dtype == tl.bfloat16:  # exact: it only changes exponents
        return tl.inline_asm_elementwise(
            "{.reg .b32 a, b; mov.b32 b, 0x5f005f00; mul.bf16x2 a, $2, b;"
            "shl.b32 $0, a, 16; and.b32 $1, a, 0xffff0000;}", "=r,=r,r", [numbers],
            dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    elif SCALED:
        return numbers.to(tl.float32) * _FACTOR
    else:
        return widen(numbers, False)


@triton.jit
def _packed_sums(
    w, s, v, LANES: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr, SCALE: tl.constexpr,
    ZEROS: tl.constexpr, ON_GPU: tl.constexpr,
):  # fmt: skip
    """_plain_sums for 4-bit numbers."""
    IS_FLOAT: tl.constexpr = SCALE == tl.uint8
    BITS: tl.constexpr = SCALE.primitive_bitwidth
    WORDS: tl.constexpr = _RUN // SPAN if SPAN < _RUN else 1  # of scales of a load
    y = tl.zeros((LANES, w[0].shape[1], w[0].shape[2]), tl.float32)
    for i in tl.static_range(len(w)):
        load = (i * LANES + tl.arange(0, LANES))[:, None, None]
        run = load * _LOADED // _WORDS * _RUN
        for part in tl.static_range(4):
            place = (run + _WORDS * part) % SPAN // GROUP * BITS
            bits = s[i * WORDS + (_WORDS * part // SPAN if SPAN < _RUN else 0)] >> place
            x = _widen_scaled(v[4 * i + part], IS_FLOAT and ON_GPU)
            if IS_FLOAT and ON_GPU:
                scale = (((bits & 255) + _EXPONENT) << 23).to(tl.float32, bitcast=True)
            else:
                scale = scale_values(bits if BITS == 32 else bits & ((1 << BITS) - 1), SCALE)
            total = tl.sum(wide_numbers(w[i], part, IS_FLOAT, ON_GPU) * x, 3)
            if not IS_FLOAT:
                zero = 8.0
                if ZEROS:
                    zero = scale_values((bits >> BITS) & ((1 << BITS) - 1), SCALE)
                total -= (zero + (INT4_BASE if ON_GPU else 0.0)) * tl.sum(x, 3)
            y += total * scale
    return y


@triton.jit
def _lane_sums(
    w, s, v, LANES: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr,
    SCALE: tl.constexpr, ZEROS: tl.constexpr, COLUMNS_PER_SCALE: tl.constexpr, ON_GPU: tl.constexpr,
):  # fmt: skip
    if KIND == "packed":
        y = _packed_sums(w, s, v, LANES, GROUP, SPAN, SCALE, ZEROS, ON_GPU)
    else:
        y = _plain_sums(w, s, v, KIND, COLUMNS_PER_SCALE, ON_GPU)
    return y


@triton.jit
def _few_gate_up(
    x, bias, weights, experts, out, width, first, held,
    numbers, expert_numbers, expert_scales, scales, scale_row, scale_columns, first_column,
    TOP_K: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr,
    GROUPS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr,
    SCALE: tl.constexpr, ZEROS: tl.constexpr, ROWS_PER_SCALE: tl.constexpr,
    COLUMNS_PER_SCALE: tl.constexpr,
    INDEXED: tl.constexpr, BIASED: tl.constexpr, ON_INPUT: tl.constexpr, LIMIT: tl.constexpr,
    SLOPE: tl.constexpr,
):  # fmt: skip
    """Rows of gate and of up alternate. `expert_numbers`, `expert_scales`: elements of an expert.

    It begins alone, so that the routing is complete when _few_down starts.
    """
    begin_alone()
    pair = tl.program_id(0)
    expert = tl.load(experts + pair) - first
    if (expert < 0) | (expert >= held):
        return
    at = tl.reshape(tl.arange(0, 2 * COLUMNS), [GROUPS, 2 * COLUMNS // GROUPS])
    column = tl.program_id(1) * COLUMNS + at // 2
    row = tl.minimum(column, width - 1) + at % 2 * width
    w, s = _load_rows(
        numbers + expert.to(tl.int64) * expert_numbers,
        scales + expert.to(tl.int64) * expert_scales,
        scale_row, row, 2 * width, True, scale_columns, first_column,
        DEPTH, LANES, KIND, SPAN, ROWS_PER_SCALE, COLUMNS_PER_SCALE, INDEXED,
    )  # fmt: skip
    token = (pair // TOP_K).to(tl.int64)
    v = _load_x(x + token * DEPTH, True, DEPTH, LANES, GROUPS, KIND)
    y = _lane_sums(w, s, v, LANES, KIND, GROUP, SPAN, SCALE, ZEROS, COLUMNS_PER_SCALE, ON_GPU)
    y = tl.sum(y, 0)
    if ON_INPUT:
        y *= tl.load(weights + pair)
    if BIASED:
        y += tl.load(bias + expert * (2 * width) + row).to(tl.float32)
    gate, up = tl.split(tl.reshape(y, [COLUMNS, 2]))
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    y = activate_gated(gate, up, LIMIT, SLOPE).to(out.dtype.element_ty)
    tl.store(out + pair.to(tl.int64) * width + column, y, mask=column < width)


@triton.jit
def _few_down(
    x, bias, weights, experts, out, width, first, held,
    numbers, expert_numbers, expert_scales, scales, scale_row, scale_columns, first_column,
    TOP_K: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr,
    GROUPS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr,
    SCALE: tl.constexpr, ZEROS: tl.constexpr, ROWS_PER_SCALE: tl.constexpr,
    COLUMNS_PER_SCALE: tl.constexpr,
    INDEXED: tl.constexpr, BIASED: tl.constexpr, WEIGH: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """x: [tokens * TOP_K, DEPTH] from _few_gate_up, the kernel before this one.

    An expert that is not held is read by no load. `experts` is read from the L2 cache: the kernel
    that wrote it may have run while the multiprocessor kept older bytes in its own cache.
    """
    token = tl.program_id(0)
    at = tl.reshape(tl.arange(0, COLUMNS), [GROUPS, COLUMNS // GROUPS])
    column = tl.program_id(1) * COLUMNS + at
    row = tl.minimum(column, width - 1)
    w, s, taken = (), (), ()
    for k in tl.static_range(TOP_K):
        expert = tl.load(experts + token * TOP_K + k, cache_modifier=".cg") - first
        here = (expert >= 0) & (expert < held)
        expert = tl.where(here, expert, 0)
        more = _load_rows(
            numbers + expert.to(tl.int64) * expert_numbers,
            scales + expert.to(tl.int64) * expert_scales,
            scale_row, row, width, here, scale_columns, first_column,
            DEPTH, LANES, KIND, SPAN, ROWS_PER_SCALE, COLUMNS_PER_SCALE, INDEXED,
        )  # fmt: skip
        w += (more[0],)
        s += (more[1],)
        taken += ((expert, here),)
    begin()
    sums = tl.zeros((LANES, GROUPS, COLUMNS // GROUPS), tl.float32)
    biases = tl.zeros((GROUPS, COLUMNS // GROUPS), tl.float32)
    inside = column < width
    for k in tl.static_range(TOP_K):
        expert, here = taken[k]
        pair = token * TOP_K + k
        v = _load_x(x + pair.to(tl.int64) * DEPTH, here, DEPTH, LANES, GROUPS, KIND)
        y = _lane_sums(
            w[k], s[k], v, LANES, KIND, GROUP, SPAN, SCALE, ZEROS, COLUMNS_PER_SCALE, ON_GPU
        )
        weight = 1.0
        if WEIGH:
            weight = tl.load(weights + pair, mask=here, other=0.0)
        sums += y * weight
        if BIASED:
            part = tl.load(bias + expert * width + column, mask=inside & here, other=0.0)
            biases += part.to(tl.float32) * weight
    total = tl.sum(sums, 0) + biases
    place = out + token.to(tl.int64) * width + column
    if ADD:
        total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)


def takes_few(experts: Tensor, gate_up: Weight, down: Weight, num_experts: int) -> bool:
    """Whether few_experts computes these experts [tokens, top_k], `num_experts` of all ranks."""
    tokens, top_k = experts.shape
    if tokens > 1 and tokens * top_k > _MOST_PAIRS * num_experts:
        return False
    return _columns(gate_up, 2) > 0 and _columns(down, 1, top_k) > 0


def few_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Weight,
    down: Weight,
    first: int,
    total: Tensor | None,
    on_input: bool,
    biases: tuple[Tensor | None, Tensor | None],
    clamp: Clamp | None,
) -> Tensor:
    """See Ops.sum_experts; the sum is rounded only once."""
    (tokens, top_k), (held, dim, hidden) = experts.shape, down.shape
    made = x.new_empty(tokens * top_k, hidden)
    columns = _columns(gate_up, 2)
    _few_gate_up[(tokens * top_k, cdiv(hidden, columns))](
        x, biases[0], weights, experts, made, hidden, first, held, **_options(gate_up),
        TOP_K=top_k, COLUMNS=columns, BIASED=biases[0] is not None, ON_INPUT=on_input,
        LIMIT=clamp.limit if clamp else None, SLOPE=clamp.slope if clamp else None,
        **overlapping(),
    )  # fmt: skip
    out = x.new_empty(tokens, dim) if total is None else total
    columns = _columns(down, 1, top_k)
    _few_down[(tokens, cdiv(dim, columns))](
        made, biases[1], weights, experts, out, dim, first, held, **_options(down),
        TOP_K=top_k, COLUMNS=columns, BIASED=biases[1] is not None, WEIGH=not on_input,
        ADD=total is not None, **overlapping(),
    )  # fmt: skip
    return out


def _shape(matrix: Weight) -> tuple[int, int, int]:
    """(loads of a row, lanes, warps) of a program. Rows of 4-bit numbers are in one warp: they have
    few loads, and more lanes would leave some without.
    """
    depth = matrix.shape[-1]
    if isinstance(matrix, PackedWeight):
        loads = cdiv(depth, RUN) * RUN_WORDS // _LOADED.value
        return loads, min(_THREADS, next_power_of_2(loads)), _WARPS
    loads = cdiv(depth, _LOADED.value)
    numbers = matrix if isinstance(matrix, Tensor) else matrix.numbers
    warps = _WARPS if depth * numbers.itemsize <= _LONG_BYTES else _LONG_WARPS
    return loads, min(_THREADS * warps, next_power_of_2(loads)), warps


def _columns(matrix: Weight, rows: int, products: int = 1) -> int:
    """Columns of a program's output, each of `rows` rows in each of some products; 0: registers do
    not hold even one column for each group of lanes, or a load may have several scales.
    """
    if isinstance(matrix, Fp8Weight) and common_columns(matrix) % _LOADED.value:
        return 0
    loads, lanes, warps = _shape(matrix)
    numbers = matrix if isinstance(matrix, Tensor) else matrix.numbers
    row_bytes: int = cdiv(loads, lanes) * lanes * _LOADED.value * numbers.itemsize
    held = _PACKED_HELD if isinstance(matrix, PackedWeight) else _HELD
    threads = _THREADS * warps
    columns = min(_MOST_COLUMNS, threads * held // (row_bytes * rows * products))
    if columns * rows * lanes < threads:
        return 0
    return 1 << (columns.bit_length() - 1)


def stack_options(matrix: Weight) -> dict[str, Any]:
    """A stack of matrices, as named arguments of a kernel; GROUP is 0 but for 4-bit numbers."""
    numbers = matrix if isinstance(matrix, Tensor) else matrix.numbers
    options: dict[str, Any] = {
        "numbers": numbers,
        "expert_numbers": numbers[0].numel(),
        "expert_scales": 0,
        "GROUP": 0,
        "SCALE": tl.float32,
        "ZEROS": False,
    }
    if isinstance(matrix, PackedWeight):
        words, kind = scale_words(matrix)
        options |= {"GROUP": matrix.group, "SCALE": kind, "ZEROS": matrix.zeros}
        return options | {"expert_scales": words[0].numel()} | scale_options(words)
    assert isinstance(matrix, Tensor | Fp8Weight)
    if isinstance(matrix, Fp8Weight):
        options["expert_scales"] = matrix.scales[0].numel()
    return options | scale_options(matrix)


def _options(matrix: Weight) -> dict[str, Any]:
    """As stack_options, for the kernels of this module."""
    _, lanes, warps = _shape(matrix)
    options = stack_options(matrix) | {
        "KIND": "fp8" if isinstance(matrix, Fp8Weight) else "plain",
        "SPAN": 0,
        "DEPTH": matrix.shape[-1],
        "LANES": lanes,
        "GROUPS": _THREADS * warps // lanes,
        "num_warps": warps,
    }
    if isinstance(matrix, PackedWeight):
        bits = options["SCALE"].primitive_bitwidth
        shared = 1 if matrix.zeros else 32 // bits  # groups of 4 bytes of scales
        options |= {"KIND": "packed", "SPAN": matrix.group * shared}
    return options
