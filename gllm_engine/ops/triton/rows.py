"""Kernels that work on the rows of a matrix: RMS norms and the gated activation.

All tensors are contiguous. Sums are taken in float32; what torch would round in between is rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns of one program of silu_mul.
_COLUMNS = 1024


@triton.jit
def _rms_norm(x, residual, weight, out, dim, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * dim
    at = tl.arange(0, BLOCK)
    inside = at < dim
    total = tl.load(x + row + at, mask=inside, other=0.0)
    if ADD:
        before = tl.load(residual + row + at, mask=inside, other=0.0)
        total = (total.to(tl.float32) + before.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(residual + row + at, total, mask=inside)
    wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / dim + eps)
    normed = (wide * scale).to(x.dtype.element_ty).to(tl.float32)
    gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + at, (normed * gain).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension of x [rows, dim]."""
    out = torch.empty_like(x)
    _launch_norm(x, x, weight, out, eps, False)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) where s = x + residual. Overwrites `residual` with s."""
    out = torch.empty_like(x)
    _launch_norm(x, residual, weight, out, eps, True)
    return out, residual


def _launch_norm(
    x: Tensor, residual: Tensor, weight: Tensor, out: Tensor, eps: float, add: bool
) -> None:
    rows, dim = x.shape
    if not rows:  # no row of the step needs logits
        return
    block = triton.next_power_of_2(dim)
    warps = min(max(block // 512, 1), 16)
    _rms_norm[(rows,)](x, residual, weight, out, dim, eps, ADD=add, BLOCK=block, num_warps=warps)


@triton.jit
def _silu_mul(gate_up, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_up + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + at, (activated * up).to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for a last dimension of [gate, up]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    _silu_mul[(rows, triton.cdiv(width, _COLUMNS))](gate_up, out, width, BLOCK=_COLUMNS)
    return out
