"""Attention of decode rows, one query token each, in a kernel that needs no plan from the host.

Long contexts are split into parts, so that all multiprocessors have about equal work (split-KV,
Dao et al. 2023, "Flash-Decoding"). `split_kv` chooses the parts once per step, on the device; all
layers use them. Knows the cache layout, [num_pages, 2, page_size, kv_heads, head_dim].

One program computes one part of one row for one K/V head. Here a row has 3 parts, and part 1 is the
last to finish:

    context    |---- part 0 ----|---- part 1 ----|- part 2 -|    row r, K/V head h
                       |                |              |
    store           partial 0       partial 1      partial 2     unnormalised V sum, peak, sum
                       |                |              |
    arrived[r, h]    0 -> 1           2 -> 3         1 -> 2      atomic add, acquire and release
                                        |
                          the old value is parts - 1: part 1 arrived last
                          sets arrived[r, h] back to 0 for the next layer
                          joins partials 0, 1, 2 and writes the row's output

The partials are always joined in the order of the context, so the result does not depend on which
part arrives last. No program waits for another one. A row of one part writes its output directly.

float8 numbers become float16 numbers, exactly, by one instruction for two of them; float16 queries
and weights have more digits than bfloat16 ones. A tile is loaded as pairs of channels, so that the
numbers of even channels are one matrix in registers, and those of odd channels another one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gllm_engine.ops.kernels import HALF
from gllm_engine.ops.triton.fp8 import split_float8
from gllm_engine.ops.triton.launch_sizes import next_power_of_2
from gllm_engine.ops.triton.memory import load, store_rounded
from gllm_engine.ops.triton.pdl import ON_GPU, begin_alone, overlapping

# Programs beyond one per row and K/V head, for few rows: nearly as many as Hopper's multiprocessors
# hold, which is three each.
_PROGRAMS = 384
# Least tokens of a part: joining shorter parts costs more than splitting saves.
_MIN_PART = 256
# Most tokens in one iteration of the loop over a part, and most bytes of their K tile: several such
# tiles are in shared memory at once.
_BLOCK = 128
_TILE_BYTES = 1 << 14
_WARPS, _STAGES = 4, 3
# Partials that are on their way to the join at once, and most numbers of these: in registers.
_JOINED = 8
_JOINED_NUMBERS = 1 << 13
_LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class KvSplits:
    """How the contexts of a step's decode rows are split into parts, and the arrival counters."""

    page_table: Tensor  # [slots, pages]
    lens: Tensor  # [rows] context lengths
    # [6, parts] int32: row (-1: unused), index of the part, number of the row's parts, first token,
    # end, slot: all that a program needs, so that it waits for memory once before it reads pages
    items: Tensor
    arrived: Tensor  # [rows, kv_heads] int32: finished parts; all 0 between launches
    starts: Tensor  # [rows + 1] int32: the first part of each row, and the number of parts


@triton.jit
def _first_seen(length, WINDOW: tl.constexpr, CHUNKED: tl.constexpr):
    """The first token that the last one of `length` tokens sees. WINDOW: 0: all."""
    first = length * 0
    if CHUNKED:
        first = tl.maximum(length - 1, 0) // WINDOW * WINDOW
    elif WINDOW:
        first = tl.maximum(length - WINDOW, 0)
    return first


