"""Mixture of experts: routing, and the products of all experts in two launches of a grouped GEMM.

A pair is a token and one of its experts. Pairs are sorted by expert, so that all rows of a block
use the same expert's matrix. Here top_k is 2, there are 3 experts and blocks of 2 rows:

    pairs                 0:e2  1:e0  2:e0  3:e2  4:e2  5:e1    pair = token * 2 + choice
    order, by expert      1     2     5     0     3     4
    blocks                [e0    e0]  [e1 ]  [e2   e2]  [e2 ]

Only the device knows how many pairs an expert has. So the grid has as many blocks as any routing
could need, and programs past the last block return at once; the host never waits. Every sum has a
fixed order. All tensors are contiguous. Knows shapes and arithmetic.
"""

from __future__ import annotations

from math import inf
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gllm_engine.ops.kernels import has_fp8_tiles, on_hopper
from gllm_engine.ops.triton.few_experts import activate_gated, few_experts, stack_options, takes_few
from gllm_engine.ops.triton.fp8 import (
    SCALE_GROUP,
    common_columns,
    from_float8,
    new_rounded,
    quantize,
    rounding_group,
    scale_lines,
    scale_to_float8,
)
from gllm_engine.ops.triton.grouped import BLOCK, multiply_blocks, numbers_and_scales, takes_blocks
from gllm_engine.ops.triton.launch_sizes import cdiv, next_power_of_2
from gllm_engine.ops.triton.packed import multiply_packed, runs_of_turn
from gllm_engine.ops.triton.pdl import ON_GPU, begin_alone, overlapping
from gllm_engine.ops.triton.skinny import multiply_tile
from gllm_engine.ops.weight import RUN, Fp8Weight, PackedWeight, RoundedRows, Rows, Weight
from gllm_engine.routing import Clamp, Routing

# Most (token, expert) elements that one program of routing or sorting holds in registers, and its
# warps; more elements would not fit their registers.
_HELD, _WARPS = 4096, 8
# Most tokens of such a program.
_MAX_ROWS = 1024
# Most tokens that are routed each in a program of its own.
_FEW_TOKENS = 512
# Most pairs that _sort_few sorts, and those that one of its programs places.
_FEW_PAIRS = 1024
_PLACED = 32
# Columns and warps of one program of _sum: for few tokens, and for more.
_FEW_SUMMED = (256, 1)
_SUMMED = (1024, 4)
# Least rows of the first operand of Hopper's products.
_LEAST_FIRST = tl.constexpr(64)
# Programs whose counts are added at once.
_COUNTED = tl.constexpr(32)
_RUN = tl.constexpr(RUN)
_SCALE_GROUP = tl.constexpr(SCALE_GROUP)
# Choices are numbers in this order: -inf (chosen already, or no expert), an expert of a group that
# is dropped, NaN or anything smaller than every other choice, all other choices.
_DROPPED, _LEAST = tl.constexpr(-3.3e38), tl.constexpr(-3.2e38)


class Tiles(NamedTuple):
    """The tile that one program of a grouped GEMM computes, and its launch parameters."""

    rows: int  # pairs, all of one expert
    columns: int  # output columns; if gated, half are gate's and half are up's
    depth: int  # depth of one loop iteration
    warps: int
    stages: int
    paired: bool = False  # also if not gated, a tile is multiplied in two halves


# (most pairs per expert, tiles). With few pairs, reading the matrices takes all the time: 16 rows,
# the least of a tensor core, are enough, and narrow tiles keep two or three programs reading on
# every multiprocessor. Tiles of 64 rows or more use Hopper's warpgroup products. Each limit is at
# least twice the one before, so that token counts of powers of two reach all tiles.
_TILES = (
    (8, Tiles(16, 64, 256, 4, 3)),
    (24, Tiles(32, 128, 64, 4, 4)),
    (96, Tiles(64, 128, 128, 4, 3)),
    (inf, Tiles(128, 256, 64, 8, 4)),
)
# For float8 weights and x rounded to float8. A product is held twice, before and after its scale:
# tiles of 128 x 256 fit the registers in two halves only. Tiles of 128 x 128 bring no speed.
_ROUNDED_TILES = (
    (8, Tiles(16, 128, 128, 4, 4)),
    (24, Tiles(32, 128, 128, 4, 3)),
    (96, Tiles(64, 128, 128, 4, 3)),
    (inf, Tiles(128, 256, 128, 8, 3, True)),
)
# For weights of 4-bit numbers; `columns` are those of gate, and as many are up's. To decode numbers
# takes the time, so a matrix is decoded by as few programs as possible, each in tiles of 64 rows of
# the weight for every four warps, the least of a warpgroup's product.
_PACKED_TILES = (
    (8, Tiles(16, 64, 256, 4, 3)),
    (24, Tiles(32, 64, 256, 4, 3)),
    (96, Tiles(64, 64, 128, 4, 3)),
    (inf, Tiles(128, 128, 128, 8, 3)),
)
# Triton's names of the dtypes of rows before they are rounded to float8.
_WHOLE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# For float32, which tensor cores would round.
_EXACT_TILES = Tiles(16, 64, 32, 4, 2)
_EXACT_PACKED_TILES = Tiles(16, 32, 128, 4, 2)


