"""Attention of decode rows, one query token each, in a kernel that needs no plan of the host.

Long contexts are split into parts, so that all multiprocessors have about as much to do; the last
part of a row to finish joins them (split-KV attention, Dao et al. 2023, "Flash-Decoding"), always
in the order of the context, so that the result does not depend on who was last. `split_kv` decides
about the parts once a step, on the device; all layers use them. Knows the cache's layout,
[num_pages, 2, page_size, kv_heads, head_dim].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gllm_engine.ops.triton.pdl import OVERLAP, begin_alone, overlapping

# Parts beyond one a row. Times the K/V heads, these keep the chip busy where rows are few.
_EXTRA_PARTS = 32
# Tokens: joining parts that are shorter costs more than it saves.
_MIN_PART = 256
# Tokens of one turn of the loop over a part, at most, and bytes of their K: several such tiles are
# in shared memory at once.
_BLOCK = 128
_TILE_BYTES = 1 << 15
_WARPS, _STAGES = 4, 3
# Numbers of parts that are joined at once. More would take registers from the loop over a part:
# with 168 of them, three programs share a multiprocessor.
_JOINED = 2048
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class KvSplits:
    """How the contexts of some rows are divided; where results of parts meet."""

    page_table: Tensor  # [slots, pages]
    slots: Tensor  # [rows]
    lens: Tensor  # [rows] context lengths
    window: int | None
    items: Tensor  # [3, parts] int32: row (-1: no such part), number in the row, parts of the row
    arrived: Tensor  # [rows, kv_heads] int32: parts that are done; zeros between launches
    share: Tensor  # [1] int32: tokens of a part


# A kernel compiled for a number divisible by 16 would be compiled again for others.
@triton.jit(do_not_specialize=["rows", "capacity"])
def _split(
    lens, items, arrived, share_out, rows, capacity, kv_heads,
    EXTRA: tl.constexpr, MIN: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)
    span = tl.load(lens + row, mask=row < rows, other=0).to(tl.int32)
    if WINDOW:
        span = tl.minimum(span, WINDOW)
    share = tl.cdiv(tl.cdiv(tl.sum(span.to(tl.int64), 0), EXTRA), BLOCK).to(tl.int32) * BLOCK
    share = tl.maximum(share, MIN)
    tl.store(share_out, share)
    count = tl.cdiv(span, share)
    end = tl.cumsum(count, 0)
    for part in range(tl.max(count, 0)):
        at = items + end - count + part
        there = part < count
        tl.store(at, row, mask=there)
        tl.store(at + capacity, part, mask=there)
        tl.store(at + 2 * capacity, count, mask=there)
    total = tl.sum(count, 0)
    for start in range(0, capacity, ROWS):
        at = start + row
        tl.store(items + at, -1, mask=(at >= total) & (at < capacity))
    for head in range(kv_heads):
        tl.store(arrived + row * kv_heads + head, 0, mask=row < rows)


def split_kv(
    page_table: Tensor, slots: Tensor, lens: Tensor, kv_heads: int, window: int | None
) -> KvSplits:
    """Divide contexts of `lens` [rows] tokens, at least 1 each, into parts of about equal length.

    `window`: tokens that a row sees, its own included; None: all. Waits for nothing.
    """
    rows = slots.shape[0]
    capacity = rows + _EXTRA_PARTS
    items = slots.new_empty(3, capacity, dtype=torch.int32)
    arrived = items.new_empty(rows, kv_heads)
    share = items.new_empty(1)
    _split[(1,)](
        lens, items, arrived, share, rows, capacity, kv_heads, EXTRA=_EXTRA_PARTS,
        MIN=_MIN_PART, WINDOW=window or 0, BLOCK=_BLOCK, ROWS=triton.next_power_of_2(rows),
        num_warps=4,
    )  # fmt: skip
    return KvSplits(page_table, slots, lens, window, items, arrived, share)


@triton.jit
def _attend_part(
    x, table, cache, first, end, kv_head, scale,
    KV: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Softmax-weighted V of tokens first .. end - 1, unnormalised, with its peak and its sum."""
    d = tl.arange(0, BLOCK_DIM)
    peak = tl.full((HEADS,), -float("inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, BLOCK_DIM), tl.float32)
    for start in range(first, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        page = tl.load(table + at // PAGE, mask=inside, other=0)
        line = ((page * 2 * PAGE + at % PAGE) * KV + kv_head) * DIM
        mask = inside[None, :] & (d < DIM)[:, None]
        k = tl.load(cache + line[None, :] + d[:, None], mask=mask, other=0.0).to(x.dtype)
        v_line = line + PAGE * KV * DIM
        mask = inside[:, None] & (d < DIM)[None, :]
        v = tl.load(cache + v_line[:, None] + d[None, :], mask=mask, other=0.0).to(x.dtype)
        score = tl.dot(x, k, input_precision="ieee") * scale
        score = tl.where(inside[None, :], score, -float("inf"))
        top = tl.maximum(peak, tl.max(score, 1))
        weight = tl.exp2(score - top[:, None])
        decay = tl.exp2(peak - top)
        total = total * decay + tl.sum(weight, 1)
        acc = acc * decay[:, None] + tl.dot(weight.to(x.dtype), v, input_precision="ieee")
        peak = top
    return acc, peak, total


@triton.jit
def _join(
    parts, peaks, sums, out, part, first_head, used,
    GROUP: tl.constexpr, DIM: tl.constexpr, STEP: tl.constexpr,
    JOINED: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Parts from number `part` on of a group of heads to `out`. Parts lie STEP heads apart."""
    number, head, d = tl.arange(0, JOINED), tl.arange(0, BLOCK_GROUP), tl.arange(0, BLOCK_DIM)
    wanted = (head < GROUP)[:, None] & (d < DIM)[None, :]
    top = tl.full((BLOCK_GROUP,), -1e30, tl.float32)  # finite: heads of no group join nothing
    denominator = tl.zeros((BLOCK_GROUP,), tl.float32)
    acc = tl.zeros((BLOCK_GROUP, BLOCK_DIM), tl.float32)
    for start in range(0, used, JOINED):
        at = ((part + start + number) * STEP + first_head)[:, None] + head[None, :]
        there = (start + number < used)[:, None] & (head < GROUP)[None, :]
        peak = tl.load(peaks + at, mask=there, other=-float("inf"), cache_modifier=".cg")
        total = tl.load(sums + at, mask=there, other=0.0, cache_modifier=".cg")
        values = tl.load(
            parts + at[:, :, None] * DIM + d[None, None, :],
            mask=there[:, :, None] & (d < DIM)[None, None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(peak, 0))
        weight, decay = tl.exp2(peak - higher[None, :]), tl.exp2(top - higher)
        denominator = denominator * decay + tl.sum(total * weight, 0)
        acc = acc * decay[:, None] + tl.sum(values * weight[:, :, None], 0)
        top = higher
    place = out + head[:, None] * DIM + d[None, :]
    tl.store(place, (acc / denominator[:, None]).to(out.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["capacity"])
def _decode_attention(
    q, cache, page_table, slots, lens, items, arrived, share_in, out, parts, peaks, sums,
    capacity, width, scale,
    KV: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr,
    JOINED: tl.constexpr, BLOCK_GROUP: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    item, kv_head = tl.program_id(0), tl.program_id(1)
    begin_alone(OVERLAPS)
    row = tl.load(items + item)
    if row >= 0:
        part, used = tl.load(items + capacity + item), tl.load(items + 2 * capacity + item)
        length, share = tl.load(lens + row).to(tl.int32), tl.load(share_in)
        table = page_table + tl.load(slots + row) * width
        first = tl.maximum(length - WINDOW, 0) if WINDOW else 0
        first += part * share
        head, d = tl.arange(0, HEADS), tl.arange(0, BLOCK_DIM)
        wanted = (head < GROUP)[:, None] & (d < DIM)[None, :]
        place = ((row * KV + kv_head).to(tl.int64) * GROUP + head)[:, None] * DIM + d[None, :]
        x = tl.load(q + place, mask=wanted, other=0.0)
        acc, peak, total = _attend_part(
            x, table, cache, first, tl.minimum(first + share, length), kv_head, scale,
            KV, HEADS, DIM, BLOCK_DIM, PAGE, BLOCK,
        )  # fmt: skip
        if used == 1:
            tl.store(out + place, (acc / total[:, None]).to(out.dtype.element_ty), mask=wanted)
        else:
            at = (item * KV + kv_head) * GROUP + head
            tl.store(parts + at[:, None] * DIM + d[None, :], acc, mask=wanted)
            tl.store(peaks + at, peak, mask=head < GROUP)
            tl.store(sums + at, total, mask=head < GROUP)
            tl.debug_barrier()  # all stores of this program come before its arrival
            before = tl.atomic_add(arrived + row * KV + kv_head, 1, sem="acq_rel")
            tl.debug_barrier()
            if before == used - 1:
                tl.store(arrived + row * KV + kv_head, 0)
                _join(
                    parts, peaks, sums, out + (row * KV + kv_head) * GROUP * DIM,
                    item - part, kv_head * GROUP, used,
                    GROUP, DIM, KV * GROUP, JOINED, BLOCK_GROUP, BLOCK_DIM,
                )  # fmt: skip


def decode_attention(q: Tensor, cache: Tensor, plan: KvSplits, out: Tensor | None = None) -> Tensor:
    """softmax(q k' / sqrt(head_dim)) v over the pages of each row's slot; as q.

    q: [rows, heads, head_dim]; cache: of any kind of number that converts to q's.
    """
    rows, heads, dim = q.shape
    kv_heads, page_size = cache.shape[3], cache.shape[2]
    group, capacity = heads // kv_heads, plan.items.shape[1]
    block_dim, block_group = max(16, triton.next_power_of_2(dim)), triton.next_power_of_2(group)
    out = torch.empty_like(q) if out is None else out
    parts = q.new_empty(capacity, heads, dim, dtype=torch.float32)
    peaks, sums = parts.new_empty(2, capacity, heads)
    _decode_attention[(capacity, kv_heads)](
        q, cache, plan.page_table, plan.slots, plan.lens, plan.items, plan.arrived, plan.share,
        out, parts, peaks, sums, capacity, plan.page_table.shape[1], dim**-0.5 * _LOG2_E,
        KV=kv_heads, GROUP=group, HEADS=max(16, block_group), DIM=dim,
        BLOCK_DIM=block_dim, PAGE=page_size, WINDOW=plan.window or 0,
        BLOCK=min(_BLOCK, _TILE_BYTES // (block_dim * q.element_size())),
        JOINED=max(1, _JOINED // (block_group * block_dim)), BLOCK_GROUP=block_group,
        OVERLAPS=OVERLAP, num_warps=_WARPS, num_stages=_STAGES, **overlapping(),
    )  # fmt: skip
    return out
