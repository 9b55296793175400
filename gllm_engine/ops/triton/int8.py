"""The kernel after a library's product of int8 matrices: int32 sums to results.

Knows shapes and arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gllm_engine.ops.triton.launch_sizes import cdiv
from gllm_engine.ops.triton.memory import load, load_wide, own_range, program, store_rounded
from gllm_engine.ops.triton.pdl import begin_alone, overlapping
from gllm_engine.ops.weight import Int8Weight

_COLUMNS = 1024


@triton.jit
def _rescale(
    sums, row_scales, scales, bias, out, width,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    begin_alone()
    row = program(0)
    n = own_range(1, BLOCK)
    inside = n < width
    at = row * width + n
    y = load_wide(sums + at, inside)
    y *= tl.load(row_scales + row) * load(scales + n, inside)
    if bias is not None:
        y += load_wide(bias + n, inside)
    if ADD:
        y += load_wide(out + at, inside)
    store_rounded(out + at, y, inside)


def rescale(
    sums: Tensor,
    row_scales: Tensor,
    weight: Int8Weight,
    bias: Tensor | None,
    out: Tensor,
    add: bool = False,
) -> None:
    """Write sums * row_scales * weight.scales + bias to `out` [rows, width], or add it to `out`.

    `sums`: int32 [at least rows, width], contiguous, as `out` is; `row_scales`: of each row.
    """
    rows, width = out.shape
    assert out.is_contiguous()
    _rescale[(rows, cdiv(width, _COLUMNS))](
        sums, row_scales, weight.scales, bias, out, width,
        ADD=add, BLOCK=_COLUMNS, **overlapping(),
    )  # fmt: skip
