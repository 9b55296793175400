"""Multi-head latent attention: norm, rotation and the cache's latents, and attention over them.

Knows the cache layout, [num_pages, 1, page_size, 1, rank + rope_dim]: a latent, then the rotated
key. `attend_latent` computes the absorbed form, whose keys and values are the latents themselves:
all heads attend to the same latents, so a program computes a block of heads, and reads each latent
once for the scores and for the result. Rows are split into parts, and parts are joined, as in
decode_attention.py. Each token of a prefill chunk is a row, whose context ends at the token. A row
may have a list of the tokens that it attends to, in place of its context.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gllm_engine.ops.triton.decode_attention import KvSplits, _join
from gllm_engine.ops.triton.pdl import OVERLAP, begin_alone, overlapping

# Most heads of a program.
_HEADS = 64
# Tokens of the cache in one iteration. Two tiles of 32 x 576 are in shared memory at once.
_BLOCK = 32
_STAGES = 2
_JOINED = 2048
_LOG2_E = 1.4426950408889634


@triton.jit
def _stored(x, FLOAT8: tl.constexpr):
    """x as a cache of float8 takes it: float8_e4m3fn has no infinity, and 448 is its largest."""
    if FLOAT8:
        x = tl.clamp(x.to(tl.float32), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def _store_latent(
    q, latent, gain, cos, sin, positions, cache_index, cache, eps, q_stride, latent_stride,
    HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, RANK: tl.constexpr,
    INTERLEAVED: tl.constexpr, FLOAT8: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK_RANK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One program per token: the queries' rotation, the latent's norm, the key's rotation.

    A thread that writes a pair of channels has read that pair, so that the queries are rotated in
    place.
    """
    token = tl.program_id(0).to(tl.int64)
    half: tl.constexpr = ROPE // 2
    pair = tl.arange(0, half)
    if INTERLEAVED:
        a_at, b_at = 2 * pair, 2 * pair + 1
    else:
        a_at, b_at = pair, half + pair
    begin_alone(OVERLAPS)
    angle = tl.load(positions + token) * half + pair
    c, s = tl.load(cos + angle), tl.load(sin + angle)
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    wanted = head < HEADS
    row = q + token * q_stride + head * (NOPE + ROPE) + NOPE
    a = tl.load(row + a_at[None, :], mask=wanted, other=0.0).to(tl.float32)
    b = tl.load(row + b_at[None, :], mask=wanted, other=0.0).to(tl.float32)
    number = q.dtype.element_ty
    tl.store(row + a_at[None, :], (a * c[None, :] - b * s[None, :]).to(number), mask=wanted)
    tl.store(row + b_at[None, :], (b * c[None, :] + a * s[None, :]).to(number), mask=wanted)

    source = latent + token * latent_stride
    line = cache + tl.load(cache_index + token) * (RANK + ROPE)
    stored = cache.dtype.element_ty
    d = tl.arange(0, BLOCK_RANK)
    wide = tl.load(source + d, mask=d < RANK, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / RANK + eps)
    normed = (wide * scale).to(number).to(tl.float32)
    normed = normed * tl.load(gain + d, mask=d < RANK, other=0.0).to(tl.float32)
    tl.store(line + d, _stored(normed.to(number), FLOAT8).to(stored), mask=d < RANK)
    a = tl.load(source + RANK + a_at).to(tl.float32)
    b = tl.load(source + RANK + b_at).to(tl.float32)
    tl.store(line + RANK + a_at, _stored((a * c - b * s).to(number), FLOAT8).to(stored))
    tl.store(line + RANK + b_at, _stored((b * c + a * s).to(number), FLOAT8).to(stored))


def store_latent(
    q: Tensor,
    latent: Tensor,
    norm: tuple[Tensor, float],
    tables: tuple[Tensor, Tensor],
    positions: Tensor,
    interleaved: bool,
    cache: Tensor,
    cache_index: Tensor,
) -> None:
    """As Ops.store_latent, but `tables` (cos, sin: [max_model_len, rope_dim / 2] float32),
    `positions` [tokens] and `cache_index` [tokens] replace rotary and plan. The last two dimensions
    of q and the last one of latent are contiguous.
    """
    tokens, heads, key_dim = q.shape
    gain, eps = norm
    rank = len(gain)
    rope_dim = latent.shape[1] - rank
    _store_latent[(tokens,)](
        q, latent, gain, *tables, positions, cache_index, cache, eps, q.stride(0),
        latent.stride(0),
        HEADS=heads, NOPE=key_dim - rope_dim, ROPE=rope_dim, RANK=rank, INTERLEAVED=interleaved,
        FLOAT8=cache.dtype == torch.float8_e4m3fn, BLOCK_HEADS=triton.next_power_of_2(heads),
        BLOCK_RANK=triton.next_power_of_2(rank), OVERLAPS=OVERLAP, **overlapping(),
    )  # fmt: skip