# Without this, Triton compiles one kernel for counts divisible by 16 and another one for the rest.
@triton.jit(do_not_specialize=["rows", "capacity"])
def _split(
    slots, lens, items, arrived, starts, rows, capacity, kv_heads,
    EXTRA: tl.constexpr, MIN: tl.constexpr, WINDOW: tl.constexpr, CHUNKED: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)
    length = tl.load(lens + row, mask=row < rows, other=0).to(tl.int32)
    slot = tl.load(slots + row, mask=row < rows, other=0)
    first = _first_seen(length, WINDOW, CHUNKED)
    span = length - first
    share = tl.cdiv(tl.cdiv(tl.sum(span.to(tl.int64), 0), EXTRA), BLOCK).to(tl.int32) * BLOCK
    share = tl.maximum(share, MIN)
    # Rounded to the nearest: a short part more would cost more than it saves.
    count = tl.maximum((span + share // 2) // share, 1)
    own = tl.maximum(tl.cdiv(tl.cdiv(span, count), BLOCK), 1) * BLOCK
    count = tl.cdiv(span, own)
    end = tl.cumsum(count, 0)
    tl.store(starts, 0)
    tl.store(starts + 1 + row, end, mask=row < rows)
    for part in range(tl.max(count, 0)):
        at = items + end - count + part
        there = part < count
        tl.store(at, row, mask=there)
        tl.store(at + capacity, part, mask=there)
        tl.store(at + 2 * capacity, count, mask=there)
        tl.store(at + 3 * capacity, first, mask=there)
        tl.store(at + 4 * capacity, tl.minimum(first + own, length), mask=there)
        tl.store(at + 5 * capacity, slot, mask=there)
        first += own
    total = tl.sum(count, 0)
    for start in range(0, capacity, ROWS):
        at = start + row
        tl.store(items + at, -1, mask=(at >= total) & (at < capacity))
    for head in range(kv_heads):
        tl.store(arrived + row * kv_heads + head, 0, mask=row < rows)


def split_kv(
    page_table: Tensor,
    slots: Tensor,
    lens: Tensor,
    kv_heads: int,
    window: int | None,
    chunked: bool = False,
    extra: int | None = None,
    least: int = _MIN_PART,
) -> KvSplits:
    """Split contexts of `lens` [rows] tokens into parts of about equal length; one of 0 has none.

    `kv_heads`: arrival counters of a row; 0: parts are joined by another kernel. `window`,
    `chunked`: as AttentionPlanner.plan. `extra`: parts beyond one per row; None: as many as suit
    decode_attention. `least`: tokens of a part, but for a row's last one. The host does not wait.
    """
    extra = extra or max(1, _PROGRAMS // kv_heads)
    rows = slots.shape[0]
    capacity = rows + extra
    items = slots.new_empty(6, capacity, dtype=torch.int32)
    arrived = items.new_empty(rows, kv_heads)
    starts = items.new_empty(rows + 1)
    _split[(1,)](
        slots, lens, items, arrived, starts, rows, capacity, kv_heads, EXTRA=extra, MIN=least,
        WINDOW=window or 0, CHUNKED=chunked, BLOCK=min(_BLOCK, least),
        ROWS=next_power_of_2(rows), num_warps=4,
    )  # fmt: skip
    return KvSplits(page_table, lens, items, arrived, starts)


@triton.jit
def _halves(x, HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """The even and the odd channels of queries, in float16, whose largest number is 65504."""
    wide = tl.clamp(x.to(tl.float32), -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.split(tl.reshape(wide.to(tl.float16), (HEADS, BLOCK_DIM // 2, 2)))


@triton.jit
def _attend_part(
    x, table, cache, first, end, kv_head, scale, cap, peak, total,
    KV: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, CAPPED: tl.constexpr, PAIRED: tl.constexpr,
    ON_GPU: tl.constexpr,
):  # fmt: skip
    """Unnormalised softmax-weighted V of tokens first .. end - 1, peak score and sum of weights.

    `peak`, `total`: [HEADS] those of keys before these tokens, whose values are 0. PAIRED: `cache`
    has pairs of float8 numbers; `even` and `odd` are of the channels with such numbers.
    """
    WIDTH: tl.constexpr = DIM // 2 if PAIRED else DIM
    BLOCK_WIDTH: tl.constexpr = BLOCK_DIM // 2 if PAIRED else BLOCK_DIM
    d = tl.arange(0, BLOCK_WIDTH)
    acc = tl.zeros((HEADS, BLOCK_WIDTH), tl.float32)
    if PAIRED:
        x_even, x_odd = _halves(x, HEADS, BLOCK_DIM)
        acc_odd = tl.zeros((HEADS, BLOCK_WIDTH), tl.float32)
    # Page numbers come an iteration early. If K and V waited for a load of the same iteration,
    # Triton would start their copies only when nothing is left to compute.
    at = first + tl.arange(0, BLOCK)
    page = tl.load(table + at // PAGE, mask=at < end, other=0)
    for start in range(first, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        now = page
        page = tl.load(table + (at + BLOCK) // PAGE, mask=at + BLOCK < end, other=0)
        line = ((now * 2 * PAGE + at % PAGE) * KV + kv_head) * WIDTH
        mask = inside[None, :] & (d < WIDTH)[:, None]
        k = tl.load(cache + line[None, :] + d[:, None], mask=mask, other=0 if PAIRED else 0.0)
        v_line = line + PAGE * KV * WIDTH
        mask = inside[:, None] & (d < WIDTH)[None, :]
        v = tl.load(cache + v_line[:, None] + d[None, :], mask=mask, other=0 if PAIRED else 0.0)
        if PAIRED:
            even, odd = split_float8(k, ON_GPU)
            score = tl.dot(x_odd, odd, tl.dot(x_even, even)) * scale
        else:
            score = tl.dot(x, k.to(x.dtype), input_precision="ieee") * scale
        if CAPPED:  # tanh(s) = 1 - 2 / (1 + exp(2s)); scores and `cap` are multiples of log2(e)
            score = cap - 2.0 * cap / (1.0 + tl.exp(2.0 * score / cap))
        score = tl.where(inside[None, :], score, -float("inf"))
        top = tl.maximum(peak, tl.max(score, 1))
        weight = tl.exp2(score - top[:, None])
        decay = tl.exp2(peak - top)
        total = total * decay + tl.sum(weight, 1)
        if PAIRED:
            even, odd = split_float8(v, ON_GPU)
            weight = weight.to(tl.float16)
            acc = tl.dot(weight, even, acc * decay[:, None])
            acc_odd = tl.dot(weight, odd, acc_odd * decay[:, None])
        else:
            v = v.to(x.dtype)
            acc = acc * decay[:, None] + tl.dot(weight.to(x.dtype), v, input_precision="ieee")
        peak = top
    if PAIRED:
        acc = tl.interleave(acc, acc_odd)
    return acc, peak, total


@triton.jit
def _join(
    parts, peaks, sums, out, part, first_head, used,
    GROUP: tl.constexpr, DIM: tl.constexpr, STEP: tl.constexpr,
    JOINED: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Join `used` partials from item `part` on into `out`, for the query heads of one K/V head.

    Partials of consecutive items are STEP heads apart. Threads exchange nothing.
    """
    head, d = tl.arange(0, BLOCK_GROUP), tl.arange(0, BLOCK_DIM)
    wanted = (head < GROUP)[:, None] & (d < DIM)[None, :]
    top = tl.full((BLOCK_GROUP,), -1e30, tl.float32)  # finite: else padding heads compute inf - inf
    denominator = tl.zeros((BLOCK_GROUP,), tl.float32)
    acc = tl.zeros((BLOCK_GROUP, BLOCK_DIM), tl.float32)
    for start in range(0, used, JOINED):
        for number in tl.static_range(JOINED):
            at = (part + start + number) * STEP + first_head + head
            there = (start + number < used) & (head < GROUP)
            peak = tl.load(peaks + at, mask=there, other=-float("inf"), cache_modifier=".cg")
            total = tl.load(sums + at, mask=there, other=0.0, cache_modifier=".cg")
            values = tl.load(
                parts + at[:, None] * DIM + d[None, :],
                mask=there[:, None] & wanted, other=0.0, cache_modifier=".cg",
            )  # fmt: skip
            higher = tl.maximum(top, peak)
            weight, decay = tl.exp2(peak - higher), tl.exp2(top - higher)
            denominator = denominator * decay + total * weight
            acc = acc * decay[:, None] + values * weight[:, None]
            top = higher
    place = out + head[:, None] * DIM + d[None, :]
    store_rounded(place, acc / denominator[:, None], wanted)


@triton.jit(do_not_specialize=["capacity"])
def _decode_attention(
    q, cache, page_table, items, arrived, sinks, out, parts, peaks, sums,
    capacity, width, scale, cap,
    KV: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, JOINED: tl.constexpr,
    BLOCK_GROUP: tl.constexpr, CAPPED: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    # The heads of a token are neighbours in memory, and read at the same time.
    kv_head, item = tl.program_id(0), tl.program_id(1)
    begin_alone()
    its = items + item
    row, part, used = tl.load(its), tl.load(its + capacity), tl.load(its + 2 * capacity)
    first, end = tl.load(its + 3 * capacity), tl.load(its + 4 * capacity)
    slot = tl.load(its + 5 * capacity).to(tl.int64)
    if row >= 0:
        head, d = tl.arange(0, HEADS), tl.arange(0, BLOCK_DIM)
        wanted = (head < GROUP)[:, None] & (d < DIM)[None, :]
        place = ((row * KV + kv_head).to(tl.int64) * GROUP + head)[:, None] * DIM + d[None, :]
        x = load(q + place, wanted)
        peak = tl.full((HEADS,), -float("inf"), tl.float32)
        total = tl.zeros((HEADS,), tl.float32)
        if sinks is not None:  # one more key, in the first part
            sink = load(sinks + kv_head * GROUP + head, head < GROUP)
            peak = tl.where(part == 0, sink.to(tl.float32) * _LOG2_E, peak)
            total = tl.where(part == 0, 1.0, total)
        acc, peak, total = _attend_part(
            x, page_table + slot * width, cache, first, end, kv_head, scale, cap,
            peak, total, KV, HEADS, DIM, BLOCK_DIM, PAGE, BLOCK, CAPPED, PAIRED, ON_GPU,
        )  # fmt: skip
        if used == 1:
            store_rounded(out + place, acc / total[:, None], wanted)
        else:
            at = (item * KV + kv_head) * GROUP + head
            tl.store(parts + at[:, None] * DIM + d[None, :], acc, mask=wanted)
            tl.store(peaks + at, peak, mask=head < GROUP)
            tl.store(sums + at, total, mask=head < GROUP)
            tl.debug_barrier()  # all threads have stored their partial before the arrival
            before = tl.atomic_add(arrived + row * KV + kv_head, 1, sem="acq_rel")
            tl.debug_barrier()
            if before == used - 1:
                tl.store(arrived + row * KV + kv_head, 0)
                _join(
                    parts, peaks, sums, out + (row * KV + kv_head) * GROUP * DIM,
                    item - part, kv_head * GROUP, used,
                    GROUP, DIM, KV * GROUP, JOINED, BLOCK_GROUP, BLOCK_DIM,
                )  # fmt: skip


def decode_attention(
    q: Tensor,
    cache: Tensor,
    plan: KvSplits,
    out: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(q k' * scale) v over the pages of each row's slot; shape and dtype of q.

    q: [rows, heads, head_dim]; cache: any dtype that converts to q's. `scale`, `softcap`: as
    AttentionPlanner.plan. `sinks`: as Ops.attend.
    """
    rows, heads, dim = q.shape
    kv_heads, page_size = cache.shape[3], cache.shape[2]
    group, capacity = heads // kv_heads, plan.items.shape[1]
    paired = cache.dtype == torch.float8_e4m3fn and q.dtype in HALF and dim % 2 == 0
    block_dim = max(32 if paired else 16, next_power_of_2(dim))
    block_group = next_power_of_2(group)
    out = torch.empty_like(q) if out is None else out
    parts = q.new_empty(capacity, heads, dim, dtype=torch.float32)
    peaks, sums = parts.new_empty(2, capacity, heads)
    _decode_attention[(kv_heads, capacity)](
        q, cache.view(torch.int16) if paired else cache, plan.page_table, plan.items, plan.arrived,
        sinks, out, parts, peaks, sums, capacity, plan.page_table.shape[1],
        (scale or dim**-0.5) * _LOG2_E.value, (softcap or 0.0) * _LOG2_E.value,
        KV=kv_heads, GROUP=group, HEADS=max(16, block_group), DIM=dim,
        BLOCK_DIM=block_dim, PAGE=page_size,
        BLOCK=max(16, min(_BLOCK, _TILE_BYTES // (block_dim * cache.element_size()))),
        JOINED=max(1, min(_JOINED, _JOINED_NUMBERS // (block_group * block_dim))),
        BLOCK_GROUP=block_group, CAPPED=softcap is not None, PAIRED=paired,
        num_warps=_WARPS, num_stages=_STAGES, **overlapping(),
    )  # fmt: skip
    return out
