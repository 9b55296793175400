"""The products of moe.py for many rows on Hopper: of 16-bit numbers, or of FP8 numbers with a scale
per block of 128 x 128. In Gluon, Triton's language in which the warps of a program have different
roles: one loads, two multiply half of the rows each.

A program computes tiles one after the other: it loads the next one while it stores one. A turn is
128 bytes of 128 rows of x and of two tiles of the matrix, gate's and up's or neighbours, each with
128 rows. 16-bit products are added by the tensor cores, which work on both halves' turns. An FP8
product is scaled before it is added. Tensor cores that wait for that are idle, so the halves take
turns at them:

    load         [turn 4 ]       [turn 5 ]       [turn 6 ] ...
    rows 0-63    [gate 1 ] scale [up 1   ] scale [gate 2 ] ...
    rows 64-127    scale [gate 1 ] scale [up 1   ] scale   ...

No role waits for ever. All roles run over the same tiles and turns, for which only `groups` counts;
a program may have none. Turn n uses stage n % _STAGES, for the p-th time, p = n // _STAGES, and
with it the p-th phases of two barriers, which a wait tells apart by the parity of p:

    full    ends when the 128 threads that load have copied their parts, and both tiles are there
    empty   ends when each half has arrived once, after its last read of the stage

The loads of turn n wait for phase p - 1 of empty, and the halves wait for phase p of full. So loads
are at most _STAGES turns ahead of the slower half, no phase begins before all have waited for the
one before it, and parity is enough. A half without rows only waits and arrives. An arrival is the
whole role's: Triton lets its warps meet before it, so none is left in an earlier phase.

For FP8, named barrier 8 is half 0's turn at the tensor cores and 9 is half 1's; each counts 128
threads that pass the turn and 128 that take it. Half 1 passes once before all. Then in every turn,
with rows or without, half 0 does take 8, pass 9 twice, and half 1 take 9, pass 8 twice. So the k-th
take of half 0 waits for what half 1 does after its take k - 1, and take k of half 1 for what half 0
does after its take k: never for each other. Nobody passes again before the other has taken what was
passed, so no barrier counts two passes as one turn. Nobody takes the last pass of half 1; that ends
with the program.

Each wait is for what comes earlier in this order: loads n + 1, the halves' products n, arrivals n,
loads n + 2 and so on. For loads n wait for arrivals n - _STAGES, products n for loads n and, if
FP8, for the other half's products n or n - 1, and arrivals n for products n and, if 16 bits, for
loads n + 1. No wait depends on another program.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gllm_engine.ops.kernels import on_hopper
from gllm_engine.ops.triton.fp8 import LARGEST_FLOAT8, LEAST_SCALE
from gllm_engine.ops.triton.pdl import OVERLAP, begin_alone, overlapping
from gllm_engine.ops.weight import Fp8Weight, RoundedRows, Rows, Weight

# Rows of a tile, and rows and columns of a block with one scale.
BLOCK = 128
_BLOCK, _HALF = gl.constexpr(BLOCK), gl.constexpr(BLOCK // 2)
_STAGES = gl.constexpr(4)
_begin_alone = gluon.jit(begin_alone.fn)


@gluon.jit
def _find(groups, block, EXPERTS: gl.constexpr):
    """The expert of a block of rows, its first row, and the end of the expert's rows."""
    EACH: gl.constexpr = gl.BlockedLayout([max(EXPERTS // 32, 1)], [32], [4], [0])
    blocks = groups + 2 * EXPERTS
    expert = gl.sum((gl.load(blocks + gl.arange(0, EXPERTS, EACH)) <= block).to(gl.int32), 0)
    start, end = gl.load(groups + expert), gl.load(groups + EXPERTS + expert)
    block -= gl.load(blocks + expert) - gl.cdiv(end - start, _BLOCK)
    return expert, start + block * _BLOCK, end


@gluon.jit
def _load(
    loaded, stages, TOP_K: gl.constexpr, GATED: gl.constexpr, EXPERTS: gl.constexpr
):  # fmt: skip
    """Copies what turns need, and where the result's rows are stored: -1 for rows past the expert's
    end, which are copies of the last one.
    """
    x, x_scales, padded, matrix, scales, order, groups, width, depth = loaded
    BYTES: gl.constexpr = x.dtype.element_ty.primitive_bitwidth // 8
    COPY: gl.constexpr = gl.BlockedLayout([1, 16 // BYTES], [4, 8], [4, 1], [1, 0])
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    COLUMNS: gl.constexpr = _BLOCK if GATED else 2 * _BLOCK
    DEPTH: gl.constexpr = _BLOCK // BYTES
    a, b, s, places, full, empty = stages
    other = width if GATED else _BLOCK  # rows of the matrix from one tile to the other
    rows = width * 2 if GATED else width
    parts = width // COLUMNS
    turns = depth // DEPTH
    end_tile = gl.load(groups + 3 * EXPERTS - 1) * parts
    n = 0
    for tile in range(gl.program_id(0), end_tile, gl.num_programs(0)):
        expert, first, end = _find(groups, tile // parts, EXPERTS)
        place = first + gl.arange(0, _BLOCK, LINE)
        here = place < end
        line = gl.minimum(place, end - 1)
        source = gl.minimum(first + gl.arange(0, _BLOCK, gl.SliceLayout(1, COPY)), end - 1)
        pair = gl.load(order + line)
        if GATED:
            line = pair // TOP_K
            source = gl.load(order + source) // TOP_K
        else:
            place = pair
        place = gl.where(here, place, -1)
        at = x + source.to(gl.int64)[:, None] * depth
        at += gl.arange(0, DEPTH, gl.SliceLayout(0, COPY))[None, :]
        row = expert * rows + tile % parts * COLUMNS
        scale_at = (row + gl.arange(0, _BLOCK, LINE) // _HALF * other) // _BLOCK * turns
        for turn in range(turns):
            stage = n % _STAGES
            mbarrier.wait(empty.index(stage), (n // _STAGES & 1) ^ 1)
            ready, column, tiles = full.index(stage), turn * DEPTH, b.index(stage)
            places.index(stage).store(place)
            mbarrier.expect(ready, 2 * BYTES * _BLOCK * DEPTH)
            first_tile, second_tile = tiles.slice(0, _BLOCK), tiles.slice(_BLOCK, _BLOCK)
            tma.async_copy_global_to_shared(matrix, [row, column], ready, first_tile)
            tma.async_copy_global_to_shared(matrix, [row + other, column], ready, second_tile)
            async_copy.async_copy_global_to_shared(a.index(stage), at + column)
            if BYTES == 1:
                async_copy.async_copy_global_to_shared(
                    s.index(2 * stage), x_scales + turn * padded + line
                )
                async_copy.async_copy_global_to_shared(
                    s.index(2 * stage + 1), scales + scale_at + turn
                )
            async_copy.mbarrier_arrive(ready, increment_count=False)
            n += 1


@gluon.jit
def _take_turn(HALF: gl.constexpr):
    """Wait until the other half has passed the turn. Triton's own barriers have smaller numbers."""
    if HALF == 0:
        gl.inline_asm_elementwise("bar.sync 8, 256; // $0", "=r", [], gl.int32, False, 1)
    else:
        gl.inline_asm_elementwise("bar.sync 9, 256; // $0", "=r", [], gl.int32, False, 1)


@gluon.jit
def _pass_turn(HALF: gl.constexpr):
    if HALF == 0:
        gl.inline_asm_elementwise("bar.arrive 9, 256; // $0", "=r", [], gl.int32, False, 1)
    else:
        gl.inline_asm_elementwise("bar.arrive 8, 256; // $0", "=r", [], gl.int32, False, 1)


@gluon.jit
def _add_turns(stages, n, turns, HALF: gl.constexpr, MMA: gl.constexpr):
    """_sum_turns without scales: products are added by the tensor cores, with both tiles at once,
    and a turn begins before the one before it has ended.
    """
    WIDE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    a, b, s, places, full, empty = stages
    sums = gl.zeros([_HALF, 2 * _BLOCK], gl.float32, WIDE)
    for turn in range(n, n + turns):
        stage = turn % _STAGES
        mbarrier.wait(full.index(stage), turn // _STAGES & 1)
        fence_async_shared()
        rows = a.index(stage).slice(HALF * _HALF, _HALF)
        sums = warpgroup_mma(rows, b.index(stage).permute((1, 0)), sums, is_async=True)
        sums = warpgroup_mma_wait(1, deps=[sums])
        mbarrier.arrive(empty.index((turn - 1) % _STAGES), pred=turn > n)
    sums = warpgroup_mma_wait(0, deps=[sums])
    mbarrier.arrive(empty.index((n + turns - 1) % _STAGES))
    sums, ups = sums.reshape([_HALF, 2, _BLOCK]).permute((0, 2, 1)).split()
    return (
        gl.convert_layout(sums, MMA, assert_trivial=True),
        gl.convert_layout(ups, MMA, assert_trivial=True),
    )


@gluon.jit
def _sum_turns(stages, n, turns, HALF: gl.constexpr, MMA: gl.constexpr):
    """The products [64, 128] of a half's rows with both tiles, over the turns from n on."""
    SIDE: gl.constexpr = gl.SliceLayout(1, MMA)
    a, b, s, places, full, empty = stages
    part = gl.zeros([_HALF, _BLOCK], gl.float32, MMA)
    sums = gl.zeros([_HALF, _BLOCK], gl.float32, MMA)
    ups = gl.zeros([_HALF, _BLOCK], gl.float32, MMA)
    for turn in range(n, n + turns):
        stage = turn % _STAGES
        mbarrier.wait(full.index(stage), turn // _STAGES & 1)
        fence_async_shared()  # the rows of x were copied by threads
        rows = a.index(stage).slice(HALF * _HALF, _HALF)
        tiles, up_scale = b.index(stage), s.index(2 * stage + 1).slice(_HALF, _HALF)
        up = tiles.slice(_BLOCK, _BLOCK)
        _take_turn(HALF)
        part = warpgroup_mma(
            rows, tiles.slice(0, _BLOCK).permute((1, 0)), part, use_acc=False, is_async=True
        )
        _pass_turn(HALF)
        x_scale = s.index(2 * stage).slice(HALF * _HALF, _HALF).load(SIDE)
        scale = s.index(2 * stage + 1).slice(0, _HALF).load(SIDE) * x_scale
        up_scale = up_scale.load(SIDE) * x_scale
        part = warpgroup_mma_wait(0, deps=[part])
        sums += part * scale[:, None]
        _take_turn(HALF)
        part = warpgroup_mma(rows, up.permute((1, 0)), part, use_acc=False, is_async=True)
        _pass_turn(HALF)
        part = warpgroup_mma_wait(0, deps=[part])
        mbarrier.arrive(empty.index(stage))
        ups += part * up_scale[:, None]
    return sums, ups


@gluon.jit
def _sigmoid(v):
    """Of two numbers at once, which share the inverse of (1 + exp(-v)) (1 + exp(-w))."""
    return gl.inline_asm_elementwise(
        "{.reg .f32 a, b, r; mul.f32 a, $2, 0fBFB8AA3B; mul.f32 b, $3, 0fBFB8AA3B;"
        "min.NaN.f32 a, a, 0f42700000; min.NaN.f32 b, b, 0f42700000;"
        "ex2.approx.ftz.f32 a, a; ex2.approx.ftz.f32 b, b;"
        "add.f32 a, a, 0f3F800000; add.f32 b, b, 0f3F800000; mul.f32 r, a, b;"
        "rcp.approx.ftz.f32 r, r; mul.f32 $0, r, b; mul.f32 $1, r, a;}",
        "=&f,=&f,f,f", [v], gl.float32, True, 2,
    )  # fmt: skip


@gluon.constexpr_function
def _wide_layout(bits):
    """Of [64, 128], with 16 contiguous bytes in a thread and a row in four lanes, as it is in after
    a product; so numbers pass only between these.
    """
    columns = [[0, 1 << i] for i in range(7)]
    held = (128 // bits).bit_length() - 1
    return gl.DistributedLinearLayout(
        columns[:held] + columns[held + 2 :] + [[8, 0]],
        columns[held : held + 2] + [[1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, 128],
    )


@gluon.jit
def _store(v, out, place, column, width, WIDE: gl.constexpr):
    v = gl.convert_layout(v.to(out.dtype.element_ty), WIDE)
    at = place.to(gl.int64)[:, None] * width + column
    at += gl.arange(0, _BLOCK, gl.SliceLayout(0, WIDE))[None, :]
    gl.store(out + at, v, mask=(place >= 0)[:, None])


@gluon.jit
def _multiply(
    result, stages, HALF: gl.constexpr, GATED: gl.constexpr, EXPERTS: gl.constexpr,
    WHOLE: gl.constexpr,
):  # fmt: skip
    """Multiplies and stores one half of the rows of all tiles. WHOLE: see _store in moe.py."""
    groups, out, out_scales, padded_out, width, depth = result
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    SIDE: gl.constexpr = gl.SliceLayout(1, MMA)
    WIDE: gl.constexpr = _wide_layout(out.dtype.element_ty.primitive_bitwidth)
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    COLUMNS: gl.constexpr = _BLOCK if GATED else 2 * _BLOCK
    a, b, s, places, full, empty = stages
    SCALED: gl.constexpr = a.dtype == gl.float8e4nv
    parts = width // COLUMNS
    turns = depth // a.shape[2]
    tiles = gl.load(groups + 3 * EXPERTS - 1) * parts
    n = 0
    if HALF == 1 and SCALED:
        _pass_turn(HALF)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        mbarrier.wait(full.index(n % _STAGES), n // _STAGES & 1)
        own = places.index(n % _STAGES).slice(HALF * _HALF, _HALF)
        place = own.load(gl.SliceLayout(1, WIDE))
        if gl.sum(own.slice(0, 1).load(ONE), 0) >= 0:
            if SCALED:
                sums, ups = _sum_turns(stages, n, turns, HALF, MMA)
            else:
                sums, ups = _add_turns(stages, n, turns, HALF, MMA)
            column = tile % parts * COLUMNS
            if GATED:
                sums = sums * _sigmoid(sums) * ups
                if WHOLE is not None:
                    sums = sums.to(WHOLE).to(gl.float32)
                    scale = gl.maximum(gl.max(gl.abs(sums), 1) / LARGEST_FLOAT8, LEAST_SCALE)
                    side = gl.convert_layout(place, SIDE)
                    at = out_scales + tile % parts * padded_out + side
                    gl.store(at, scale, mask=side >= 0)
                    sums *= (1.0 / scale)[:, None]
            else:
                _store(ups, out, place, column + _BLOCK, width, WIDE)
            _store(sums, out, place, column, width, WIDE)
        else:
            for turn in range(n, n + turns):
                mbarrier.wait(full.index(turn % _STAGES), turn // _STAGES & 1)
                if SCALED:
                    for _ in gl.static_range(2):
                        _take_turn(HALF)
                        _pass_turn(HALF)
                mbarrier.arrive(empty.index(turn % _STAGES))
        n += turns


@gluon.jit(do_not_specialize=["padded", "padded_out"])
def _grouped_blocks(
    x, x_scales, padded, matrix, scales, order, groups, out, out_scales, padded_out, width, depth,
    TILE: gl.constexpr, TOP_K: gl.constexpr, GATED: gl.constexpr, EXPERTS: gl.constexpr,
    WHOLE: gl.constexpr,
):  # fmt: skip
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    DTYPE: gl.constexpr = x.dtype.element_ty
    DEPTH: gl.constexpr = _BLOCK * 8 // DTYPE.primitive_bitwidth
    a = gl.allocate_shared_memory(DTYPE, [_STAGES, _BLOCK, DEPTH], TILE)
    b = gl.allocate_shared_memory(DTYPE, [_STAGES, 2 * _BLOCK, DEPTH], TILE)
    s = gl.allocate_shared_memory(gl.float32, [2 * _STAGES, _BLOCK], LINE)
    places = gl.allocate_shared_memory(gl.int32, [_STAGES, _BLOCK], LINE)
    full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BARRIER)
    for i in gl.static_range(_STAGES):
        mbarrier.init(full.index(i), count=128 + 1)
        mbarrier.init(empty.index(i), count=2)
    _begin_alone()
    stages = (a, b, s, places, full, empty)
    result = (groups, out, out_scales, padded_out, width, depth)
    loaded = (x, x_scales, padded, matrix, scales, order, groups, width, depth)
    gl.warp_specialize(
        [
            (_multiply, (result, stages, 0, GATED, EXPERTS, WHOLE)),
            (_multiply, (result, stages, 1, GATED, EXPERTS, WHOLE)),
            (_load, (loaded, stages, TOP_K, GATED, EXPERTS)),
        ],
        [4, 4],
        [224, 56],  # registers: the first role has 224 too
    )


def numbers_and_scales(x: Rows | Fp8Weight) -> tuple[Tensor, Tensor]:
    """The numbers and their scales, or anything in place of these if there are none."""
    return (x, x) if isinstance(x, Tensor) else (x.numbers, x.scales)


def takes_blocks(x: Rows, matrix: Weight, rows: int) -> bool:
    """Whether multiply_blocks takes these, in blocks of `rows` rows of x."""
    if isinstance(x, RoundedRows):
        taken = (
            isinstance(matrix, Fp8Weight)
            and matrix.rows_per_scale == matrix.columns_per_scale == BLOCK
            and matrix.scale_row is None
            and matrix.first_column == 0
        )
    else:
        taken = isinstance(matrix, Tensor) and x.element_size() == matrix.element_size() == 2
    return (
        OVERLAP
        and on_hopper(x.device)
        and taken
        and rows == BLOCK
        and matrix.shape[1] % (2 * BLOCK) == matrix.shape[2] % BLOCK == 0
    )


def multiply_blocks(
    x: Rows,
    matrix: Weight,
    order: Tensor,
    groups: Tensor,
    top_k: int,
    gated: bool,
    out: Tensor,
    out_scales: Tensor,
    whole: tl.dtype | None,
) -> None:
    """See grouped_product. `out_scales`: [groups of columns, padded] if `out` is float8; `whole`:
    then the dtype to which a row is rounded before, else None.
    """
    assert isinstance(matrix, Tensor | Fp8Weight)
    _, width, depth = matrix.shape
    numbers, x_scales = numbers_and_scales(x)
    stack, scales = numbers_and_scales(matrix)
    size = stack.element_size()
    tile = gl.NVMMASharedLayout(128, 8 * size, 2)
    tiles = TensorDescriptor.from_tensor(stack.view(-1, depth), [BLOCK, BLOCK // size], tile)
    programs = torch.cuda.get_device_properties(x.device).multi_processor_count
    _grouped_blocks[(programs,)](
        numbers, x_scales, len(numbers), tiles, scales, order, groups, out, out_scales,
        len(out), width // 2 if gated else width, depth, TILE=tile, TOP_K=top_k, GATED=gated,
        EXPERTS=groups.shape[1], WHOLE=whole, num_warps=4, **overlapping(),
    )  # fmt: skip