@triton.jit
def _gather_latents(
    cache, places, latents, k,
    HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, RANK: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_RANK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One program copies a latent, and its rotated key to all heads."""
    at = tl.program_id(0).to(tl.int64)
    begin_alone(OVERLAPS)
    line = cache + tl.load(places + at) * (RANK + ROPE)
    number = k.dtype.element_ty
    d, r = tl.arange(0, BLOCK_RANK), tl.arange(0, ROPE)
    latent = tl.load(line + d, mask=d < RANK, other=0.0)
    tl.store(latents + at * RANK + d, latent.to(number), mask=d < RANK)
    key = tl.load(line + RANK + r).to(number)
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
        BLOCK_HEADS=triton.next_power_of_2(heads), BLOCK_RANK=triton.next_power_of_2(rank),
        OVERLAPS=OVERLAP, **overlapping(),
    )  # fmt: skip


@triton.jit
def _attend_part(
    x, x_rope, table, cache, chosen, first, end, scale,
    HEADS: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, PAGE: tl.constexpr,
    BLOCK: tl.constexpr, SPARSE: tl.constexpr,
):  # fmt: skip
    """Unnormalised softmax-weighted latents of tokens first .. end - 1, as in decode_attention.

    SPARSE: of these entries of the list `chosen`.
    """
    d, r = tl.arange(0, RANK), tl.arange(0, ROPE)
    peak = tl.full((HEADS,), -float("inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, RANK), tl.float32)
    for start in range(first, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        if SPARSE:
            at = tl.load(chosen + at, mask=inside, other=0)
        page = tl.load(table + at // PAGE, mask=inside, other=0)
        line = cache + (page * PAGE + at % PAGE) * (RANK + ROPE)
        latent = tl.load(line[:, None] + d[None, :], mask=inside[:, None], other=0.0).to(x.dtype)
        key = tl.load(line[:, None] + RANK + r[None, :], mask=inside[:, None], other=0.0)
        score = tl.dot(x, tl.trans(latent), input_precision="ieee")
        score = tl.dot(x_rope, tl.trans(key.to(x.dtype)), score, input_precision="ieee") * scale
        score = tl.where(inside[None, :], score, -float("inf"))
        top = tl.maximum(peak, tl.max(score, 1))
        weight = tl.exp2(score - top[:, None])
        decay = tl.exp2(peak - top)
        total = total * decay + tl.sum(weight, 1)
        acc = acc * decay[:, None] + tl.dot(weight.to(x.dtype), latent, input_precision="ieee")
        peak = top
    return acc, peak, total


@triton.jit(do_not_specialize=["capacity"])
def _attend_latent(
    q, q_rope, cache, page_table, slots, lens, items, arrived, share_in, chosen, out, parts, peaks,
    sums, capacity, width, scale, q_token, q_head, rope_token, rope_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_GROUP: tl.constexpr, RANK: tl.constexpr,
    ROPE: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, JOINED: tl.constexpr,
    TOP_K: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One program computes one part of one row for GROUP of the HEADS heads.

    TOP_K: entries of a row in `chosen`; 0: rows attend to their contexts.
    """
    item, block = tl.program_id(0), tl.program_id(1)
    blocks: tl.constexpr = HEADS // GROUP
    begin_alone(OVERLAPS)
    row = tl.load(items + item)
    if row >= 0:
        part, used = tl.load(items + capacity + item), tl.load(items + 2 * capacity + item)
        length, share = tl.load(lens + row).to(tl.int32), tl.load(share_in)
        table = page_table + tl.load(slots + row) * width
        first = part * share
        number, d, r = tl.arange(0, BLOCK_GROUP), tl.arange(0, RANK), tl.arange(0, ROPE)
        head = block * GROUP + number
        wanted = (number < GROUP)[:, None]
        place = row.to(tl.int64) * q_token + head * q_head
        x = tl.load(q + place[:, None] + d[None, :], mask=wanted, other=0.0)
        place = row.to(tl.int64) * rope_token + head * rope_head
        x_rope = tl.load(q_rope + place[:, None] + r[None, :], mask=wanted, other=0.0)
        line = row.to(tl.int64) * HEADS + head
        acc, peak, total = _attend_part(
            x, x_rope, table, cache, chosen + row.to(tl.int64) * TOP_K, first,
            tl.minimum(first + share, length), scale,
            BLOCK_GROUP, RANK, ROPE, PAGE, BLOCK, TOP_K > 0,
        )  # fmt: skip
        if used == 1:
            result = (acc / total[:, None]).to(out.dtype.element_ty)
            tl.store(out + line[:, None] * RANK + d[None, :], result, mask=wanted)
        else:
            at = item * HEADS + head
            tl.store(parts + at[:, None] * RANK + d[None, :], acc, mask=wanted)
            tl.store(peaks + at, peak, mask=number < GROUP)
            tl.store(sums + at, total, mask=number < GROUP)
            tl.debug_barrier()  # all threads have stored their partial before the arrival
            before = tl.atomic_add(arrived + row * blocks + block, 1, sem="acq_rel")
            tl.debug_barrier()
            if before == used - 1:
                tl.store(arrived + row * blocks + block, 0)
                _join(
                    parts, peaks, sums, out + (row.to(tl.int64) * HEADS + block * GROUP) * RANK,
                    item - part, block * GROUP, used,
                    GROUP, RANK, HEADS, JOINED, BLOCK_GROUP, RANK,
                )  # fmt: skip


def head_blocks(heads: int) -> int:
    """The number of programs among which `heads` are divided evenly."""
    return next(n for n in range(1, heads + 1) if heads % n == 0 and heads // n <= _HEADS)


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
    value_dim] receives the result.

    `splits`: from split_kv, for as many K/V heads as head_blocks() says. `chosen`: [rows, top_k]
    int32, positions of the tokens that a row attends to; then the lengths in `splits` are those of
    these lists.
    """
    nope_dim = kv_up.shape[1] - out.shape[2]
    w_uk, w_uv = kv_up.split((nope_dim, out.shape[2]), 1)
    absorbed = torch.bmm(q[..., :nope_dim].transpose(0, 1), w_uk).transpose(0, 1)
    attended = _attended(absorbed, q[..., nope_dim:], cache, splits, scale, chosen)
    torch.bmm(attended.transpose(0, 1), w_uv.transpose(1, 2), out=out.transpose(0, 1))


def _attended(
    q: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    splits: KvSplits,
    scale: float,
    chosen: Tensor | None,
) -> Tensor:
    """softmax(scale * [q, q_rope] [latent, key]') latent: [rows, heads, rank]."""
    rows, heads, rank = q.shape
    page_size = cache.shape[2]
    blocks, capacity = head_blocks(heads), splits.items.shape[1]
    group = heads // blocks
    out = q.new_empty(rows, heads, rank)
    parts = out.new_empty(capacity, heads, rank, dtype=torch.float32)
    peaks, sums = parts.new_empty(2, capacity, heads)
    block_group = max(16, triton.next_power_of_2(group))
    _attend_latent[(capacity, blocks)](
        q, q_rope, cache, splits.page_table, splits.slots, splits.lens, splits.items,
        splits.arrived, splits.share, splits.items if chosen is None else chosen, out, parts, peaks,
        sums, capacity, splits.page_table.shape[1], scale * _LOG2_E, q.stride(0), q.stride(1),
        q_rope.stride(0), q_rope.stride(1),
        HEADS=heads, GROUP=group, BLOCK_GROUP=block_group, RANK=rank, ROPE=q_rope.shape[2],
        PAGE=page_size,
        BLOCK=_BLOCK, JOINED=max(1, _JOINED // (block_group * rank)),
        TOP_K=0 if chosen is None else chosen.shape[1], OVERLAPS=OVERLAP,
        num_warps=4 if block_group < 64 else 8, num_stages=_STAGES, **overlapping(),
    )  # fmt: skip
    return out
