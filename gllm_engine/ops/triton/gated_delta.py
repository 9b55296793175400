"""The gated delta rule: the convolution before it, and its recurrence over each row's tokens.

A row is a sequence: one token of a decode row, or the tokens of a prefill chunk. Both kernels go
through a row's tokens one after another, with the sequence's state in registers, and write the
state back at the end. So one token takes one pass over the state, which is the least that a decode
step must read; a long chunk takes a time in proportion to its length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gllm_engine.ops.protocol import RecurrentState

# Channels of a program of the convolution, and columns of the state of one of the recurrence.
_CHANNELS = 256
_COLUMNS = 32


@triton.jit(do_not_specialize_on_alignment=["slots", "starts"])
def _convolve(
    x, weight, state, slots, starts, out, width, x_stride, state_stride,
    TAPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """silu of the causal convolution of each channel, over the last inputs and the row's tokens."""
    row = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < width
    past = state + tl.load(slots + row) * state_stride + channel * (TAPS - 1)
    # One tensor per tap: the inputs before the current one, oldest first.
    first = tl.load(past, mask=inside, other=0.0).to(tl.float32)
    second = first
    third = first
    if TAPS > 2:
        second = tl.load(past + 1, mask=inside, other=0.0).to(tl.float32)
    if TAPS > 3:
        third = tl.load(past + 2, mask=inside, other=0.0).to(tl.float32)
    w = weight + channel * TAPS
    w0 = tl.load(w, mask=inside, other=0.0).to(tl.float32)
    w1 = tl.load(w + 1, mask=inside, other=0.0).to(tl.float32)
    w2 = w1
    w3 = w1
    if TAPS > 2:
        w2 = tl.load(w + 2, mask=inside, other=0.0).to(tl.float32)
    if TAPS > 3:
        w3 = tl.load(w + 3, mask=inside, other=0.0).to(tl.float32)
    begin = tl.load(starts + row).to(tl.int64)
    source = x + begin * x_stride + channel
    target = out + begin * width + channel
    for _ in range(begin, tl.load(starts + row + 1).to(tl.int64)):
        new = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        if TAPS == 2:
            y = w0 * first + w1 * new
            first = new
        elif TAPS == 3:
            y = w0 * first + w1 * second + w2 * new
            first = second
            second = new
        else:
            y = w0 * first + w1 * second + w2 * third + w3 * new
            first = second
            second = third
            third = new
        y = y / (1.0 + tl.exp(-y))
        tl.store(target, y, mask=inside)
        source += x_stride
        target += width
    tl.store(past, first.to(state.dtype.element_ty), mask=inside)
    if TAPS > 2:
        tl.store(past + 1, second.to(state.dtype.element_ty), mask=inside)
    if TAPS > 3:
        tl.store(past + 2, third.to(state.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["slots", "starts"])
def _recur(
    mixed, b, a, a_log, dt_bias, state, slots, starts, out, b_stride, a_stride, state_stride,
    KEYS: tl.constexpr, VALUES: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program computes COLUMNS columns of the state of one value head of one row."""
    row, head = tl.program_id(0), tl.program_id(1)
    k, v = tl.arange(0, BLOCK_K), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside_k, inside_v = k < K, v < V
    inside = inside_k[:, None] & inside_v[None, :]
    place = state + tl.load(slots + row) * state_stride + head * (K * V)
    place = place + k[:, None] * V + v[None, :]
    matrix = tl.load(place, mask=inside, other=0.0)
    rate = -tl.exp(tl.load(a_log + head).to(tl.float32))
    bias = tl.load(dt_bias + head).to(tl.float32)
    width: tl.constexpr = 2 * KEYS * K + VALUES * V
    key_head = head // (VALUES // KEYS)
    begin = tl.load(starts + row).to(tl.int64)
    line = mixed + begin * width
    a += begin * a_stride + head
    b += begin * b_stride + head
    target = out + (begin * VALUES + head) * V + v
    for _ in range(begin, tl.load(starts + row + 1).to(tl.int64)):
        query = tl.load(line + key_head * K + k, mask=inside_k, other=0.0)
        key = tl.load(line + (KEYS + key_head) * K + k, mask=inside_k, other=0.0)
        value = tl.load(line + 2 * KEYS * K + head * V + v, mask=inside_v, other=0.0)
        query = query * tl.rsqrt(tl.sum(query * query, 0) + 1e-6)
        key = key * tl.rsqrt(tl.sum(key * key, 0) + 1e-6)
        step = tl.load(a).to(tl.float32) + bias
        step = tl.where(step > 20.0, step, tl.log(1.0 + tl.exp(tl.minimum(step, 20.0))))
        write = tl.load(b).to(tl.float32)
        write = 1.0 / (1.0 + tl.exp(-write))
        matrix = matrix * tl.exp(rate * step)
        error = (value - tl.sum(matrix * key[:, None], 0)) * write
        matrix = matrix + key[:, None] * error[None, :]
        found = tl.sum(matrix * query[:, None], 0) * (K**-0.5)
        tl.store(target, found.to(out.dtype.element_ty), mask=inside_v)
        line += width
        a += a_stride
        b += b_stride
        target += VALUES * V
    tl.store(place, matrix, mask=inside)


def gated_delta(
    qkv: Tensor,
    b: Tensor,
    a: Tensor,
    conv: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    state: RecurrentState,
    slots: Tensor,
    starts: Tensor,
) -> Tensor:
    """As Ops.gated_delta, but `slots` [rows] and `starts` [rows + 1], the offsets of the rows'
    tokens, replace the plan. The convolution has 2 to 4 taps.
    """
    _, v_heads, k_dim, v_dim = state.matrix.shape
    tokens, width = qkv.shape
    taps = conv.shape[1]
    k_heads = (width - v_heads * v_dim) // (2 * k_dim)
    rows = len(slots)
    mixed = torch.empty(tokens, width, dtype=torch.float32, device=qkv.device)
    _convolve[(rows, triton.cdiv(width, _CHANNELS))](
        qkv, conv, state.conv, slots, starts, mixed, width, qkv.stride(0), state.conv.stride(0),
        TAPS=taps, BLOCK=_CHANNELS,
    )  # fmt: skip
    out = qkv.new_empty(tokens, v_heads, v_dim)
    columns = min(_COLUMNS, triton.next_power_of_2(v_dim))
    _recur[(rows, v_heads, triton.cdiv(v_dim, columns))](
        mixed, b, a, a_log, dt_bias, state.matrix, slots, starts, out, b.stride(0), a.stride(0),
        state.matrix.stride(0),
        KEYS=k_heads, VALUES=v_heads, K=k_dim, V=v_dim, BLOCK_K=triton.next_power_of_2(k_dim),
        COLUMNS=columns, num_warps=2,
    )  # fmt: skip
    return out


@triton.jit
def _gated_norm(
    x, gain, gate, out, gate_token, dim, eps, HEADS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    inside = at < dim
    line = (token * HEADS + head) * dim + at
    raw = tl.load(x + line, mask=inside, other=0.0)
    wide = raw.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / dim + eps)
    normed = (wide * scale).to(raw.dtype).to(tl.float32)
    normed = (normed * tl.load(gain + at, mask=inside, other=0.0).to(tl.float32)).to(raw.dtype)
    z = tl.load(gate + token * gate_token + head * dim + at, mask=inside, other=0.0).to(tl.float32)
    result = normed.to(tl.float32) * z / (1.0 + tl.exp(-z))
    tl.store(out + line, result.to(raw.dtype), mask=inside)


def gated_norm(x: Tensor, gain: Tensor, eps: float, gate: Tensor) -> Tensor:
    """See Ops.gated_norm. `gate` may have any stride from token to token."""
    tokens, heads, dim = x.shape
    out = torch.empty_like(x)
    _gated_norm[(tokens, heads)](
        x, gain, gate, out, gate.stride(0), dim, eps, HEADS=heads,
        BLOCK=triton.next_power_of_2(dim), num_warps=1,
    )  # fmt: skip
    return out