def choose_tiles(tokens: int, top_k: int, num_experts: int, kind: type = Tensor) -> Tiles:
    """Tiles for 16-bit dtypes, assuming that all experts are equally likely.

    `kind`: PackedWeight: for such weights; RoundedRows: for products of such rows.
    """
    table = {RoundedRows: _ROUNDED_TILES, PackedWeight: _PACKED_TILES}.get(kind, _TILES)
    return next(tiles for limit, tiles in table if tokens * top_k <= limit * num_experts)


@triton.jit
def _score(x, peak, total, SIGMOID: tl.constexpr):
    """The softmax of x, given the largest x and the sum of exp(x - peak), or the sigmoid of x."""
    if SIGMOID:
        small = tl.exp(-tl.abs(x))  # cannot overflow
        score = tl.where(x < 0, small, 1.0) / (1.0 + small)
    else:
        score = tl.exp(x - peak) / total
    return score


@triton.jit
def _keep_groups(
    choice, GROUPS: tl.constexpr, KEPT: tl.constexpr, SLOTS: tl.constexpr, BIASED: tl.constexpr
):
    """`choice` [rows, columns], SLOTS columns to a group, with _DROPPED outside the kept groups."""
    ROWS: tl.constexpr = choice.shape[0]
    PARTS: tl.constexpr = choice.shape[1] // SLOTS
    grouped = tl.reshape(choice, [ROWS, PARTS, SLOTS])
    rank, first = tl.max(grouped, 2, return_indices=True)
    if BIASED:
        slot = tl.arange(0, SLOTS)[None, None, :]
        rank += tl.max(tl.where(slot == first[:, :, None], -float("inf"), grouped), 2)
    group = tl.arange(0, PARTS)[None, :]
    rank = tl.where(group < GROUPS, tl.where(rank > _LEAST, rank, _LEAST), -float("inf"))
    kept = tl.zeros([ROWS, PARTS], tl.int32)
    for _ in tl.static_range(KEPT):
        index = tl.argmax(rank, 1)[:, None]
        kept = tl.where(group == index, 1, kept)
        rank = tl.where(group == index, -float("inf"), rank)
    return tl.reshape(tl.where(kept[:, :, None] > 0, grouped, _DROPPED), [ROWS, PARTS * SLOTS])


