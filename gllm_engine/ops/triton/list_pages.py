"""Turns page tables into the flat list of pages that FlashInfer reads."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gllm_engine.ops.triton.launch_sizes import cdiv
from gllm_engine.ops.triton.memory import own_range

_BLOCK = 1024


# Tensors may start anywhere in a step's packed array: one kernel serves all alignments.
@triton.jit(do_not_specialize_on_alignment=["slots", "firsts"])
def _list_pages(page_table, slots, starts, firsts, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    first = tl.load(starts + row)
    count = tl.load(starts + row + 1) - first
    at = own_range(1, BLOCK)
    source = page_table + tl.load(slots + row) * width + tl.load(firsts + row)
    pages = tl.load(source + at, mask=at < count, other=0)
    tl.store(out + first + at, pages.to(tl.int32), mask=at < count)


def list_pages(
    page_table: Tensor, slots: Tensor, starts: Tensor, firsts: Tensor, max_pages: int, out: Tensor
) -> None:
    """Write the pages of row r from index firsts[r] on to out[starts[r] : starts[r + 1]].

    page_table: [slots, width] int64; slots: [rows] int64; starts: [rows + 1] int32; firsts: [rows]
    int32; out: int32. No row has more than `max_pages`.
    """
    blocks = max(cdiv(min(max_pages, page_table.shape[1]), _BLOCK), 1)
    grid = (slots.shape[0], blocks)
    width = page_table.shape[1]
    _list_pages[grid](page_table, slots, starts, firsts, out, width, BLOCK=_BLOCK)
