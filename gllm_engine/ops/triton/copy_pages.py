"""Copies K and V of tokens from pages, side by side and in another dtype.

Knows the cache layout, [num_pages, 2, page_size, kv_heads, head_dim].
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gllm_engine.ops.triton.fp8 import from_float8
from gllm_engine.ops.triton.launch_sizes import cdiv, next_power_of_2
from gllm_engine.ops.triton.memory import program
from gllm_engine.ops.triton.pdl import begin_alone, overlapping

# Numbers that a program copies, if one token has no more.
_NUMBERS = 8192


# Without this, Triton compiles one kernel for counts divisible by 16 and another one for the rest.
@triton.jit(do_not_specialize=["tokens"])
def _copy_pages(
    cache, places, out, tokens,
    WIDTH: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (i, 0) copies K of the i-th TOKENS tokens; program (i, 1) V."""
    begin_alone()
    part = tl.program_id(1)
    at = program(0) * TOKENS + tl.arange(0, TOKENS)
    place = tl.load(places + at, mask=at < tokens, other=0)
    line = (place // PAGE * 2 + part) * PAGE + place % PAGE
    d = tl.arange(0, BLOCK)
    inside = (at < tokens)[:, None] & (d < WIDTH)[None, :]
    x = tl.load(cache + line[:, None] * WIDTH + d[None, :], mask=inside)
    row = part * tokens + at
    x = from_float8(x, out.dtype.element_ty)
    tl.store(out + row[:, None] * WIDTH + d[None, :], x, mask=inside)


def copy_pages(cache: Tensor, places: Tensor, out: Tensor) -> None:
    """Copy K and V of tokens to out [2, tokens, kv_heads, head_dim], in its dtype.

    places: [tokens] int64, page * page_size + offset of each token; at least one.
    """
    tokens = len(places)
    width = cache.shape[3] * cache.shape[4]
    block = next_power_of_2(width)
    some = max(1, _NUMBERS // block)
    _copy_pages[(cdiv(tokens, some), 2)](
        cache, places, out, tokens, WIDTH=width, PAGE=cache.shape[2], TOKENS=some, BLOCK=block,
        **overlapping(),
    )  # fmt: skip
