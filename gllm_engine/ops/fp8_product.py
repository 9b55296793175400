"""Products with FP8 weights on an NVIDIA GPU, by torch's scaled products.

The input is rounded to float8 too, after its RMS norm: each token by one scale for weights with
scales per row, each 128 numbers of a token by one scale for weights with blocks of 128 x 128. What
torch has no product for is multiplied in the dtype of x by the weight's exact numbers, which are
made anew for each product: right, but slow.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gllm_engine.ops import triton
from gllm_engine.ops.kernels import has_scaled_product
from gllm_engine.ops.protocol import Norm
from gllm_engine.ops.weight import Fp8Weight

_BLOCK = 128
# Sizes of a weight, and blocks in a row of one, that torch's products take. With other numbers of
# blocks torch demands a row of scales with and without padding at once (2.11).
_SIZE_MULTIPLE = 16
_BLOCKS_MULTIPLE = 4


def linear(
    x: Tensor,
    weight: Fp8Weight,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See Ops.linear."""
    if not has_product(x, weight):
        x = x if norm is None else triton.rms_norm(x, *norm)
        y = F.linear(x, triton.dequantize(weight, x.dtype), bias)
    else:
        y = _multiply(x, weight, norm)
        if bias is not None:
            y += bias
    return y if out is None else out.copy_(y)


def has_product(x: Tensor, weight: Fp8Weight) -> bool:
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
    is_hopper = torch.cuda.get_device_capability(x.device)[0] == 9
    return has_scaled_product(x.dtype, block, is_hopper)


def _multiply(x: Tensor, weight: Fp8Weight, norm: Norm | None) -> Tensor:
    if weight.rows_per_scale == 1:
        numbers, x_scales = triton.quantize(x, norm=norm)
    else:
        numbers, x_scales = triton.quantize(x, _BLOCK, norm)
    y = torch._scaled_mm(
        numbers,
        weight.numbers.T,
        scale_a=x_scales,
        scale_b=weight.scales.T,
        out_dtype=x.dtype,
        use_fast_accum=weight.rows_per_scale == 1,
    )
    return y[: len(x)]
