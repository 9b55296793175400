"""Matrix products with one row, where reading the weight takes all the time.

A program holds some rows of the weight at once, all of whose loads are under way together, and asks
for them before the kernel that makes x has ended. Norm, activation and residual sum ride along.
Knows shapes and arithmetic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gllm_engine.ops.triton.overlap import OVERLAP, begin, overlapping

# Numbers of the weight that one program holds.
_HELD = 16384
_WARPS = 4
_DTYPES = (torch.bfloat16, torch.float16)


@triton.jit
def _gemv(
    x, gain, weight, bias, out, width, depth, eps,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr,
    BIAS: tl.constexpr, ADD: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = tl.arange(0, BLOCK_K)[None, :]
    inside = (at < depth) & (n < width)[:, None]
    line = weight + n.to(tl.int64)[:, None] * depth + at
    w = tl.load(line, mask=inside, other=0.0, eviction_policy="evict_first")
    if GATED:
        line += width.to(tl.int64) * depth
        up = tl.load(line, mask=inside, other=0.0, eviction_policy="evict_first")
    if NORM:
        g = tl.load(gain + at, mask=at < depth, other=0.0).to(tl.float32)
    begin(OVERLAPS)
    kind: tl.constexpr = out.dtype.element_ty
    v = tl.load(x + at, mask=at < depth, other=0.0).to(tl.float32)
    if NORM:
        v *= tl.rsqrt(tl.sum(v * v, 1) / depth + eps)[:, None]
        v = (v.to(kind).to(tl.float32) * g).to(kind).to(tl.float32)
    y = tl.sum(w.to(tl.float32) * v, 1)
    if BIAS:
        y += tl.load(bias + n, mask=n < width, other=0.0).to(tl.float32)
    if GATED:
        z = tl.sum(up.to(tl.float32) * v, 1)
        if BIAS:
            z += tl.load(bias + width + n, mask=n < width, other=0.0).to(tl.float32)
        y = y.to(kind).to(tl.float32)
        y = (y / (1.0 + tl.exp(-y))).to(kind).to(tl.float32)
        y *= z.to(kind).to(tl.float32)
    if ADD:
        y += tl.load(out + n, mask=n < width, other=0.0).to(tl.float32)
    tl.store(out + n, y.to(kind), mask=n < width)


def is_single(x: Tensor) -> bool:
    """Whether `gemv` takes x [rows, depth]."""
    return x.shape[0] == 1 and x.dtype in _DTYPES


def gemv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
    out: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """x W' + b, for x [1, depth] and weight [width, depth]: [1, width].

    `norm`: (gain, eps) of an RMS norm of x. `gated`: the weight is [gate, up], the result
    silu(gate) * up, [1, width / 2]. `out`: where the result goes; with `add` it is added there.
    """
    depth = x.shape[1]
    width = weight.shape[0] // 2 if gated else weight.shape[0]
    out = x.new_empty(1, width) if out is None else out
    block_k = triton.next_power_of_2(depth)
    block_n = max(1, _HELD // block_k // (1 + gated))
    gain, eps = (x, 0.0) if norm is None else norm
    _gemv[(triton.cdiv(width, block_n),)](
        x, gain, weight, x if bias is None else bias, out, width, depth, eps,
        BLOCK_N=block_n, BLOCK_K=block_k, NORM=norm is not None, GATED=gated,
        BIAS=bias is not None, ADD=add, OVERLAPS=OVERLAP,
        num_warps=_WARPS, **overlapping(),
    )  # fmt: skip
    return out
