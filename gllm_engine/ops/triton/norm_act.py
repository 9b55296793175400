"""Kernels on the rows of a matrix: norms, their sums, and activations.

All tensors are contiguous, but rows that an RMS norm takes may lie apart. Sums are float32;
intermediate results are rounded where torch rounds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gllm_engine.ops.triton.launch_sizes import cdiv, next_power_of_2
from gllm_engine.ops.triton.memory import load_wide, own_range, program, store_rounded
from gllm_engine.ops.triton.pdl import begin, overlapping

# Columns of one program of activate.
_COLUMNS = 1024


@triton.jit
def _add_after(x, wide, add_after, at, inside):
    """Add a row to the row at x, whose numbers are `wide`; None adds nothing."""
    if add_after is not None:
        store_rounded(x + at, wide + load_wide(add_after + at, inside), inside)


@triton.jit
def _rms_norm(
    x, gain, out, add_after, dim, x_row, eps,
    ADD: tl.constexpr, PLUS_ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number = program(0)
    row = number * dim
    at = tl.arange(0, BLOCK)
    inside = at < dim
    g = load_wide(gain + at, inside)
    begin()
    x += number * x_row
    wide = load_wide(x + at, inside)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / dim + eps)
    kind: tl.constexpr = out.dtype.element_ty
    if PLUS_ONE:
        result = (wide * scale * (1.0 + g)).to(kind)
    else:
        result = ((wide * scale).to(kind).to(tl.float32) * g).to(kind)
    if ADD:
        result = (result.to(tl.float32) + load_wide(out + row + at, inside)).to(kind)
    tl.store(out + row + at, result, mask=inside)
    _add_after(x, wide, add_after, at, inside)


def rms_norm(
    x: Tensor,
    gain: Tensor,
    eps: float,
    add_to: Tensor | None = None,
    plus_one: bool = False,
    add_after: Tensor | None = None,
) -> Tensor:
    """As Ops.rms_norm."""
    rows, dim = x.shape
    out = x.new_empty(rows, dim) if add_to is None else add_to
    if rows:  # no rows: no row of the step needs logits
        block = next_power_of_2(dim)
        _rms_norm[(rows,)](
            x, gain, out, add_after, dim, x.stride(0), eps,
            ADD=add_to is not None, PLUS_ONE=plus_one, BLOCK=block,
            num_warps=_warps(block), **overlapping(),
        )  # fmt: skip
    return out


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


@triton.jit
def _layer_norm(
    x, gain, bias, out, add_after, dim, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = program(0) * dim
    at = tl.arange(0, BLOCK)
    inside = at < dim
    g = load_wide(gain + at, inside)
    if bias is not None:
        b = load_wide(bias + at, inside)
    begin()
    x += row
    wide = load_wide(x + at, inside)
    centred = tl.where(inside, wide - tl.sum(wide, 0) / dim, 0.0)
    result = centred * tl.rsqrt(tl.sum(centred * centred, 0) / dim + eps) * g
    if bias is not None:
        result += b
    store_rounded(out + row + at, result, inside)
    _add_after(x, wide, add_after, at, inside)


def layer_norm(
    x: Tensor, gain: Tensor, bias: Tensor | None, eps: float, add_after: Tensor | None = None
) -> Tensor:
    """As Ops.layer_norm."""
    rows, dim = x.shape
    out = torch.empty_like(x)
    if rows:
        block = next_power_of_2(dim)
        _layer_norm[(rows,)](
            x, gain, bias, out, add_after, dim, eps,
            BLOCK=block, num_warps=_warps(block), **overlapping(),
        )  # fmt: skip
    return out


@triton.jit
def _mean_squares(
    qkv, out, row_width, q_width, k_width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (t, 0) computes the mean of token t's queries; program (t, 1) that of its keys."""
    token = program(0)
    part = tl.program_id(1)
    first = tl.where(part == 0, 0, q_width)
    width = tl.where(part == 0, q_width, k_width)
    begin()
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = load_wide(qkv + token * row_width + first + at, at < width)
        total += x * x
    tl.store(out + token * 2 + part, tl.sum(total, 0) / width)


def mean_squares(qkv: Tensor, num_heads: int) -> Tensor:
    """As Ops.mean_squares."""
    tokens, total, dim = qkv.shape
    kv_heads = (total - num_heads) // 2
    out = qkv.new_empty(tokens, 2, dtype=torch.float32)
    if tokens:
        _mean_squares[(tokens, 2)](
            qkv, out, qkv.stride(0), num_heads * dim, kv_heads * dim,
            BLOCK=_COLUMNS, **overlapping(),
        )  # fmt: skip
    return out


@triton.jit
def activated(gate, ACT: tl.constexpr):
    """act(gate) in float32; see Ops.activate."""
    if ACT == "silu":
        result = gate / (1.0 + tl.exp(-gate))
    elif ACT == "gelu_quick":
        result = gate / (1.0 + tl.exp(-1.702 * gate))
    elif ACT == "gelu":
        result = gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:  # 0.5 * (1 + tanh(u)) is the logistic function of 2u
        u = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        result = gate / (1.0 + tl.exp(-2.0 * u))
    return result


@triton.jit
def _activate(
    x, out, width, ACT: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = program(0)
    at = own_range(1, BLOCK)
    inside = at < width
    begin()
    line = x + row * (2 * width if GATED else width)
    gate = load_wide(line + at, inside)
    kind: tl.constexpr = out.dtype.element_ty
    result = activated(gate, ACT).to(kind)
    if GATED:
        up = load_wide(line + width + at, inside)
        result = (result.to(tl.float32) * up).to(kind)
    tl.store(out + row * width + at, result, mask=inside)


def activate(x: Tensor, act: str, gated: bool) -> Tensor:
    """As Ops.activate; the result is not rounded to float8."""
    rows, width = x.shape[0], x.shape[1] // (1 + gated)
    out = x.new_empty(rows, width)
    if rows:
        _activate[(rows, cdiv(width, _COLUMNS))](
            x, out, width, ACT=act, GATED=gated, BLOCK=_COLUMNS, **overlapping()
        )
    return out
