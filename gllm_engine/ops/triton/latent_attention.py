"""Multi-head latent attention: norm, rotation and the cache's latents, and attention over them.

Knows the cache layout, [num_pages, 1, page_size, 1, rank + rope_dim]: a latent, then the rotated
key. `attend_latent` computes the absorbed form, whose keys and values are the latents themselves.
Each token of a prefill chunk is a row, whose context ends at the token. A row may have a list of
the tokens that it attends to, in place of its context. There are three kernels:

    q_nope   [rows, heads, nope_dim]      _absorb: a product with W_UK for each head
    absorbed [rows, heads, rank]          _attend_latent: one program for a part of a row's context
    parts    [parts, heads, rank], logs   _project: a product with W_UV for each head, and the sum
    out      [rows, heads, value_dim]     of a row's parts, weighted by their softmax sums

All heads attend to the same latents, so a program computes a block of heads, and reads each latent
once from memory, for the scores and for the result. Tensor cores take 64 rows at least, but heads
are few: tokens are the rows of the scores, and channels those of the result:

    scores [tokens, heads]  = latents [tokens, rank] q' [rank, heads]
    sum    [rank, heads]   += latents' [rank, tokens] weights [tokens, heads]

Rows are split into parts as in decode_attention.py, and a row's parts have equal length. No
program waits for another one, and the result does not depend on their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gllm_engine.ops.kernels import EXTRA_PARTS, HALF
from gllm_engine.ops.protocol import AttentionPlan, PagedPlan, RotaryInputs
from gllm_engine.ops.triton.decode_attention import KvSplits, split_kv
from gllm_engine.ops.triton.fp8 import from_float8
from gllm_engine.ops.triton.launch_sizes import cdiv, next_power_of_2
from gllm_engine.ops.triton.memory import load, load_wide, own_range, program, store_rounded, stored
from gllm_engine.ops.triton.pdl import begin, begin_alone, overlapping

# Most heads of a program: more would need more registers than there are.
_HEADS = 32
# Most heads of a program whose tiles are copied to shared memory asynchronously. More heads leave
# no memory for three tiles.
_PIPELINED_HEADS = 16
# Warps of a program and stages of its loop, for tiles that are copied asynchronously, and for tiles
# that registers hold.
_PIPELINED = (4, 3)
_IN_REGISTERS = (8, 1)
# Tokens of the cache in one iteration; a part is a multiple of them.
_BLOCK = 64
# Up to _FEW rows, a product with W_UK or W_UV is divided among more programs; beyond _MANY rows, a
# program of `_project` has more rows.
_FEW = 16
_MANY = 64
_LOG2_E = 1.4426950408889634


@triton.jit
def _store_latent(
    q, latent, gain, cos, sin, positions, cache_index, cache, eps, q_stride, latent_stride,
    HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, RANK: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """One program per token: the queries' rotation, the latent's norm, the key's rotation.

    A thread that writes a pair of channels has read that pair, so that the queries are rotated in
    place.
    """
    token = program(0)
    half: tl.constexpr = ROPE // 2
    pair = tl.arange(0, half)
    if INTERLEAVED:
        a_at, b_at = 2 * pair, 2 * pair + 1
    else:
        a_at, b_at = pair, half + pair
    begin_alone()
    angle = tl.load(positions + token) * half + pair
    c, s = tl.load(cos + angle), tl.load(sin + angle)
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    wanted = head < HEADS
    row = q + token * q_stride + head * (NOPE + ROPE) + NOPE
    a = load_wide(row + a_at[None, :], wanted)
    b = load_wide(row + b_at[None, :], wanted)
    number = q.dtype.element_ty
    tl.store(row + a_at[None, :], (a * c[None, :] - b * s[None, :]).to(number), mask=wanted)
    tl.store(row + b_at[None, :], (b * c[None, :] + a * s[None, :]).to(number), mask=wanted)

    source = latent + token * latent_stride
    line = cache + tl.load(cache_index + token) * (RANK + ROPE)
    kind = cache.dtype.element_ty
    d = tl.arange(0, BLOCK_RANK)
    wide = load_wide(source + d, d < RANK)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / RANK + eps)
    normed = (wide * scale).to(number).to(tl.float32)
    normed = normed * load_wide(gain + d, d < RANK)
    tl.store(line + d, stored(normed.to(number), kind), mask=d < RANK)
    a = tl.load(source + RANK + a_at).to(tl.float32)
    b = tl.load(source + RANK + b_at).to(tl.float32)
    tl.store(line + RANK + a_at, stored((a * c - b * s).to(number), kind))
    tl.store(line + RANK + b_at, stored((b * c + a * s).to(number), kind))


def store_latent(
    q: Tensor,
    latent: Tensor,
    norm: tuple[Tensor, float],
    rotary: RotaryInputs,
    cache: Tensor,
    plan: AttentionPlan,
) -> None:
    """See Ops.store_latent. cos and sin: [max_model_len, rope_dim / 2] float32. The last two
    dimensions of q and the last one of latent are contiguous.
    """
    assert isinstance(plan, PagedPlan)
    cos, sin, interleaved, positions = rotary
    tokens, heads, key_dim = q.shape
    gain, eps = norm
    rank = len(gain)
    rope_dim = latent.shape[1] - rank
    _store_latent[(tokens,)](
        q, latent, gain, cos, sin, positions, plan.cache_index, cache, eps, q.stride(0),
        latent.stride(0),
        HEADS=heads, NOPE=key_dim - rope_dim, ROPE=rope_dim, RANK=rank, INTERLEAVED=interleaved,
        BLOCK_HEADS=next_power_of_2(heads),
        BLOCK_RANK=next_power_of_2(rank), **overlapping(),
    )  # fmt: skip


@triton.jit
def _gather_latents(
    cache, places, latents, k,
    HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, RANK: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """One program copies a latent, and its rotated key to all heads."""
    at = program(0)
    begin_alone()
    line = cache + tl.load(places + at) * (RANK + ROPE)
    number = k.dtype.element_ty
    d, r = tl.arange(0, BLOCK_RANK), tl.arange(0, ROPE)
    latent = load(line + d, d < RANK)
    tl.store(latents + at * RANK + d, from_float8(latent, number), mask=d < RANK)
    key = from_float8(tl.load(line + RANK + r), number)
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    row = k + (at * HEADS + head) * (NOPE + ROPE) + NOPE
    keys = tl.broadcast_to(key[None, :], (BLOCK_HEADS, ROPE))
    tl.store(row + r[None, :], keys, mask=head < HEADS)


def gather_latents(cache: Tensor, places: Tensor, latents: Tensor, k: Tensor) -> None:
    """Copy latents from the cache, and rotated keys into the last channels of all heads of k.

    places: [n] int64, page * page_size + offset of each token. latents: [n, rank] and k: [n, heads,
    key_dim], contiguous and of one dtype, which may not be the cache's.
    """
    rank = latents.shape[1]
    rope_dim = cache.shape[4] - rank
    _, heads, key_dim = k.shape
    _gather_latents[(len(places),)](
        cache, places, latents, k,
        HEADS=heads, NOPE=key_dim - rope_dim, ROPE=rope_dim, RANK=rank,
        BLOCK_HEADS=next_power_of_2(heads), BLOCK_RANK=next_power_of_2(rank),
        **overlapping(),
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _absorb(
    q, kv_up, out, rows, q_token, q_head,
    HEADS: tl.constexpr, NOPE: tl.constexpr, VALUE: tl.constexpr, RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_NOPE: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """One program multiplies a block of rows of one head by BLOCK_RANK columns of W_UK.

    It calls `begin_alone`: when the next kernel begins, all kernels before this one have ended.
    """
    head = tl.program_id(1)
    n, d = tl.arange(0, BLOCK_NOPE), own_range(0, BLOCK_RANK)
    weight = kv_up + (head * (NOPE + VALUE) + n)[:, None] * RANK + d[None, :]
    w = load(weight, (n < NOPE)[:, None])
    begin_alone()
    row = own_range(2, BLOCK_ROWS)
    line = q + row.to(tl.int64) * q_token + head * q_head
    inside = (row < rows)[:, None]
    x = load(line[:, None] + n[None, :], inside & (n < NOPE)[None, :])
    y = tl.dot(x, w, input_precision="ieee")
    place = (row * HEADS + head)[:, None] * RANK + d[None, :]
    store_rounded(out + place, y, inside)


@triton.jit
def _places(table, chosen, at, end, PAGE: tl.constexpr, SPARSE: tl.constexpr):
    """Where the cache holds tokens `at` of a row. Tokens from `end` on are replaced by the last
    one before it, so that what is read is finite.
    """
    at = tl.minimum(at, end - 1)
    if SPARSE:
        at = tl.load(chosen + at)
    return (tl.load(table + at // PAGE) * PAGE + at % PAGE).to(tl.int32)


@triton.jit
def _tile(cache, place, d, WIDTH: tl.constexpr):
    """Channels d of the cache's tokens: [tokens, channels]."""
    return tl.load((cache + place.to(tl.int64) * WIDTH)[:, None] + d[None, :])


