"""The gated delta rule: the convolution before it, and its recurrence over each row's tokens.

A row is a sequence: one token of a decode row, or the tokens of a prefill chunk. Rows of two kinds
have kernels of their own.

Short rows, decode rows among them: `_convolve` and `_recur` go through a row's tokens one after
another, with the sequence's state in registers, and write the state back at the end. So one token
takes one pass over the state, which is the least that a decode step must read.

Long rows, of LONG tokens or more, are cut into blocks of BLOCK tokens. A block's products are
products of matrices, as in Yang, Kautz and Hatamizadeh, "Gated Delta Networks", 2024. For one head
and one block, let k, q and v be the rows of K, Q and V (k of length 1, q of length K ** -0.5), beta
the update rates, and g the sums of the log decays from the block's first token on. Token by token,

    S_i = d_i S_(i-1) + k_i^T n_i    with d_i = exp(g_i - g_(i-1))
    n_i = beta_i (v_i - d_i k_i S_(i-1))
    o_i = q_i S_i

where n_i is what token i adds. With S the state before the block, the first equation unrolls to

    S_i = exp(g_i) S + sum over j <= i of exp(g_i - g_j) k_j^T n_j

In the equation of n_i this makes (I + A) N = diag(beta) (V - diag(exp(g)) K S), with

    A_ij = beta_i (k_i . k_j) exp(g_i - g_j) for j < i, else 0
    T    = (I + A)^-1 diag(beta)
    P_ij = (q_i . k_j) exp(g_i - g_j) for j <= i, else 0

and so, with e the last token of the block,

    N = T (V - diag(exp(g)) K S)
    O = diag(exp(g)) Q S + P N
    S = exp(g_e) S + (diag(exp(g_e - g)) K)^T N

`_solve_blocks` computes T and P of all blocks at once; `_recur_blocks` goes through the blocks of a
row with the other equations. The paper's U = T V and W = T diag(exp(g)) K are not formed: V - K S
is a difference of nearly equal numbers if the state already knows a key, and is taken before any
factor is rounded. Every exponent is a sum of log decays, at most 0, so nothing overflows.

The inverse doubles blocks on the diagonal: from the inverses X and Y of two neighbours, and the
block B of A below X, that of both together has -Y B X below X. Each entry of T, and of every
intermediate product, is beta_i times a product of two unit vectors and of contractions, so none
exceeds 1 and no rounding is amplified; powers of A, in contrast, reach 10 ** 17 for equal keys.

Precision: the convolution's results are rounded to the dtype of the activations, and q and k enter
products before they are divided by their norms, which are factors of the results. So these operands
are exact in bfloat16. Operands in float32 enter products of bfloat16 as the sum of two bfloat16
numbers, which leaves errors of 2 ** -17. One bfloat16 number would not do: with equal keys and
beta near 1, errors of T add up to a tenth of the state. For activations in float32 and float16,
all operands are in float32, and enter three products of TF32, with errors of about 2 ** -21.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from gllm_engine.ops.kernels import BLOCK, FACTORS, LONG
from gllm_engine.ops.protocol import AttentionPlan, RecurrentState
from gllm_engine.ops.triton.launch_sizes import cdiv, next_power_of_2
from gllm_engine.ops.triton.memory import load, load_wide, own_range, program, store_rounded

# Channels of a program of the convolution of short rows, and channels and tokens of one of long
# rows: few, so that many programs share a multiprocessor.
_CHANNELS = 256
_PART_CHANNELS = 64
_PART = 16
# Columns of the state of a program of the recurrence.
_COLUMNS = 32


class RowBlocks(NamedTuple):
    """The blocks of a step's long rows, in the order of rows. Tensors are int32."""

    rows: Tensor  # [blocks] the row of each block
    firsts: Tensor  # [rows] index of each row's first block
    long: Tensor  # [n] the long rows
    has_short: bool  # whether the step has other rows, too


@dataclass
class RowPlan(AttentionPlan):
    """The rows of a batch, for layers that keep a state per sequence."""

    slots: Tensor  # [rows]
    starts: Tensor  # [rows + 1] int32 offsets of the rows' tokens
    blocks: RowBlocks | None  # of the long rows; None: no row is long


