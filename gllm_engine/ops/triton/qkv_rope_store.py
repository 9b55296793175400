"""Turns the QKV product into attention's inputs in one pass: norm, rotation, K and V to the cache.

Knows the cache layout, [num_pages, 2, page_size, kv_heads, head_dim].
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gllm_engine.ops.kernels import on_hopper, rounds_chunks
from gllm_engine.ops.protocol import (
    AttentionInputs,
    AttentionPlan,
    HeadNorm,
    PagedPlan,
    RotaryInputs,
)
from gllm_engine.ops.triton.launch_sizes import cdiv, next_power_of_2
from gllm_engine.ops.triton.memory import load, program, stored
from gllm_engine.ops.triton.pdl import begin_alone, overlapping

# Heads of one program, and channels of a warp.
_HEADS = 8
_WARP_CHANNELS = 128
# Numbers that a thread loads or stores at once. As many for all of them: else the compiler would
# pass heads from thread to thread, through shared memory.
_AT_ONCE = tl.constexpr(8)


@triton.jit
def _load_pairs(heads, first, second, inside, DIM: tl.constexpr):
    """The first and the second channels of pairs; second: None: those of a pair adjoin, and `first`
    are both. Channels that are not rotated are pairs, too.
    """
    x = load(heads + first, inside & (first < DIM))
    if second is None:
        return tl.split(x.reshape(x.shape[0], x.shape[1] // 2, 2))
    else:
        return x, load(heads + second, inside & (second < DIM))


@triton.jit
def _store_pairs(heads, x, y, first, second, inside, DIM: tl.constexpr):
    """See _load_pairs."""
    kind: tl.constexpr = heads.dtype.element_ty
    if second is None:
        x = tl.join(x, y).reshape(x.shape[0], x.shape[1] * 2)
    else:
        tl.store(heads + second, stored(y, kind), mask=inside & (second < DIM))
    tl.store(heads + first, stored(x, kind), mask=inside & (first < DIM))


@triton.jit
def _rotate_and_store(
    qkv, norm, means, cos, sin, positions, query_scale, cache_index, q, kept, cache, eps, stride,
    HEADS: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr, TURN: tl.constexpr,
    PAGE: tl.constexpr, AFTER: tl.constexpr, PLUS_ONE: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = tl.cdiv(HEADS + 2 * KV, BLOCK_HEADS)
    token = program(0) // blocks
    head = (tl.program_id(0) % blocks * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]
    pair = tl.max_contiguous(tl.arange(0, PAIRS), _AT_ONCE)[None, :]
    HALF: tl.constexpr = TURN // 2
    turned = pair < HALF
    if INTERLEAVED:
        first = tl.max_contiguous(tl.arange(0, 2 * PAIRS), _AT_ONCE)[None, :]
        second = None
    else:
        first = pair + tl.where(turned, 0, HALF)
        second = pair + tl.where(turned, HALF, PAIRS)
    is_v = head >= HEADS + KV
    if norm is not None:
        gain_x, gain_y = _load_pairs(norm + head * DIM, first, second, ~is_v, DIM)
    begin_alone()
    # Before the heads, as other loads and the stores wait for these.
    position = tl.load(positions + token) if TURN else 0
    place = tl.load(cache_index + token) if KV else 0
    inside = head < HEADS + 2 * KV
    raw_x, raw_y = _load_pairs(qkv + token * stride + head * DIM, first, second, inside, DIM)
    x = raw_x.to(tl.float32)
    y = raw_y.to(tl.float32)
    if TURN:
        angle = position * HALF + tl.broadcast_to(pair, BLOCK_HEADS, PAIRS)
        c = tl.load(cos + angle, mask=turned, other=1.0)
        s = load(sin + angle, turned)
    if TURN and AFTER:
        x, y = x * c - y * s, y * c + x * s
    if norm is not None:
        if means is None:
            mean = tl.sum(x * x + y * y, 1)[:, None] / DIM
        else:
            mean = tl.load(means + token * 2 + tl.where(head < HEADS, 0, 1))
        scale = tl.rsqrt(mean + eps)
        x = x * scale * (gain_x.to(tl.float32) + PLUS_ONE)
        y = y * scale * (gain_y.to(tl.float32) + PLUS_ONE)
    if TURN and not AFTER:
        x, y = x * c - y * s, y * c + x * s
    if query_scale is not None:
        scale = tl.where(head < HEADS, tl.load(query_scale + token), 1.0)
        x *= scale
        y *= scale
    x = tl.where(is_v, raw_x, x.to(raw_x.dtype))
    y = tl.where(is_v, raw_y, y.to(raw_x.dtype))
    _store_pairs(q + (token * HEADS + head) * DIM, x, y, first, second, head < HEADS, DIM)
    if KV:
        if kept is not None:
            FIRST: tl.constexpr = 0 if kept.dtype.element_ty == tl.float8e4nv else HEADS
            there = kept + (token * (HEADS + 2 * KV - FIRST) + head - FIRST) * DIM
            _store_pairs(there, x, y, first, second, inside & (head >= FIRST), DIM)
        line = (place // PAGE * 2 + is_v) * PAGE + place % PAGE
        there = cache + (line * KV + (head - HEADS) % KV) * DIM
        _store_pairs(there, x, y, first, second, inside & (head >= HEADS), DIM)


def rotate_and_store(
    qkv: Tensor,
    num_heads: int,
    norm: HeadNorm | None,
    rotary: RotaryInputs | None,
    cache: Tensor,
    plan: AttentionPlan,
    query_scale: Tensor | None = None,
) -> AttentionInputs:
    """See Ops.rotate_and_store. cos and sin: [max_model_len, dim / 2] float32. Does not change
    qkv.
    """
    assert isinstance(plan, PagedPlan)
    tokens, total, dim = qkv.shape
    kept: Tensor | None = None
    if plan.keeps and rounds_chunks(on_hopper(qkv.device), qkv.dtype, cache.dtype):
        kept = qkv.new_empty(qkv.shape, dtype=cache.dtype)
    elif plan.keeps:
        kept = qkv.new_empty(tokens, total - num_heads, dim)
    q = _launch(qkv, num_heads, norm, rotary, cache, plan.cache_index, kept, query_scale)
    return AttentionInputs(q, kept)


def rotate(x: Tensor, rotary: RotaryInputs) -> Tensor:
    """See Ops.rotate. Does not change x."""
    return _launch(x, x.shape[1], None, rotary)


def _launch(
    qkv: Tensor,
    num_heads: int,
    norm: HeadNorm | None,
    rotary: RotaryInputs | None,
    cache: Tensor | None = None,
    cache_index: Tensor | None = None,
    kept: Tensor | None = None,
    query_scale: Tensor | None = None,
) -> Tensor:
    """q. `cache` and `cache_index`: None if qkv has no k and v."""
    tokens, total, dim = qkv.shape
    q = qkv.new_empty(tokens, num_heads, dim)
    cos, sin, interleaved, positions = rotary or (None, None, False, None)
    gain, eps, plus_one, after, means = norm or (None, 0.0, False, False, None)
    block = min(_HEADS, next_power_of_2(total))
    pairs = next_power_of_2(cdiv(dim, 2))
    _rotate_and_store[(tokens * cdiv(total, block),)](
        qkv, gain, means, cos, sin, positions, query_scale, cache_index, q, kept, cache, eps,
        qkv.stride(0),
        HEADS=num_heads, KV=(total - num_heads) // 2, DIM=dim,
        TURN=0 if cos is None else 2 * cos.shape[1], PAGE=0 if cache is None else cache.shape[2],
        AFTER=after, PLUS_ONE=plus_one, INTERLEAVED=interleaved,
        BLOCK_HEADS=block, PAIRS=pairs, num_warps=cdiv(2 * pairs, _WARP_CHANNELS), **overlapping(),
    )  # fmt: skip
    return q
