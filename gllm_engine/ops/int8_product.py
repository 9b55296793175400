"""Products with int8 weights on an NVIDIA GPU: which kernel multiplies.

one row                  Triton's gemv; x is not rounded
more rows                torch's product of int8 matrices, whose sums our kernel multiplies by
                         the scales; each row of x is rounded to int8, after its RMS norm
all rows, if no kernel   a plain product with the weight's exact numbers, which are made anew
fits                     for each product: right, but slow
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gllm_engine.ops import triton
from gllm_engine.ops.kernels import INT8_ROWS_AT_ONCE, has_int8_product
from gllm_engine.ops.protocol import Norm
from gllm_engine.ops.weight import Int8Weight

_LEAST_ROWS = 32


def linear(
    x: Tensor,
    weight: Int8Weight,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See Ops.linear."""
    if triton.is_single(x, weight):
        return triton.gemv(x, weight, bias, norm, out=out)
    if has_product(x, weight):
        made = x.new_empty(len(x), len(weight)) if out is None or not out.is_contiguous() else out
        _multiply(x, weight, bias, norm, made)
        return made if out is None or made is out else out.copy_(made)
    x = x if norm is None else triton.rms_norm(x, *norm)
    y = F.linear(x, triton.dequantize(weight, x.dtype), bias)
    return y if out is None else out.copy_(y)


def gated_linear(
    x: Tensor, weight: Int8Weight, bias: Tensor | None, norm: Norm | None
) -> Tensor | None:
    """As Ops.gated_linear; None if no kernel both multiplies and activates."""
    if triton.is_single(x, weight):
        return triton.gemv(x, weight, bias, norm, gated=True)
    return None


def add_linear(total: Tensor, x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    """See Ops.add_linear."""
    if triton.is_single(x, weight):
        return triton.gemv(x, weight, bias, out=total, add=True)
    if has_product(x, weight) and total.is_contiguous():
        _multiply(x, weight, bias, None, total, add=True)
        return total
    return total.add_(linear(x, weight, bias))


def has_product(x: Tensor, weight: Int8Weight) -> bool:
    """Whether torch multiplies x [rows, depth] by a weight of this shape."""
    return len(x) > 0 and has_int8_product(x.dtype, *weight.shape)


def _multiply(
    x: Tensor,
    weight: Int8Weight,
    bias: Tensor | None,
    norm: Norm | None,
    out: Tensor,
    add: bool = False,
) -> None:
    rounded = triton.quantize(x, norm=norm, dtype=torch.int8)
    numbers = rounded.numbers
    scales = rounded.scales.flatten()
    some = INT8_ROWS_AT_ONCE
    for first in range(0, len(x), some):
        # torch's products take more than 16 rows, so a few last ones are those of the part before.
        start = min(first, max(0, len(numbers) - _LEAST_ROWS))
        rows = slice(start, first + some)
        sums = torch._int_mm(numbers[rows], weight.numbers.T)[first - start :]
        part = out[first : first + some]
        triton.rescale(sums, scales[first : first + some], weight, bias, part, add)
