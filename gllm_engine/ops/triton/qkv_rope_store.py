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
from gllm_engine.ops.triton.memory import load, load_wide, own_range, program, stored
from gllm_engine.ops.triton.pdl import begin_alone, overlapping

# Heads and warps of one program.
_HEADS, _WARPS = 8, 2


@triton.jit
def _pairs(at, TURN: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Of channels `at`: the other channel and the number of the pair, whether it is the second of
    the pair, and whether it is rotated.
    """
    half: tl.constexpr = TURN // 2
    if INTERLEAVED:
        partner, pair, second = at ^ 1, at // 2, at % 2 == 1
    else:
        second = at >= half
        partner, pair = tl.where(second, at - half, at + half), tl.where(second, at - half, at)
    turned = at < TURN
    return tl.where(turned, partner, at), tl.where(turned, pair, 0), second, turned


@triton.jit
def _factor(gain, mask, PLUS_ONE: tl.constexpr):
    """The norm's factors, from pointers to its gain."""
    factor = load_wide(gain, mask)
    if PLUS_ONE:
        factor += 1.0
    return factor


@triton.jit
def _rotate_and_store(
    qkv, norm, means, cos, sin, positions, query_scale, cache_index, q, kept, cache, eps,
    qkv_stride,
    HEADS: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr, TURN: tl.constexpr,
    PAGE: tl.constexpr, AFTER: tl.constexpr, PLUS_ONE: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    token = program(0)
    head = own_range(1, BLOCK_HEADS)[:, None]
    at = tl.arange(0, BLOCK_DIM)[None, :]
    partner, pair, second, turned = _pairs(at, TURN, INTERLEAVED)
    begin_alone()
    inside = (head < HEADS + 2 * KV) & (at < DIM)
    row = qkv + token * qkv_stride + head * DIM
    raw = load(row + at, inside)
    x = raw.to(tl.float32)
    y = x
    if TURN:
        y = load_wide(row + partner, inside)
    gains = inside & (head < HEADS + KV)
    if norm is not None and not AFTER:
        if means is not None:
            mean = tl.load(means + token * 2 + tl.where(head < HEADS, 0, 1))
        else:
            mean = tl.sum(x * x, 1)[:, None] / DIM
        scale = tl.rsqrt(mean + eps)
        x = x * scale * _factor(norm + head * DIM + at, gains, PLUS_ONE)
        if TURN:
            y = y * scale * _factor(norm + head * DIM + partner, gains, PLUS_ONE)
    if TURN:
        angle = tl.load(positions + token) * (TURN // 2) + pair
        c, s = tl.load(cos + angle), tl.load(sin + angle)
        x = tl.where(turned, x * c + y * tl.where(second, s, -s), x)
    if norm is not None and AFTER:
        scale = tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)[:, None]
        x = x * scale * _factor(norm + head * DIM + at, gains, PLUS_ONE)
    if query_scale is not None:
        x = tl.where(head < HEADS, x * tl.load(query_scale + token), x)
    result = tl.where(head < HEADS + KV, x.to(raw.dtype), raw)

    tl.store(q + (token * HEADS + head) * DIM + at, result, mask=inside & (head < HEADS))
    if KV:
        place = tl.load(cache_index + token)
        is_v = head >= HEADS + KV
        line = (place // PAGE * 2 + tl.where(is_v, 1, 0)) * PAGE + place % PAGE
        kv_head = head - HEADS - tl.where(is_v, KV, 0)
        is_kv = inside & (head >= HEADS)
        if kept is not None:
            number: tl.constexpr = kept.dtype.element_ty
            FIRST: tl.constexpr = 0 if number == tl.float8e4nv else HEADS
            there = kept + (token * (HEADS + 2 * KV - FIRST) + head - FIRST) * DIM + at
            tl.store(there, stored(result, number), mask=inside & (head >= FIRST))
        result = stored(result, cache.dtype.element_ty)
        tl.store(cache + (line * KV + kv_head) * DIM + at, result, mask=is_kv)


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
    _rotate_and_store[(tokens, cdiv(total, _HEADS))](
        qkv, gain, means, cos, sin, positions, query_scale, cache_index, q, kept, cache, eps,
        qkv.stride(0),
        HEADS=num_heads, KV=(total - num_heads) // 2, DIM=dim,
        TURN=0 if cos is None else 2 * cos.shape[1], PAGE=0 if cache is None else cache.shape[2],
        AFTER=after, PLUS_ONE=plus_one, INTERLEAVED=interleaved,
        BLOCK_HEADS=min(_HEADS, next_power_of_2(total)),
        BLOCK_DIM=next_power_of_2(dim), num_warps=_WARPS, **overlapping(),
    )  # fmt: skip
    return q