def plan_rows(query_lens: Sequence[int], device: torch.device) -> tuple[Tensor, RowBlocks | None]:
    """The `starts` and `blocks` of a RowPlan, for rows of `query_lens` tokens. The host does not
    wait for the device.
    """
    lens = np.array(query_lens, np.int32)
    counts = np.where(lens >= LONG, -(-lens // BLOCK), 0)
    long = counts.nonzero()[0]
    parts = [
        np.append(0, lens.cumsum()),
        counts.cumsum() - counts,
        np.arange(len(lens)).repeat(counts),
        long,
    ]
    packed = torch.from_numpy(np.concatenate(parts).astype(np.int32))
    if device.type == "cuda":
        packed = packed.pin_memory()
    there = packed.to(device, non_blocking=True)
    starts, firsts, rows, long_rows = there.split([len(part) for part in parts])
    if len(long) == 0:
        return starts, None
    return starts, RowBlocks(rows, firsts, long_rows, has_short=len(long) < len(lens))


@triton.jit(do_not_specialize_on_alignment=["slots", "starts"])
def _convolve(
    x, weight, state, slots, starts, out, width, x_stride, state_stride,
    TAPS: tl.constexpr, LONG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """silu of the causal convolution of each channel, over the last inputs and the row's tokens."""
    row = tl.program_id(0)
    begin = tl.load(starts + row).to(tl.int64)
    end = tl.load(starts + row + 1).to(tl.int64)
    if end - begin >= LONG:
        return
    channel = own_range(1, BLOCK)
    inside = channel < width
    past = state + tl.load(slots + row) * state_stride + channel * (TAPS - 1)
    w, old = (), ()  # of each tap; and the inputs before the current one, oldest first
    for tap in tl.static_range(TAPS):
        w += (load_wide(weight + channel * TAPS + tap, inside),)
    for tap in tl.static_range(TAPS - 1):
        old += (load_wide(past + tap, inside),)
    source = x + begin * x_stride + channel
    target = out + begin * width + channel
    for _ in range(begin, end):
        old += (load_wide(source, inside),)
        y = w[0] * old[0]  # type: ignore[misc]
        for tap in tl.static_range(1, TAPS):
            y += w[tap] * old[tap]
        old = old[1:]
        y *= _sigmoid(y)
        store_rounded(target, y, inside)
        source += x_stride
        target += width
    for tap in tl.static_range(TAPS - 1):
        store_rounded(past + tap, old[tap], inside)


@triton.jit(do_not_specialize_on_alignment=["slots", "starts", "rows", "firsts"])
def _convolve_blocks(
    x, weight, state, slots, starts, rows, firsts, out, width, x_stride, state_stride,
    TAPS: tl.constexpr, TOKENS: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As _convolve, for PART tokens of a block. The program of the row's first tokens replaces the
    last inputs, because no other program reads them.
    """
    row = tl.load(rows + tl.program_id(0))
    channel = own_range(1, BLOCK)
    inside = channel < width
    begin, end = tl.load(starts + row), tl.load(starts + row + 1)
    first = begin + (tl.program_id(0) - tl.load(firsts + row)) * TOKENS + tl.program_id(2) * PART
    token = tl.arange(0, PART)[:, None]
    known = (token < end - first) & inside[None, :]
    line = x + first.to(tl.int64) * x_stride
    past = state + tl.load(slots + row) * state_stride + channel * (TAPS - 1)
    y = tl.zeros([PART, BLOCK], tl.float32)
    for tap in tl.static_range(TAPS):
        at = token + (tap - TAPS + 1)
        is_new = known & (at >= begin - first)
        taken = load_wide(line + at * x_stride + channel[None, :], is_new)
        if first == begin:
            taken += load_wide(past[None, :] + (at + TAPS - 1), known & (at < 0))
        w = load_wide(weight + channel * TAPS + tap, inside)
        y += taken * w[None, :]
    y *= _sigmoid(y)
    target = out + first.to(tl.int64) * width + token * width + channel[None, :]
    store_rounded(target, y, known)
    if first == begin:
        tl.debug_barrier()  # all threads have read the last inputs
        line += (end - first - TAPS + 1).to(tl.int64) * x_stride
        for i in tl.static_range(TAPS - 1):
            last = load(line + i * x_stride + channel, inside)
            store_rounded(past + i, last, inside)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _softplus(x):
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit(do_not_specialize_on_alignment=["slots", "starts"])
def _recur(
    mixed, b, a, a_log, dt_bias, state, slots, starts, out, b_stride, a_stride, state_stride,
    KEYS: tl.constexpr, VALUES: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """One program computes COLUMNS columns of the state of one value head of one row."""
    row, head = tl.program_id(0), tl.program_id(1)
    begin = tl.load(starts + row).to(tl.int64)
    end = tl.load(starts + row + 1).to(tl.int64)
    if end - begin >= LONG:
        return
    k, v = tl.arange(0, BLOCK_K), own_range(2, COLUMNS)
    inside_k, inside_v = k < K, v < V
    inside = inside_k[:, None] & inside_v[None, :]
    place = state + tl.load(slots + row) * state_stride + head * (K * V)
    place = place + k[:, None] * V + v[None, :]
    matrix = load(place, inside)
    rate = -tl.exp(tl.load(a_log + head).to(tl.float32))
    bias = tl.load(dt_bias + head).to(tl.float32)
    width: tl.constexpr = 2 * KEYS * K + VALUES * V
    key_head = head // (VALUES // KEYS)
    line = mixed + begin * width
    a += begin * a_stride + head
    b += begin * b_stride + head
    target = out + (begin * VALUES + head) * V + v
    for _ in range(begin, end):
        query = load_wide(line + key_head * K + k, inside_k)
        key = load_wide(line + (KEYS + key_head) * K + k, inside_k)
        value = load(line + 2 * KEYS * K + head * V + v, inside_v)
        query = query * tl.rsqrt(tl.sum(query * query, 0) + 1e-6)
        key = key * tl.rsqrt(tl.sum(key * key, 0) + 1e-6)
        write = _sigmoid(tl.load(b).to(tl.float32))
        matrix = matrix * tl.exp(rate * _softplus(tl.load(a).to(tl.float32) + bias))
        error = (value.to(tl.float32) - tl.sum(matrix * key[:, None], 0)) * write
        matrix = matrix + key[:, None] * error[None, :]
        found = tl.sum(matrix * query[:, None], 0) * (K**-0.5)
        store_rounded(target, found, inside_v)
        line += width
        a += a_stride
        b += b_stride
        target += VALUES * V
    tl.store(place, matrix, mask=inside)


@triton.jit
def _operand(x):
    """x as an operand of _dot: numbers of any dtype but bfloat16 as float32."""
    return x if x.dtype == tl.bfloat16 else x.to(tl.float32)


@triton.jit
def _low(x):
    """What rounding to bfloat16 takes from x, in bfloat16."""
    return (x - x.to(tl.bfloat16).to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _dot(x, y, total, IS_BF16: tl.constexpr):
    """total + x y, with y in float32. `x`: in bfloat16 if IS_BF16, else in float32."""
    if IS_BF16:
        total = tl.dot(x, _low(y), total)
        total = tl.dot(x, y.to(tl.bfloat16), total)
    else:
        total = tl.dot(x, y, total, input_precision="tf32x3")
    return total


@triton.jit
def _dot_wide(x, y, IS_BF16: tl.constexpr):
    """x y, with both in float32."""
    total = tl.zeros([x.shape[0], y.shape[1]], tl.float32)
    if IS_BF16:
        total = tl.dot(_low(x), y.to(tl.bfloat16), total)
        total = _dot(x.to(tl.bfloat16), y, total, IS_BF16)
    else:
        total = _dot(x, y, total, IS_BF16)
    return total


@triton.jit
def _inverse(lower, TOKENS: tl.constexpr, LEVELS: tl.constexpr, IS_BF16: tl.constexpr):
    """(I + lower)^-1 of a matrix [TOKENS, TOKENS] that is zero on the diagonal and above."""
    i, j = tl.arange(0, TOKENS)[:, None], tl.arange(0, TOKENS)[None, :]
    inverse = tl.where(i == j, 1.0, tl.where(i // 2 == j // 2, -lower, 0.0))
    for level in tl.static_range(1, LEVELS):
        is_below = (i >> level != j >> level) & (i >> level + 1 == j >> level + 1)
        product = _dot_wide(inverse, tl.where(is_below, lower, 0.0), IS_BF16)
        inverse -= _dot_wide(product, inverse, IS_BF16)
    return inverse


@triton.jit
def _store_parts(place, x, inside, TOKENS: tl.constexpr, PARTS: tl.constexpr):
    """Store rows of x as _recur_blocks loads them: in float32, or in two parts of bfloat16."""
    tl.store(place, x.to(place.dtype.element_ty), mask=inside)
    if PARTS == 2:
        tl.store(place + TOKENS, _low(x), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["starts", "rows", "firsts"])
def _solve_blocks(
    mixed, b, a, a_log, dt_bias, starts, rows, firsts, squares, factors, b_stride, a_stride,
    KEYS: tl.constexpr, VALUES: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, TOKENS: tl.constexpr, LEVELS: tl.constexpr, PARTS: tl.constexpr,
    FACTORS: tl.constexpr,
):  # fmt: skip
    """T and P of one block and value head, and the factors of the rows of K and Q that
    _recur_blocks needs. squares: [tokens, VALUES, 2, PARTS, TOKENS], the rows of T and P.
    """
    row, head = tl.load(rows + tl.program_id(0)), tl.program_id(1)
    first = tl.load(starts + row) + (tl.program_id(0) - tl.load(firsts + row)) * TOKENS
    token, k = tl.arange(0, TOKENS), tl.arange(0, BLOCK_K)
    inside = token < tl.load(starts + row + 1) - first
    first = first.to(tl.int64)
    width: tl.constexpr = 2 * KEYS * K + VALUES * V
    place = mixed + first * width + head // (VALUES // KEYS) * K
    place += token[:, None] * width + k[None, :]
    known = inside[:, None] & (k < K)[None, :]
    key = _operand(load(place + KEYS * K, known))
    key_scale = tl.rsqrt(tl.sum(key.to(tl.float32) * key, 1) + 1e-6)
    query = _operand(load(place, known))
    query_scale = tl.rsqrt(tl.sum(query.to(tl.float32) * query, 1) + 1e-6) * (K**-0.5)
    rate = -tl.exp(tl.load(a_log + head).to(tl.float32))
    step = load_wide(a + first * a_stride + token * a_stride + head, inside)
    step = rate * _softplus(step + tl.load(dt_bias + head).to(tl.float32))
    # Sums of infinite numbers have no differences; and exp(-1e4) is 0, too.
    step = tl.where(inside, tl.where(step < -1e4, -1e4, step), 0.0)
    write = load_wide(b + first * b_stride + token * b_stride + head, inside)
    write = tl.where(inside, _sigmoid(write), 0.0)
    # In float64: differences of long sums are as exact as the steps.
    decay = tl.cumsum(step.to(tl.float64), 0)
    since = tl.exp(decay.to(tl.float32))
    until = tl.exp((tl.sum(step.to(tl.float64), 0) - decay).to(tl.float32))
    first = first * VALUES + head
    factors += first * FACTORS + token * (VALUES * FACTORS)
    tl.store(factors, since * key_scale, mask=inside)
    tl.store(factors + 1, since * query_scale, mask=inside)
    tl.store(factors + 2, until * key_scale, mask=inside)
    tl.store(factors + 3, since * until, mask=inside)
    i, j = token[:, None], token[None, :]
    between = tl.where(i >= j, decay[:, None] - decay[None, :], 0.0).to(tl.float32)
    between = tl.where(i >= j, tl.exp(between), 0.0) * key_scale[None, :]
    place = squares + first * (2 * PARTS * TOKENS) + i * (VALUES * 2 * PARTS * TOKENS) + j
    scores = tl.dot(query, tl.trans(key), input_precision="tf32x3") * between * query_scale[:, None]
    _store_parts(place + PARTS * TOKENS, scores, inside[:, None], TOKENS, PARTS)
    lower = tl.dot(key, tl.trans(key), input_precision="tf32x3") * between
    lower = tl.where(i > j, lower * (write * key_scale)[:, None], 0.0)
    solved = _inverse(lower, TOKENS, LEVELS, PARTS == 2) * write[None, :]
    _store_parts(place, solved, inside[:, None], TOKENS, PARTS)


@triton.jit(do_not_specialize_on_alignment=["slots", "starts", "long"])
def _recur_blocks(
    mixed, squares, factors, state, slots, starts, long, out, state_stride,
    KEYS: tl.constexpr, VALUES: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr,
    FACTORS: tl.constexpr,
):  # fmt: skip
    """One program computes COLUMNS columns of the state of one value head of one long row."""
    row, head = tl.load(long + tl.program_id(0)), tl.program_id(1)
    k, v = tl.arange(0, BLOCK_K), own_range(2, COLUMNS)
    inside_k, inside_v = k < K, v < V
    place = state + tl.load(slots + row) * state_stride + head * (K * V)
    place = place + k[:, None] * V + v[None, :]
    matrix = load(place, inside_k[:, None] & inside_v[None, :])
    width: tl.constexpr = 2 * KEYS * K + VALUES * V
    IS_BF16: tl.constexpr = PARTS == 2
    begin, end = tl.load(starts + row), tl.load(starts + row + 1)
    mixed += begin.to(tl.int64) * width
    first = begin.to(tl.int64) * VALUES + head
    squares += first * (2 * PARTS * TOKENS)
    factors += first * FACTORS
    out += first * V
    at = tl.arange(0, TOKENS)
    keys = at[:, None] * width + (head // (VALUES // KEYS) * K + k)[None, :]
    values = at[:, None] * width + (2 * KEYS * K + head * V + v)[None, :]
    square = at[:, None] * (VALUES * 2 * PARTS * TOKENS) + at[None, :]
    nothing = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for left in range(end - begin, 0, -TOKENS):
        inside = at < left
        known = inside[:, None] & inside_k[None, :]
        query = _operand(load(mixed + keys, known))
        key = _operand(load(mixed + KEYS * K + keys, known))
        known = inside[:, None] & inside_v[None, :]
        value = load_wide(mixed + values, known)
        solved = load(squares + square, inside[:, None])
        scores = load(squares + PARTS * TOKENS + square, inside[:, None])
        factor = factors + at * (VALUES * FACTORS)
        of_key = load(factor, inside)
        of_query = load(factor + 1, inside)
        to_end = load(factor + 2, inside)
        keep = tl.load(factors + 3)
        error = value - of_key[:, None] * _dot(key, matrix, nothing, IS_BF16)
        new = _dot(solved, error, nothing, IS_BF16)
        found = of_query[:, None] * _dot(query, matrix, nothing, IS_BF16)
        if IS_BF16:
            low = load(squares + TOKENS + square, inside[:, None])
            new = tl.dot(low, error.to(tl.bfloat16), new)
            low = load(squares + 3 * TOKENS + square, inside[:, None])
            found = tl.dot(low, new.to(tl.bfloat16), found)
        found = _dot(scores, new, found, IS_BF16).to(out.dtype.element_ty)
        tl.store(out + at[:, None] * (VALUES * V) + v[None, :], found, mask=known)
        matrix = _dot(tl.trans(key), to_end[:, None] * new, keep * matrix, IS_BF16)
        mixed += TOKENS * width
        squares += TOKENS * VALUES * 2 * PARTS * TOKENS
        factors += TOKENS * VALUES * FACTORS
        out += TOKENS * VALUES * V
    tl.store(place, matrix, mask=inside_k[:, None] & inside_v[None, :])


def gated_delta(
    qkv: Tensor,
    b: Tensor,
    a: Tensor,
    conv: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    state: RecurrentState,
    plan: AttentionPlan,
    out: Tensor | None = None,
) -> Tensor:
    """See Ops.gated_delta. The convolution has 2 to 4 taps."""
    assert isinstance(plan, RowPlan)
    slots, starts, blocks = plan.slots, plan.starts, plan.blocks
    _, v_heads, k_dim, v_dim = state.matrix.shape
    tokens, width = qkv.shape
    mixed = torch.empty(tokens, width, dtype=qkv.dtype, device=qkv.device)
    shape = (tokens, v_heads, v_dim)
    out = qkv.new_empty(shape) if out is None else out.view(shape)
    sizes = {
        "KEYS": (width - v_heads * v_dim) // (2 * k_dim),
        "VALUES": v_heads,
        "K": k_dim,
        "V": v_dim,
    }
    if blocks is None or blocks.has_short:
        rows = len(slots)
        _convolve[(rows, cdiv(width, _CHANNELS))](
            qkv, conv, state.conv, slots, starts, mixed, width, qkv.stride(0), state.conv.stride(0),
            TAPS=conv.shape[1], LONG=LONG, BLOCK=_CHANNELS,
        )  # fmt: skip
        columns = min(_COLUMNS, next_power_of_2(v_dim))
        _recur[(rows, v_heads, cdiv(v_dim, columns))](
            mixed, b, a, a_log, dt_bias, state.matrix, slots, starts, out, b.stride(0), a.stride(0),
            state.matrix.stride(0), **sizes, BLOCK_K=next_power_of_2(k_dim),
            COLUMNS=columns, LONG=LONG, num_warps=2,
        )  # fmt: skip
    if blocks is not None:
        grid = (len(blocks.rows), cdiv(width, _PART_CHANNELS), BLOCK // _PART)
        _convolve_blocks[grid](
            qkv, conv, state.conv, slots, starts, blocks.rows, blocks.firsts, mixed, width,
            qkv.stride(0), state.conv.stride(0), TAPS=conv.shape[1], TOKENS=BLOCK,
            PART=_PART, BLOCK=_PART_CHANNELS,
        )  # fmt: skip
        _long_rows(mixed, b, a, a_log, dt_bias, state.matrix, slots, starts, blocks, out, sizes)
    return out


def _long_rows(
    mixed: Tensor,
    b: Tensor,
    a: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    matrix: Tensor,
    slots: Tensor,
    starts: Tensor,
    blocks: RowBlocks,
    out: Tensor,
    sizes: dict[str, int],
) -> None:
    """The recurrence of the long rows, after the convolution."""
    tokens, v_heads, v_dim = out.shape
    # Operands in bfloat16 come in two parts.
    is_bf16 = mixed.dtype == torch.bfloat16
    parts = 2 if is_bf16 else 1
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    squares = mixed.new_empty(tokens, v_heads, 2, parts, BLOCK, dtype=dtype)
    factors = mixed.new_empty(tokens, v_heads, FACTORS, dtype=torch.float32)
    block_k = max(16, next_power_of_2(sizes["K"]))  # at least 16, for tl.dot
    _solve_blocks[(len(blocks.rows), v_heads)](
        mixed, b, a, a_log, dt_bias, starts, blocks.rows, blocks.firsts, squares, factors,
        b.stride(0), a.stride(0), **sizes, BLOCK_K=block_k, TOKENS=BLOCK,
        LEVELS=BLOCK.bit_length() - 1, PARTS=parts, FACTORS=FACTORS,
    )  # fmt: skip
    columns = min(_COLUMNS, max(16, next_power_of_2(v_dim)))
    # The operands of the next block are loaded ahead, for which those in float32 are too large.
    _recur_blocks[(len(blocks.long), v_heads, cdiv(v_dim, columns))](
        mixed, squares, factors, matrix, slots, starts, blocks.long, out, matrix.stride(0),
        **sizes, BLOCK_K=block_k, COLUMNS=columns, TOKENS=BLOCK, PARTS=parts, FACTORS=FACTORS,
        num_stages=2 if is_bf16 else 1,
    )  # fmt: skip


@triton.jit
def _gated_norm(
    x, gain, gate, out, gate_token, dim, eps, HEADS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token, head = program(0), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    inside = at < dim
    line = (token * HEADS + head) * dim + at
    raw = load(x + line, inside)
    wide = raw.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / dim + eps)
    normed = (wide * scale).to(raw.dtype).to(tl.float32)
    normed = (normed * load_wide(gain + at, inside)).to(raw.dtype)
    z = load_wide(gate + token * gate_token + head * dim + at, inside)
    result = normed.to(tl.float32) * z / (1.0 + tl.exp(-z))
    tl.store(out + line, result.to(raw.dtype), mask=inside)


def gated_norm(x: Tensor, gain: Tensor, eps: float, gate: Tensor) -> Tensor:
    """See Ops.gated_norm. `gate` may have any stride from token to token."""
    tokens, heads, dim = x.shape
    out = torch.empty_like(x)
    _gated_norm[(tokens, heads)](
        x, gain, gate, out, gate.stride(0), dim, eps, HEADS=heads,
        BLOCK=next_power_of_2(dim), num_warps=1,
    )  # fmt: skip
    return out
