"""Kernels on the rows of a matrix: RMS norms and the gated activation.

All tensors are contiguous. Sums are float32; intermediate results are rounded where torch rounds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gllm_engine.ops.triton.pdl import OVERLAP, begin, overlapping

# Columns of one program of silu_mul.
_COLUMNS = 1024


@triton.jit
def _rms_norm(
    x, gain, out, dim, eps,
    ADD: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * dim
    at = tl.arange(0, BLOCK)
    inside = at < dim
    g = tl.load(gain + at, mask=inside, other=0.0).to(tl.float32)
    begin(OVERLAPS)
    wide = tl.load(x + row + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / dim + eps)
    kind: tl.constexpr = out.dtype.element_ty
    result = ((wide * scale).to(kind).to(tl.float32) * g).to(kind)
    if ADD:
        before = tl.load(out + row + at, mask=inside, other=0.0)
        result = (result.to(tl.float32) + before.to(tl.float32)).to(kind)
    tl.store(out + row + at, result, mask=inside)


def rms_norm(x: Tensor, gain: Tensor, eps: float, add_to: Tensor | None = None) -> Tensor:
    """x / rms(x) * gain over the last dimension of x [rows, dim]; added to `add_to` if given."""
    rows, dim = x.shape
    out = torch.empty_like(x) if add_to is None else add_to
    if rows:  # no rows: no row of the step needs logits
        block = triton.next_power_of_2(dim)
        warps = min(max(block // 512, 1), 16)
        _rms_norm[(rows,)](
            x, gain, out, dim, eps,
            ADD=add_to is not None, BLOCK=block, OVERLAPS=OVERLAP, num_warps=warps, **overlapping(),
        )  # fmt: skip
    return out


@triton.jit
def _silu_mul(gate_up, out, width, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    begin(OVERLAPS)
    gate = tl.load(gate_up + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + at, (activated * up).to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, [rows, width]. `gate_up`: [rows, 2 * width], gate first."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    if rows:
        _silu_mul[(rows, triton.cdiv(width, _COLUMNS))](
            gate_up, out, width, BLOCK=_COLUMNS, OVERLAPS=OVERLAP, **overlapping()
        )
    return out