@triton.jit
def _attend_part(
    q, x_rope, table, cache, chosen, first, end, scale,
    HEADS: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, PAGE: tl.constexpr,
    BLOCK: tl.constexpr, SPARSE: tl.constexpr, PIPELINED: tl.constexpr,
):  # fmt: skip
    """Softmax-weighted mean of latents first .. end - 1, [RANK, HEADS], and the logarithms of the
    sums of weights, to base 2. q: pointers, [1, HEADS], to absorbed queries; x_rope: [ROPE, HEADS].

    SPARSE: of these entries of the list `chosen`. While one tile is computed, the next one is on
    its way: PIPELINED: by the compiler's asynchronous copies, for which shared memory has room only
    without the rotated keys; else in registers, together with a conversion of the dtype.
    """
    WIDTH: tl.constexpr = RANK + ROPE
    d, r, t = tl.arange(0, RANK), RANK + tl.arange(0, ROPE), tl.arange(0, BLOCK)
    peak = tl.full((HEADS,), -float("inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((RANK, HEADS), tl.float32)
    place = _places(table, chosen, first + t, end, PAGE, SPARSE)
    key = from_float8(_tile(cache, place, r, WIDTH), x_rope.dtype)
    if not PIPELINED:
        held = from_float8(_tile(cache, place, d, WIDTH), x_rope.dtype)
    ahead = _places(table, chosen, first + BLOCK + t, end, PAGE, SPARSE)
    begin_alone()
    x = tl.load(q + d[:, None])
    for start in range(first, end, BLOCK):
        this_key = key
        if PIPELINED:
            latent = _tile(cache, place, d, WIDTH)
            place = _places(table, chosen, start + BLOCK + t, end, PAGE, SPARSE)
        else:
            latent = held
            raw = _tile(cache, ahead, d, WIDTH)
        raw_key = _tile(cache, ahead, r, WIDTH)
        ahead = _places(table, chosen, start + 2 * BLOCK + t, end, PAGE, SPARSE)
        score = tl.dot(latent, x, input_precision="ieee")
        score = tl.dot(this_key, x_rope, score, input_precision="ieee") * scale
        score = tl.where((start + t < end)[:, None], score, -float("inf"))
        top = tl.maximum(peak, tl.max(score, 0))
        weight = tl.exp2(score - top[None, :])
        decay = tl.exp2(peak - top)
        total = total * decay + tl.sum(weight, 0)
        weight = weight.to(x.dtype)
        acc = tl.dot(tl.trans(latent), weight, acc * decay[None, :], input_precision="ieee")
        peak = top
        key = from_float8(raw_key, x.dtype)
        if not PIPELINED:
            held = from_float8(raw, x.dtype)
    return acc / total[None, :], peak + tl.log2(total)


@triton.jit(do_not_specialize=["capacity"])
def _attend_latent(
    q, q_rope, cache, page_table, items, chosen, parts, logs, capacity, width, scale,
    rope_token, rope_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_GROUP: tl.constexpr, RANK: tl.constexpr,
    ROPE: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr,
    PIPELINED: tl.constexpr,
):  # fmt: skip
    """One program computes one part of one row for GROUP of the HEADS heads.

    TOP_K: entries of a row in `chosen`; 0: rows attend to their contexts. It runs after `_absorb`,
    so that its prologue may read everything but absorbed queries, the cache too.
    """
    block, item = tl.program_id(0), tl.program_id(1)
    its = items + item
    row = tl.load(its)
    if row >= 0:
        first, end = tl.load(its + 3 * capacity), tl.load(its + 4 * capacity)
        number, d, r = tl.arange(0, BLOCK_GROUP), tl.arange(0, RANK), tl.arange(0, ROPE)
        head = block * GROUP + tl.minimum(number, GROUP - 1)
        place = row.to(tl.int64) * rope_token + head * rope_head
        x_rope = tl.load(q_rope + place[None, :] + r[:, None])
        mean, log = _attend_part(
            q + ((row.to(tl.int64) * HEADS + head) * RANK)[None, :], x_rope,
            page_table + tl.load(its + 5 * capacity).to(tl.int64) * width, cache,
            chosen + row.to(tl.int64) * TOP_K, first, end, scale,
            BLOCK_GROUP, RANK, ROPE, PAGE, BLOCK, TOP_K > 0, PIPELINED,
        )  # fmt: skip
        at = item * HEADS + head
        mean = mean.to(parts.dtype.element_ty)
        tl.store(parts + at[None, :] * RANK + d[:, None], mean, mask=(number < GROUP)[None, :])
        tl.store(logs + at, log, mask=number < GROUP)
    else:
        begin_alone()


@triton.jit(do_not_specialize=["rows"])
def _project(
    parts, logs, starts, kv_up, out, rows,
    HEADS: tl.constexpr, NOPE: tl.constexpr, VALUE: tl.constexpr, RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_VALUE channels of one head's results, for a block of rows.

    The parts of rows stand one after another. A part is multiplied by W_UV before it is added to
    its row, so that one load has the parts of many rows, or many parts of a row. The prologue may
    read `starts`, because `_attend_latent`, which runs before, does not write them.
    """
    head, first = tl.program_id(1), tl.program_id(2) * BLOCK_ROWS
    v, d = own_range(0, BLOCK_VALUE), tl.arange(0, RANK)
    weight = kv_up + (head * (NOPE + VALUE) + NOPE + v)[None, :] * RANK + d[:, None]
    w = load(weight, (v < VALUE)[None, :])
    row = first + tl.arange(0, BLOCK_ROWS)
    begins = tl.load(starts + tl.minimum(row, rows))
    ends = tl.load(starts + tl.minimum(row + 1, rows))
    at_first, last = tl.load(starts + first), tl.load(starts + tl.minimum(first + BLOCK_ROWS, rows))
    begin()
    top = tl.full((BLOCK_ROWS,), -1e30, tl.float32)  # finite: a block may have no part of a row
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    acc = tl.zeros((BLOCK_ROWS, BLOCK_VALUE), tl.float32)
    for at in range(at_first, last, BLOCK_PARTS):
        item = at + tl.arange(0, BLOCK_PARTS)
        log = load(logs + item * HEADS + head, item < last)
        place = (item * HEADS + head)[:, None] * RANK + d[None, :]
        x = load(parts + place, (item < last)[:, None])
        y = tl.dot(x, w, input_precision="ieee")
        # 0 times a number that is not finite is NaN: such parts make only their own row NaN.
        broken = tl.sum(y * 0.0, 1)
        y = tl.where(broken[:, None] == 0.0, y, 0.0)
        log += broken
        own = (item[None, :] >= begins[:, None]) & (item[None, :] < ends[:, None])
        log = tl.where(own, log[None, :], -float("inf"))
        higher = tl.maximum(top, tl.max(log, 1))
        factor, decay = tl.exp2(log - higher[:, None]), tl.exp2(top - higher)
        total = total * decay + tl.sum(factor, 1)
        acc = tl.dot(factor, y, acc * decay[:, None], input_precision="tf32x3")
        top = higher
    place = (row * HEADS + head)[:, None] * VALUE + v[None, :]
    inside = (row < rows)[:, None] & (v < VALUE)[None, :]
    store_rounded(out + place, acc / total[:, None], inside)


def head_blocks(heads: int) -> int:
    """The number of programs among which `heads` are divided evenly."""
    return next(n for n in range(1, heads + 1) if heads % n == 0 and heads // n <= _HEADS)


def split_latents(page_table: Tensor, slots: Tensor, lens: Tensor, heads: int) -> KvSplits:
    """split_kv for attend_latent: parts for all multiprocessors, even if rows are few. One of its
    programs takes up a multiprocessor.
    """
    extra = max(1, EXTRA_PARTS // head_blocks(heads))
    return split_kv(page_table, slots, lens, 0, None, extra=extra, least=_BLOCK)


def attend_latent(
    q: Tensor,
    kv_up: Tensor,
    cache: Tensor,
    splits: KvSplits,
    scale: float,
    out: Tensor,
    chosen: Tensor | None = None,
) -> None:
    """As Ops.attend_latent, in the absorbed form, for rows of one token: out [rows, heads,
    value_dim], contiguous, receives the result.

    `splits`: from split_latents. `chosen`: [rows, top_k] int32, positions of the tokens that a row
    attends to; then the lengths in `splits` are those of these lists.
    """
    rows, heads, value_dim = out.shape
    assert rows == len(splits.lens)
    if not rows:
        return
    rank = kv_up.shape[2]
    nope_dim = kv_up.shape[1] - value_dim
    absorbed = q.new_empty(rows, heads, rank)
    few = rows <= _FEW
    block_rows = 16 if few else 64
    block = min(64, rank)
    sizes = {"HEADS": heads, "NOPE": nope_dim, "VALUE": value_dim, "RANK": rank}
    _absorb[(rank // block, heads, cdiv(rows, block_rows))](
        q, kv_up, absorbed, rows, q.stride(0), q.stride(1), **sizes,
        BLOCK_ROWS=block_rows, BLOCK_NOPE=max(16, next_power_of_2(nope_dim)),
        BLOCK_RANK=block, num_warps=4, **overlapping(),
    )  # fmt: skip
    parts, logs = _attended(absorbed, q[..., nope_dim:], cache, splits, scale, chosen)
    block = min(32 if few else 64, max(16, next_power_of_2(value_dim)))
    block_rows = 16 if rows <= _MANY else 32
    _project[(cdiv(value_dim, block), heads, cdiv(rows, block_rows))](
        parts, logs, splits.starts, kv_up, out, rows, **sizes, BLOCK_ROWS=block_rows,
        BLOCK_PARTS=32, BLOCK_VALUE=block, num_warps=4,
        num_stages=2, **overlapping(),
    )  # fmt: skip


def _attended(
    q: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    splits: KvSplits,
    scale: float,
    chosen: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """For each part of a row: softmax(scale * [q, q_rope] [latent, key]') latent, [parts, heads,
    rank], and the logarithms of its sums, [parts, heads] float32, to base 2.
    """
    _, heads, rank = q.shape
    blocks, capacity = head_blocks(heads), splits.items.shape[1]
    group = heads // blocks
    parts = q.new_empty(capacity, heads, rank)
    logs = q.new_empty(capacity, heads, dtype=torch.float32)
    pipelined = group <= _PIPELINED_HEADS and cache.dtype == q.dtype and q.dtype in HALF
    warps, stages = _PIPELINED if pipelined else _IN_REGISTERS
    _attend_latent[(blocks, capacity)](
        q, q_rope, cache, splits.page_table, splits.items,
        splits.items if chosen is None else chosen, parts, logs, capacity,
        splits.page_table.shape[1], scale * _LOG2_E, q_rope.stride(0), q_rope.stride(1),
        HEADS=heads, GROUP=group, BLOCK_GROUP=max(16, next_power_of_2(group)), RANK=rank,
        ROPE=q_rope.shape[2], PAGE=cache.shape[2], BLOCK=_BLOCK,
        TOP_K=0 if chosen is None else chosen.shape[1], PIPELINED=pipelined,
        num_warps=warps, num_stages=stages, **overlapping(),
    )  # fmt: skip
    return parts, logs
