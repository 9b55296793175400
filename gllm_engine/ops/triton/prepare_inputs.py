"""Builds the token inputs of a step from the slots' state, in one launch for every kind of step.

Knows slots, pages and rows; nothing of the model that computes them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gllm_engine.ops.triton.launch_sizes import cdiv

# Tokens of one program: of decode rows, or of one prefill chunk.
_BLOCK = 512


@triton.jit
def _place(page_table, table, width, slot, position, token, at, inside, tokens, positions,
           cache_index, index, PAGE: tl.constexpr, GROUPS: tl.constexpr):  # fmt: skip
    tl.store(tokens + at, token, mask=inside)
    tl.store(positions + at, position, mask=inside)
    entry = page_table + slot * width + position // PAGE
    for group in tl.static_range(GROUPS):
        page = tl.load(entry + group * table, mask=inside, other=0)
        tl.store(cache_index + group * index + at, page * PAGE + position % PAGE, mask=inside)


# Tensors may start anywhere in a step's packed array, and counts differ from step to step. Without
# these options, Triton would compile kernels for new alignments and divisibilities amid serving.
@triton.jit(
    do_not_specialize=["table", "width", "index", "num_decode", "num_decode_blocks"],
    do_not_specialize_on_alignment=[
        "slots", "starts", "ends", "known", "tokens", "positions", "cache_index", "context_lens",
    ],
)  # fmt: skip
def _prepare_inputs(
    page_table, table, width, lengths, last_tokens, slots, starts, ends, known,
    tokens, positions, cache_index, index, context_lens, num_decode, num_decode_blocks,
    PAGE: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (i, 0) with i < num_decode_blocks computes BLOCK decode rows. Program (i, k) with a
    larger i computes tokens k * BLOCK onward of one chunk. Only one program accesses each length.

    table, index: numbers from one group to the next in page_table and in cache_index.
    """
    program, block = tl.program_id(0), tl.program_id(1)
    lanes = tl.arange(0, BLOCK)
    if program < num_decode_blocks:
        row = program * BLOCK + lanes
        inside = (row < num_decode) & (block == 0)
        slot = tl.load(slots + row, mask=inside, other=0)
        position = tl.load(lengths + slot, mask=inside, other=0)
        token = tl.load(last_tokens + slot, mask=inside, other=0)
        _place(page_table, table, width, slot, position, token, row, inside, tokens, positions,
               cache_index, index, PAGE, GROUPS)  # fmt: skip
        tl.store(lengths + slot, position + 1, mask=inside)
        tl.store(context_lens + row, position + 1, mask=inside)
    else:
        chunk = program - num_decode_blocks
        owner = tl.load(slots + num_decode + chunk)
        start = tl.load(starts + chunk)
        first = tl.load(ends + chunk - 1, mask=chunk > 0, other=0)
        count = tl.load(ends + chunk) - first
        i = block * BLOCK + lanes
        token = tl.load(known + first + i, mask=i < count, other=0)
        _place(page_table, table, width, owner, start + i, token, num_decode + first + i, i < count,
               tokens, positions, cache_index, index, PAGE, GROUPS)  # fmt: skip
        if block == 0:
            tl.store(lengths + owner, start + count)
            tl.store(context_lens + num_decode + chunk, start + count)


def prepare_inputs(
    page_table: Tensor,
    page_size: int,
    lengths: Tensor,
    last_tokens: Tensor,
    slots: Tensor,
    starts: Tensor,
    ends: Tensor,
    known: Tensor,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See Ops.prepare_inputs. The returned tensors start at addresses divisible by 16."""
    num_groups = len(page_table)
    num_rows, num_chunks = len(slots), len(starts)
    num_decode = num_rows - num_chunks
    num_tokens = num_decode + len(known)
    # One allocation. Kernels that read its rows are compiled for 16-byte alignment.
    made = torch.empty(
        3 + num_groups, max(num_tokens, num_rows) + 1 & -2, dtype=torch.int64, device=slots.device
    )
    tokens, positions, context_lens = made[:3]
    cache_index = made[3:]
    num_decode_blocks = cdiv(num_decode, _BLOCK)
    _prepare_inputs[(num_decode_blocks + num_chunks, max(cdiv(longest, _BLOCK), 1))](
        page_table, page_table.stride(0), page_table.stride(1), lengths, last_tokens, slots, starts,
        ends, known, tokens, positions, cache_index, cache_index.stride(0), context_lens,
        num_decode, num_decode_blocks, PAGE=page_size, GROUPS=num_groups, BLOCK=_BLOCK,
    )  # fmt: skip
    return (
        tokens[:num_tokens],
        positions[:num_tokens],
        cache_index[:, :num_tokens],
        context_lens[:num_rows],
    )
