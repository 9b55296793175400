"""Attention sinks for attention that was computed without them.

A sink is one more key of a head, with value 0, so it only makes the softmax's denominator larger.
With lse, the logarithm of the sum of exponentials of a head's scores:

    attention with the sink = attention without it * sigmoid(lse - sink)
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gllm_engine.ops.triton.launch_sizes import cdiv, next_power_of_2
from gllm_engine.ops.triton.memory import load, load_wide, own_range, program, store_rounded
from gllm_engine.ops.triton.pdl import begin_alone, overlapping

# Heads of one program.
_HEADS = 16
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _apply_sinks(
    out, lse, sinks, heads, dim,
    BLOCK_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    token = program(0)
    head = own_range(1, BLOCK_HEADS)
    at = tl.arange(0, BLOCK_DIM)[None, :]
    known = head < heads
    sink = load_wide(sinks + head, known) * _LOG2_E
    begin_alone()
    total = load(lse + token * heads + head, known)
    factor = 1.0 / (1.0 + tl.exp2(sink - total))
    place = out + (token * heads + head)[:, None] * dim + at
    inside = known[:, None] & (at < dim)
    x = load_wide(place, inside) * factor[:, None]
    store_rounded(place, x, inside)


def apply_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """Change `out` [tokens, heads, head_dim] in place, from attention without to attention with
    sinks.

    All are contiguous. lse: [tokens, heads] float32, to base 2. sinks: [heads].
    """
    tokens, heads, dim = out.shape
    block = min(_HEADS, next_power_of_2(heads))
    _apply_sinks[(tokens, cdiv(heads, block))](
        out, lse, sinks, heads, dim,
        BLOCK_HEADS=block, BLOCK_DIM=next_power_of_2(dim),
        **overlapping(),
    )  # fmt: skip