# Else Triton would compile a kernel for each divisibility of a token count amid serving.
@triton.jit(do_not_specialize=["tokens"])
def _route(
    logits, bias, weights, experts, tokens, num_experts,
    TOP_K: tl.constexpr, CHOSEN: tl.constexpr, SIGMOID: tl.constexpr, BIASED: tl.constexpr,
    GROUPS: tl.constexpr, KEPT: tl.constexpr, RENORM: tl.constexpr, SUM_EPS: tl.constexpr,
    LEAST_SUM: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """A group has SLOTS columns, of which the last ones may have no expert."""
    begin_alone()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    size = num_experts // GROUPS
    at, exists = column, column < num_experts
    if GROUPS > 1:
        at = column // SLOTS * size + column % SLOTS
        exists = (column // SLOTS < GROUPS) & (column % SLOTS < size)
    x = tl.load(logits + row * num_experts + at, mask=(row < tokens) & exists, other=0.0)
    x = tl.where(exists, x.to(tl.float32), -float("inf"))
    peak, total = tl.max(x, 1)[:, None], 1.0
    if not SIGMOID and (BIASED or not RENORM):
        total = tl.sum(tl.exp(x - peak), 1)[:, None]
    choice = x
    if BIASED:
        choice = _score(x, peak, total, SIGMOID)
        choice += tl.load(bias + at, mask=exists, other=0.0)
    choice = tl.where(choice > _LEAST, choice, _LEAST)  # also if it is NaN
    choice = tl.where(exists, choice, -float("inf"))
    if GROUPS > 1:
        choice = _keep_groups(choice, GROUPS, KEPT, SLOTS, BIASED)
        choice = tl.where(exists, choice, -float("inf"))
    k = tl.arange(0, CHOSEN)[None, :]
    chosen = tl.zeros([ROWS, CHOSEN], tl.float32)
    expert = tl.zeros([ROWS, CHOSEN], tl.int32)
    for i in tl.static_range(TOP_K):
        best, index = tl.max(choice, 1, return_indices=True)
        chosen = tl.where(k == i, best[:, None], chosen)
        expert = tl.where(k == i, index[:, None], expert)
        choice = tl.where(column == index[:, None], -float("inf"), choice)
    if GROUPS > 1:
        expert = expert // SLOTS * size + expert % SLOTS
    stored = (row < tokens) & (k < TOP_K)
    if BIASED:
        chosen = tl.load(logits + row * num_experts + expert, mask=stored, other=0.0)
        chosen = chosen.to(tl.float32)
    weight = tl.where(k < TOP_K, _score(chosen, peak, total, SIGMOID), 0.0)
    if RENORM:
        weight /= tl.maximum(tl.sum(weight, 1) + SUM_EPS, LEAST_SUM)[:, None]
    tl.store(weights + row * TOP_K + k, weight * SCALE, mask=stored)
    tl.store(experts + row * TOP_K + k, expert, mask=stored)


def route(logits: Tensor, routing: Routing, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """See Ops.route."""
    (tokens, num_experts), top_k = logits.shape, routing.top_k
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    experts = torch.empty_like(weights, dtype=torch.int32)
    slots = next_power_of_2(num_experts // routing.groups)
    rows, columns = _row_tile(next_power_of_2(routing.groups) * slots)
    warps = _WARPS
    if tokens <= _FEW_TOKENS:  # each in a warp of its own, so that nothing passes between warps
        rows = warps = 1
    if tokens:
        _route[(cdiv(tokens, rows),)](
            logits, bias, weights, experts, tokens, num_experts,
            TOP_K=top_k, CHOSEN=next_power_of_2(top_k),
            SIGMOID=routing.scoring == "sigmoid", BIASED=bias is not None,
            GROUPS=routing.groups, KEPT=routing.kept_groups, RENORM=routing.renorm,
            SUM_EPS=routing.sum_eps, LEAST_SUM=routing.least_sum, SCALE=routing.scale,
            ROWS=rows, COLUMNS=columns, SLOTS=slots, num_warps=warps,
            **overlapping(),
        )  # fmt: skip
    return weights, experts


@triton.jit
def _find(experts, row, at, tokens, first, held, TOP_K: tl.constexpr):
    """[rows, experts]: each expert's index in the token's top_k; -1: not chosen or not held."""
    choice = tl.full([row.shape[0], at.shape[1]], -1, tl.int32)
    for i in tl.static_range(TOP_K):
        expert = tl.load(experts + row * TOP_K + i, mask=row < tokens, other=-1)
        choice = tl.where((expert - first == at) & (at < held) & (row < tokens), i, choice)
    return choice


@triton.jit(do_not_specialize=["tokens"])
def _count(
    experts, counts, tokens, first, held,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    begin_alone()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.arange(0, EXPERTS)
    chosen = (_find(experts, row, at[None, :], tokens, first, held, TOP_K) >= 0).to(tl.int32)
    tl.store(counts + tl.program_id(0) * EXPERTS + at, tl.sum(chosen, 0))


@triton.jit(do_not_specialize=["tokens", "blocks"])
def _place(
    experts, counts, order, groups, tokens, first, held, blocks, block_rows,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """`counts`: [blocks, EXPERTS] from _count; unused if SINGLE, when there is one program."""
    begin_alone()
    program = tl.program_id(0)
    row = program * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.arange(0, EXPERTS)
    choice = _find(experts, row, at[None, :], tokens, first, held, TOP_K)
    chosen = (choice >= 0).to(tl.int32)
    count, before = tl.sum(chosen, 0), tl.zeros([EXPERTS], tl.int32)
    if not SINGLE:
        counted = tl.zeros([_COUNTED, EXPERTS], tl.int32)
        earlier = counted
        for start in range(0, blocks, _COUNTED):
            block = start + tl.arange(0, _COUNTED)[:, None]
            there = block < blocks
            some = tl.load(counts + block * EXPERTS + at[None, :], mask=there, other=0)
            counted += some
            earlier += tl.where(block < program, some, 0)
        count = tl.sum(counted, 0)
        before = tl.sum(earlier, 0)
    end = tl.cumsum(count, 0)
    place = (end - count + before)[None, :] + tl.cumsum(chosen, 0) - chosen
    tl.store(order + place, row * TOP_K + choice, mask=choice >= 0)
    if program == 0:
        _store_groups(groups, count, block_rows, EXPERTS)


@triton.jit(do_not_specialize=["pairs"])
def _sort_few(
    experts, order, groups, pairs, first, held, block_rows,
    PAIRS: tl.constexpr, PLACED: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Each program places PLACED pairs: a pair's place is the number of pairs with smaller keys."""
    begin_alone()
    at = tl.arange(0, PAIRS)
    expert = tl.load(experts + at, mask=at < pairs, other=-1) - first
    here = (expert >= 0) & (expert < held)
    key = tl.where(here, expert, EXPERTS) * PAIRS + at
    own = tl.program_id(0) * PLACED + tl.arange(0, PLACED)
    own_expert = tl.load(experts + own, mask=own < pairs, other=-1) - first
    own_here = (own_expert >= 0) & (own_expert < held)
    smaller = key[None, :] < (own_expert * PAIRS + own)[:, None]
    tl.store(order + tl.sum(smaller.to(tl.int32), 1), own, mask=own_here)
    if tl.program_id(0) == 0:
        count = tl.histogram(tl.where(here, expert, 0), EXPERTS, mask=here)
        _store_groups(groups, count, block_rows, EXPERTS)


@triton.jit
def _store_groups(groups, count, block_rows, EXPERTS: tl.constexpr):
    """See sort_pairs. `count`: pairs of each expert."""
    at = tl.arange(0, EXPERTS)
    end = tl.cumsum(count, 0)
    tl.store(groups + at, end - count)
    tl.store(groups + EXPERTS + at, end)
    tl.store(groups + 2 * EXPERTS + at, tl.cumsum(tl.cdiv(count, block_rows), 0))


def sort_pairs(experts: Tensor, first: int, held: int, block: int) -> tuple[Tensor, Tensor]:
    """Sort the pairs of experts first .. first + held - 1. Returns (order, groups), int32.

    order: [tokens * top_k] the pairs token * top_k + choice, by expert, then by token; entries
    after the last pair are undefined. groups: [3, at least held], for each expert: the start of its
    pairs in `order`, their end, and the number of blocks of up to `block` pairs of the experts up
    to this one, inclusive.
    """
    tokens, top_k = experts.shape
    rows, columns = _row_tile(held)
    blocks = cdiv(tokens, rows)
    order = torch.empty(tokens * top_k, dtype=torch.int32, device=experts.device)
    groups, counts = order.new_empty(3, columns), order.new_empty(blocks, columns)
    if len(order) <= _FEW_PAIRS:
        pairs = max(_PLACED, next_power_of_2(len(order)))
        _sort_few[(cdiv(len(order), _PLACED),)](
            experts, order, groups, len(order), first, held, block, PAIRS=pairs, PLACED=_PLACED,
            EXPERTS=columns, **overlapping(),
        )  # fmt: skip
        return order, groups
    size = {"TOP_K": top_k, "ROWS": rows, "EXPERTS": columns}
    size |= {"num_warps": _WARPS} | overlapping()
    if blocks > 1:
        _count[(blocks,)](experts, counts, tokens, first, held, **size)
    _place[(blocks,)](
        experts, counts, order, groups, tokens, first, held, blocks, block,
        SINGLE=blocks == 1, **size,
    )  # fmt: skip
    return order, groups


@triton.jit
def _load(at, inside, EVEN: tl.constexpr):
    if EVEN:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=inside, other=0.0)
    return tile


@triton.jit
def _turn_scales(
    scales, up_scales, x_scales, padded, k, first_column,
    COLUMNS_PER_SCALE: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """The scales of the turn that begins with column k: of the matrix [1, COLUMNS], of up, and of
    x [ROWS, 1]; 1 if a turn has none of its own.
    """
    scale, up_scale, x_scale = 1.0, 1.0, 1.0
    if COLUMNS_PER_SCALE > 0:
        column = (first_column + k) // COLUMNS_PER_SCALE
        scale = tl.load(scales + column)[None, :]
        up_scale = tl.load(up_scales + column)[None, :]
        if ROUNDED:
            x_scale = tl.load(x_scales + k // _SCALE_GROUP * padded)[:, None]
    return scale, up_scale, x_scale


@triton.jit
def _add_product(
    sums, v, tile, scale, inside, FLOAT8: tl.constexpr, SCALED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """sums + v w, with some columns of some rows of a matrix as w, at `tile`.

    SCALED: a product of the turn has `scale`. FP8 tensor cores sum to some 14 bits, so float32 sums
    take over each product.
    """
    w = _load(tile, inside[:, None], EVEN)
    if FLOAT8:
        w = from_float8(w, v.dtype)
    if SCALED:
        sums += tl.dot(v, w, input_precision="ieee") * scale
    elif v.dtype == tl.float8e4nv:
        sums += tl.dot(v, w)
    else:
        sums = tl.dot(v, w, sums, input_precision="ieee")
    return sums


@triton.jit
def _multiply(
    lines, present, x_scales, padded, tile, up_tile, scales, up_scales, depth, first_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, FLOAT8: tl.constexpr,
    COLUMNS_PER_SCALE: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The float32 products [ROWS, COLUMNS] of rows of x with rows of a matrix, and if GATED with
    those of up. All are given by where they begin: x [ROWS, 1] and its scales [ROWS], a matrix
    [1, COLUMNS], scales [COLUMNS] or [1]. `present`: [ROWS, 1], other rows of x are zeros.
    """
    SCALED: tl.constexpr = COLUMNS_PER_SCALE > 0
    ROUNDED: tl.constexpr = lines.dtype.element_ty == tl.float8e4nv
    at = tl.arange(0, DEPTH)
    lines += at[None, :]
    tile += at[:, None]
    up_tile += at[:, None]
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    ups = sums
    scale, up_scale, x_scale = _turn_scales(
        scales, up_scales, x_scales, padded, 0, first_column, COLUMNS_PER_SCALE, ROUNDED
    )
    for k in range(0, depth, DEPTH):
        next_scale, next_up, next_x = _turn_scales(  # arrive during this turn
            scales, up_scales, x_scales, padded, tl.minimum(k + DEPTH, depth - 1), first_column,
            COLUMNS_PER_SCALE, ROUNDED,
        )  # fmt: skip
        inside = at < depth - k
        v = tl.load(lines + k, mask=present if EVEN else present & inside[None, :], other=0.0)
        sums = _add_product(sums, v, tile + k, scale * x_scale, inside, FLOAT8, SCALED, EVEN)
        if GATED:
            ups = _add_product(
                ups, v, up_tile + k, up_scale * x_scale, inside, FLOAT8, SCALED, EVEN
            )
        scale, up_scale, x_scale = next_scale, next_up, next_x
    if FLOAT8 and not SCALED:
        scale = tl.load(scales)[None, :]
        up_scale = tl.load(up_scales)[None, :]
        if ROUNDED:
            x_scale = tl.load(x_scales)[:, None]
        sums *= scale * x_scale
        ups *= up_scale * x_scale
    return sums, ups


@triton.jit
def _multiply_numbers(
    lines, present, x_scales, padded, numbers, line, up_line, depth,
    scales, scale_row, scale_columns, first_column,
    ROUNDED: tl.constexpr, ROWS_PER_SCALE: tl.constexpr, COLUMNS_PER_SCALE: tl.constexpr,
    INDEXED: tl.constexpr, UNIFORM: tl.constexpr, GATED: tl.constexpr, DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """The float32 products [rows, columns] of `lines` of x with rows `line` of a matrix, and if
    GATED with rows `up_line`. The matrix is the first operand, if few rows would fill only a part
    of it.

    ROUNDED: x is float8, as the matrix, with x_scales [groups of columns, padded]; else a float8
    matrix has exact numbers in the dtype of x. All DEPTH columns of a turn have one scale, and if
    UNIFORM all lines of a tile, as far as they are gate's, or up's: then no thread holds the scales
    of its columns.
    """
    ROWS: tl.constexpr = lines.shape[0]
    COLUMNS: tl.constexpr = line.shape[0]
    tile = numbers + line.to(tl.int64) * depth
    up_tile = numbers + up_line.to(tl.int64) * depth
    if UNIFORM:
        line = tl.min(line, 0, keep_dims=True)
        up_line = tl.min(up_line, 0, keep_dims=True)
    up_scales = scale_lines(scales, scale_row, up_line, scale_columns, ROWS_PER_SCALE, INDEXED)
    scales = scale_lines(scales, scale_row, line, scale_columns, ROWS_PER_SCALE, INDEXED)
    if ROUNDED and ROWS < _LEAST_FIRST:
        sums, ups = multiply_tile(
            tile[:, None], up_tile[:, None], lines[None, :], scales, up_scales, x_scales, 0, depth,
            padded, first_column, COLUMNS, ROWS, DEPTH, GATED, EVEN, True, COLUMNS_PER_SCALE,
        )  # fmt: skip
        sums = tl.trans(sums)
        ups = tl.trans(ups)
    else:
        sums, ups = _multiply(
            lines[:, None], present[:, None], x_scales, padded, tile[None, :], up_tile[None, :],
            scales, up_scales, depth, first_column, ROWS, COLUMNS, DEPTH, ROWS_PER_SCALE > 0,
            COLUMNS_PER_SCALE, GATED, EVEN,
        )  # fmt: skip
    return sums, ups


@triton.jit
def _rows(groups, order, expert, block, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """The rows of a block, the end of the expert's rows, the rows without those past it, pairs.

    Rows past the end are not stored. With few tokens most rows are such, and to read memory of
    their own would take much of the L2 cache's bandwidth.
    """
    start, end = tl.load(groups + expert), tl.load(groups + EXPERTS + expert)
    block -= tl.load(groups + 2 * EXPERTS + expert) - tl.cdiv(end - start, ROWS)
    row = start + block * ROWS + tl.arange(0, ROWS)
    known = tl.minimum(row, end - 1)
    return row, end, known, tl.load(order + known)


@triton.jit
def _finish(
    sums, ups, weights, bias, pair, first, line, up_line,
    GATED: tl.constexpr, BIASED: tl.constexpr, ON_INPUT: tl.constexpr, LIMIT: tl.constexpr,
    SLOPE: tl.constexpr,
):  # fmt: skip
    """The outputs of the products sums and ups: with weights and biases, and if GATED with the
    activation. `first`: of the expert's biases.
    """
    if ON_INPUT:
        scale = tl.load(weights + pair)[:, None]
        sums *= scale
        ups *= scale
    if BIASED:
        sums += tl.load(bias + first + line)[None, :].to(tl.float32)
        ups += tl.load(bias + first + up_line)[None, :].to(tl.float32)
    if GATED:
        sums = activate_gated(sums, ups, LIMIT, SLOPE)
    return sums, ups


@triton.jit
def _store(
    sums, ups, out, out_scales, place, present, column, width,
    PAIRED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Store columns of rows to `place` [ROWS], of those that are present. WHOLE: if `out` is
    float8, the dtype to which a row is rounded before, and the row has a scale; else None.
    """
    COLUMNS: tl.constexpr = column.shape[0]
    if WHOLE is not None:
        sums, scale = scale_to_float8(sums.to(WHOLE).to(tl.float32))
        tl.store(out_scales + place, scale, mask=present)
    to = out + place.to(tl.int64)[:, None] * width + column[None, :]
    inside = present[:, None] & (column < width)
    tl.store(to, sums.to(out.dtype.element_ty), mask=inside)
    if PAIRED:
        inside = present[:, None] & (column + COLUMNS < width)
        tl.store(to + COLUMNS, ups.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["padded", "padded_out"])
def _grouped(
    x, x_scales, padded, bias, weights, order, groups, out, out_scales, padded_out, width, depth,
    numbers, expert_numbers, expert_scales, scales, scale_row, scale_columns, first_column,
    ROUNDED: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr,
    ZEROS: tl.constexpr, ROWS_PER_SCALE: tl.constexpr, COLUMNS_PER_SCALE: tl.constexpr,
    INDEXED: tl.constexpr, UNIFORM: tl.constexpr, TOP_K: tl.constexpr, GATED: tl.constexpr,
    PAIRED: tl.constexpr, BIASED: tl.constexpr, ON_INPUT: tl.constexpr, LIMIT: tl.constexpr,
    SLOPE: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """GATED: silu(gate) * up; reads rows of tokens, writes in sorted order. Otherwise reads in
    sorted order and writes in pair order. Programs of one block of rows are consecutive: x stays
    in the L2 cache, and so does the expert's matrix until the expert's next block.

    ROUNDED, UNIFORM: see _multiply_numbers. GROUP: above 0 for 4-bit numbers. `expert_numbers`,
    `expert_scales`: elements of an expert.

    ON_INPUT: x is multiplied by the weight of the pair; the product, being linear, is multiplied
    instead. LIMIT: of a Clamp; None: silu.

    PAIRED: of a matrix that is not GATED, a program multiplies two tiles, one after the other, as
    it does gate's and up's. WHOLE: see _store; out_scales: [tiles of columns, padded_out].
    """
    begin_alone()
    OWN: tl.constexpr = 2 * COLUMNS if PAIRED else COLUMNS
    turns = tl.cdiv(width, OWN)
    block = tl.program_id(0) // turns
    expert = tl.sum((tl.load(groups + 2 * EXPERTS + tl.arange(0, EXPERTS)) <= block).to(tl.int32))
    if expert == EXPERTS:
        return
    row, end, known, pair = _rows(groups, order, expert, block, ROWS, EXPERTS)
    source = pair // TOP_K if GATED else known
    lines = x + source.to(tl.int64) * depth
    column = tl.program_id(0) % turns * OWN + tl.arange(0, COLUMNS)
    line = tl.minimum(column, width - 1)
    rows = width * 2 if GATED else width
    up_line = line + width if GATED else tl.minimum(column + COLUMNS, width - 1)
    numbers += expert.to(tl.int64) * expert_numbers
    scales += expert.to(tl.int64) * expert_scales
    if GROUP > 0:
        sums, ups = multiply_packed(
            lines[None, :], (row < end)[None, :], numbers, scales, line, up_line, rows, depth, 0,
            depth, GROUP, SCALE, ZEROS, DEPTH // _RUN, GATED, EVEN, ON_GPU,
        )  # fmt: skip
        sums = tl.trans(sums)
        ups = tl.trans(ups)
    else:
        sums, ups = _multiply_numbers(
            lines, row < end, x_scales + source if ROUNDED else x_scales, padded,
            numbers, line, up_line, depth, scales, scale_row, scale_columns, first_column,
            ROUNDED, ROWS_PER_SCALE, COLUMNS_PER_SCALE, INDEXED, UNIFORM, GATED or PAIRED, DEPTH,
            EVEN,
        )  # fmt: skip
    sums, ups = _finish(
        sums, ups, weights, bias, pair, expert * rows, line, up_line,
        GATED, BIASED, ON_INPUT, LIMIT, SLOPE,
    )  # fmt: skip
    out_scales += tl.program_id(0) % turns * padded_out
    place = row if GATED else pair
    _store(sums, ups, out, out_scales, place, row < end, column, width, PAIRED, WHOLE)


def grouped_product(
    x: Rows,
    matrix: Weight,
    order: Tensor,
    groups: Tensor,
    top_k: int,
    tiles: Tiles,
    gated: bool = False,
    bias: Tensor | None = None,
    on_input: Tensor | None = None,
    clamp: Clamp | None = None,
    then: Weight | None = None,
) -> Rows:
    """The product of each pair's row with its expert's matrix; order, groups: from sort_pairs.

    If `gated`, x is [tokens, depth] and `matrix` the [gate, up] matrices [held, 2 * width, depth];
    returns silu(gate) * up, [pairs, width], in sorted order. Otherwise x is such a result, [pairs,
    depth], and `matrix` is [held, width, depth]; returns [pairs, width] in pair order. Rows of
    pairs whose expert is not held are undefined. `bias`: the matrices' biases, [held, rows of a
    matrix]. `on_input`: factors of the pairs' rows of x, [tokens, top_k]. `clamp`: instead of silu.
    `then`: a stack by which the result, rounded, is multiplied next; it is rounded here if a
    program has all columns of a scale.
    """
    (pairs,), (held, width, depth) = order.shape, matrix.shape
    width = width // 2 if gated else width
    numbers, x_scales = numbers_and_scales(x)
    paired = not gated and tiles.paired
    halves = paired or gated and not isinstance(matrix, PackedWeight)
    columns = _fit(tiles.columns // 2 if halves else tiles.columns, width)
    options = stack_options(matrix)
    turn = _turn_columns(matrix, tiles.depth)
    most_blocks = _most_blocks(pairs, held, tiles.rows)
    out = _new_result(x, (pairs, width), columns, then)
    result, result_scales = numbers_and_scales(out)
    whole = None if out is result else _WHOLE[x.dtype]
    plain = bias is None and on_input is None and clamp is None
    if plain and takes_blocks(x, matrix, tiles.rows):
        multiply_blocks(x, matrix, order, groups, top_k, gated, result, result_scales, whole)
        return out
    _grouped[(most_blocks * cdiv(width, 2 * columns if paired else columns),)](
        numbers, x_scales, len(numbers), bias, on_input, order, groups, result, result_scales,
        len(result), width, depth, **options, ROUNDED=isinstance(x, RoundedRows),
        UNIFORM=_is_uniform(options, columns, width if gated else 0), TOP_K=top_k, GATED=gated,
        PAIRED=paired, BIASED=bias is not None,
        ON_INPUT=on_input is not None, LIMIT=clamp.limit if clamp else None,
        SLOPE=clamp.slope if clamp else None, EXPERTS=groups.shape[1], ROWS=tiles.rows,
        COLUMNS=columns, DEPTH=turn, EVEN=depth % turn == 0,
        WHOLE=whole, num_warps=tiles.warps, num_stages=tiles.stages, **overlapping(),
    )  # fmt: skip
    return out


def _most_blocks(pairs: int, held: int, rows: int) -> int:
    some = min(held, pairs)
    return some + (pairs - some) // rows


def _is_uniform(options: dict[str, Any], columns: int, up: int) -> bool:
    """Whether the columns of a tile have one scale. `up`: where up begins, 0 if there is none."""
    rows = options["ROWS_PER_SCALE"]
    return rows > 0 and not options["INDEXED"] and rows % columns == 0 and up % columns == 0


def _new_result(x: Rows, size: tuple[int, int], columns: int, then: Weight | None) -> Rows:
    """Memory for a product of x in which a program has so many columns; see grouped_product."""
    if isinstance(then, Fp8Weight) and rounding_group(then) == columns:
        rounded = new_rounded(x, size, columns)
        rounded.numbers[len(rounded) :] = 0
        return rounded
    return torch.empty(size, dtype=x.dtype, device=x.device)


def _turn_columns(matrix: Weight, depth: int) -> int:
    """The columns of one loop iteration in tiles of `depth`."""
    if isinstance(matrix, PackedWeight):
        return RUN * runs_of_turn(matrix, depth // RUN)
    turn = _fit(depth, matrix.shape[2])
    if isinstance(matrix, Fp8Weight):  # a turn must not go beyond the columns of a scale
        turn = min(turn, common_columns(matrix) or turn)
    return turn


@triton.jit
def _sum(
    parts, weights, experts, out, dim, first, held,
    TOP_K: tl.constexpr, WEIGH: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    begin_alone()
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < dim
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(TOP_K):
        pair = token * TOP_K + i
        expert = tl.load(experts + pair) - first
        here = inside & (expert >= 0) & (expert < held)
        part = tl.load(parts + pair * dim + at, mask=here, other=0.0)
        weight = tl.load(weights + pair) if WEIGH else 1.0
        total += weight * part.to(tl.float32)
    if ADD:
        total += tl.load(out + token * dim + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * dim + at, total.to(out.dtype.element_ty), mask=inside)


def sum_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Weight,
    down: Weight,
    first: int,
    num_experts: int,
    total: Tensor | None = None,
    on_input: bool = False,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
    clamp: Clamp | None = None,
) -> Tensor:
    """See Ops.sum_experts; the sum is rounded only once."""
    (tokens, top_k), (held, dim, _) = experts.shape, down.shape
    if not tokens or not held:
        return torch.zeros_like(x) if total is None else total
    if takes_few(experts, gate_up, down, num_experts):
        return few_experts(
            x, weights, experts, gate_up, down, first, total, on_input, biases, clamp
        )
    rounds = _is_rounded(x, gate_up) and _is_rounded(x, down)
    bare = not on_input and biases == (None, None) and clamp is None
    tiles = _tiles_of_both(x, experts, (gate_up, down), num_experts, rounds, bare)
    order, groups = sort_pairs(experts, first, held, tiles.rows)
    scale = weights if on_input else None
    gate_up_bias, down_bias = biases
    rows = _round(x, gate_up) if rounds else x
    hidden = grouped_product(
        rows, gate_up, order, groups, top_k, tiles, True, gate_up_bias, scale, clamp,
        down if rounds else None,
    )  # fmt: skip
    rows = _round(hidden, down) if rounds else hidden
    parts = grouped_product(rows, down, order, groups, top_k, tiles, bias=down_bias)
    out = torch.empty_like(x) if total is None else total
    columns, warps = _FEW_SUMMED if tokens <= _FEW_TOKENS else _SUMMED
    _sum[(tokens, cdiv(dim, columns))](
        parts, weights, experts, out, dim, first, held,
        TOP_K=top_k, WEIGH=not on_input, ADD=total is not None,
        BLOCK=min(columns, next_power_of_2(dim)), num_warps=warps,
        **overlapping(),
    )  # fmt: skip
    return out


def _tiles_of_both(
    x: Tensor,
    experts: Tensor,
    stacks: tuple[Weight, Weight],
    num_experts: int,
    rounds: bool,
    bare: bool,
) -> Tiles:
    """Of both products, which have the same rows. `bare`: they have no biases, limits or factors of
    their input.
    """
    tokens, top_k = experts.shape
    packed = [stack for stack in stacks if isinstance(stack, PackedWeight)]
    if x.dtype == torch.float32:
        return _EXACT_PACKED_TILES if packed else _EXACT_TILES
    kind = PackedWeight if packed else RoundedRows if rounds else Tensor
    tiles = choose_tiles(tokens, top_k, num_experts, kind)
    if tiles.rows > 64 and any(runs_of_turn(stack) > 1 for stack in packed):
        return _PACKED_TILES[-2][1]  # with more rows, two runs would exceed the registers
    # multiply_blocks is faster than tiles of 64 rows, too.
    fewer = kind is Tensor and bare and tiles.rows == 64
    if fewer and all(takes_blocks(x, stack, BLOCK) for stack in stacks):
        return _TILES[-1][1]
    return tiles


def _is_rounded(x: Tensor, matrix: Weight) -> bool:
    """Whether x is rounded for a product with a stack, on FP8 tensor cores."""
    if not isinstance(matrix, Fp8Weight) or not on_hopper(x.device):
        return False
    return has_fp8_tiles(x.dtype, common_columns(matrix))


def _round(x: Rows, matrix: Weight) -> RoundedRows:
    assert isinstance(matrix, Fp8Weight)
    return quantize(x, rounding_group(matrix))


def _fit(tile: int, size: int) -> int:
    """`tile`, but no larger than the power of two that covers `size`; at least 16, for tl.dot."""
    whole: int = next_power_of_2(size)
    return max(16, min(tile, whole))


def _row_tile(num_experts: int) -> tuple[int, int]:
    """Tokens and experts of one program of routing or sorting; powers of two."""
    columns = next_power_of_2(num_experts)
    return max(1, min(_MAX_ROWS, _HELD // columns)), columns
