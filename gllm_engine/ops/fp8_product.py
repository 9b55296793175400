"""Products with FP8 weights on an NVIDIA GPU: which kernel multiplies, and those that are not ours.

    one row                  Triton's gemv; x is not rounded
    few rows                 Triton's tiles on FP8 tensor cores; so too more rows, if the weight has
                             blocks and is narrow and deep
    more rows                torch's scaled product, or Triton's tiles if torch has none
    all rows, if no kernel   a plain product with the weight's exact numbers, which are made anew
    fits                     for each product: right, but slow

The last line is for float32, for scales that belong to fewer than 16 columns (one row) or 32, and
on other GPUs than Hopper for whatever torch lacks. Of several rows, x is rounded to float8 too,
after its RMS norm: each row by one scale if each row of the weight has one, else each 128 numbers
of a row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gllm_engine.ops import triton
from gllm_engine.ops.kernels import has_scaled_product, on_hopper
from gllm_engine.ops.protocol import Norm
from gllm_engine.ops.weight import Fp8Weight, Rows

_BLOCK = 128
# Sizes of a weight, and blocks in a row of one, that torch's products take. With other numbers of
# blocks torch demands a row of scales with and without padding at once (2.11).
_SIZE_MULTIPLE = 16
_BLOCKS_MULTIPLE = 4
# Most rows for which our tiles are chosen where torch has a product too: few rows, whose products
# take the time to read the weight.
_FEW_ROWS = 64
# Of weights with blocks, our tiles are also chosen if there are at most so many of them, 128 x 128,
# and they are so deep: torch lets the other ones of 132 multiprocessors idle, and our kernel
# divides the depth. Torch divides it if rows have one scale: of 4096 x 4096 and 96 rows it takes
# 15 us, our kernel 21 us.
_IDLE_TILES = 66
_DEEP = 2048


def linear(
    x: Rows,
    weight: Fp8Weight,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See Ops.linear."""
    if product := own_product(x, weight):
        return product(x, weight, bias, norm, out=out)
    if has_product(x, weight):
        y = _multiply(x, weight, norm)
        if bias is not None:
            y += bias
    else:
        assert isinstance(x, Tensor)
        x = x if norm is None else triton.rms_norm(x, *norm)
        y = F.linear(x, triton.dequantize(weight, x.dtype), bias)
    return y if out is None else out.copy_(y)


def gated_linear(
    x: Tensor, weight: Fp8Weight, bias: Tensor | None, norm: Norm | None
) -> Tensor | None:
    """As Ops.gated_linear; None if no kernel both multiplies and activates."""
    product = own_product(x, weight)
    return product and product(x, weight, bias, norm, gated=True)


def add_linear(total: Tensor, x: Rows, weight: Fp8Weight, bias: Tensor | None) -> Tensor:
    """See Ops.add_linear."""
    if product := own_product(x, weight):
        return product(x, weight, bias, out=total, add=True)
    return total.add_(linear(x, weight, bias))


def activate(x: Tensor, act: str, gated: bool, then: Fp8Weight) -> Rows:
    """See Ops.activate; rounded if the product with `then` would round it."""
    rows = x[:, : x.shape[1] // (1 + gated)]  # of the same size and dtype as the result
    product = own_product(rows, then)
    if product is triton.skinny or product is None and has_product(rows, then):
        return triton.quantize(x, triton.rounding_group(then), act=(act, gated))
    return triton.activate(x, act, gated)


def own_product(x: Rows, weight: Fp8Weight) -> Callable[..., Tensor] | None:
    """Our kernel for products with x [rows, depth], or None."""
    if triton.is_single(x, weight):
        return triton.gemv
    if not on_hopper(x.device) or not triton.has_tiles(x, weight):
        return None
    is_best = len(x) <= _FEW_ROWS or _is_narrow(x, weight) or not has_product(x, weight)
    return triton.skinny if is_best else None


def _is_narrow(x: Rows, weight: Fp8Weight) -> bool:
    """Whether torch would leave multiprocessors idle, and tiles are deep enough to be divided."""
    width, depth = weight.shape
    tiles = -(-len(x) // 128) * -(-width // 128)
    return triton.rounding_group(weight) is not None and tiles <= _IDLE_TILES and depth >= _DEEP


def has_product(x: Rows, weight: Fp8Weight) -> bool:
    """Whether torch multiplies x [rows, depth] by weights of this format and shape."""
    if not len(x) or any(size % _SIZE_MULTIPLE for size in weight.shape):
        return False
    if weight.columns_per_scale == x.shape[1] and weight.rows_per_scale == 1:
        return has_scaled_product(x.dtype)
    block = (weight.rows_per_scale, weight.columns_per_scale)
    width, depth = weight.shape
    whole = not width % _BLOCK and not depth % (_BLOCK * _BLOCKS_MULTIPLE)
    if not whole or weight.scale_row is not None or weight.first_column:
        return False
    return has_scaled_product(x.dtype, block, on_hopper(x.device))


def _multiply(x: Rows, weight: Fp8Weight, norm: Norm | None) -> Tensor:
    rounded = triton.quantize(x, triton.rounding_group(weight), norm)
    y = torch._scaled_mm(
        rounded.numbers,
        weight.numbers.T,
        scale_a=rounded.scales,
        scale_b=weight.scales.T,
        out_dtype=x.dtype,
        use_fast_accum=weight.rows_per_scale == 1,
    )
    return y[: len(x)]
