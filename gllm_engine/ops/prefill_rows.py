"""The prefill chunks of a step as rows of causal attention, and the pages that they read.

FlashInfer plans such rows on the host. Everything here is host memory except where it says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gllm_engine.ops.batch import Batch, HostInts

# FlashAttention-3 has a program for each tile of so many queries of a head, and so many programs at
# once: Hopper's multiprocessors.
_QUERIES = 128
_PROGRAMS = 132
# FlashAttention-2 takes so many times as long over pages of float8, which it converts, and half of
# that over others. It takes as long as a tile with so many tokens to divide contexts.
_SLOWNESS = 3.5
_DIVIDING = 512


@dataclass(frozen=True)
class PrefillRows:
    """The tokens of a row attend to each other and to the tokens of its sequence before them, from
    `begins` on.
    """

    slots: Tensor  # [rows] row of the page table, on the device
    query_lens: HostInts  # [rows]
    ends: HostInts  # [rows] tokens of the sequence up to the row's last one
    begins: HostInts  # [rows]

    @property
    def num_paged(self) -> int:
        """Rows before the last ones that attend to no token of an earlier step or row."""
        paged = np.flatnonzero(self.ends - self.begins != self.query_lens)
        return int(paged[-1]) + 1 if len(paged) else 0

    def up_to(self, count: int) -> PrefillRows:
        """The first `count` rows."""
        return replace(
            self,
            slots=self.slots[:count],
            query_lens=self.query_lens[:count],
            ends=self.ends[:count],
            begins=self.begins[:count],
        )


def are_short(rows: PrefillRows, heads: int, itemsize: int) -> bool:
    """Whether chunks of `heads` heads are short: FlashAttention-2 is the faster one for them.

    It divides any work evenly: it has tiles of the queries of all heads with the same K and V, and
    several programs for a long context. FlashAttention-3 takes the time of full tiles, and at least
    that of one tile with the longest context. `itemsize`: bytes of a number of the cache.
    """
    seen = rows.ends - rows.begins
    tiles = -(-rows.query_lens // _QUERIES)
    busiest = max(heads * np.dot(tiles, seen) / _PROGRAMS, seen.max())
    even = heads * np.dot(rows.query_lens, seen) / _QUERIES / _PROGRAMS
    return bool(_SLOWNESS / itemsize * even + _DIVIDING < busiest)


def prefill_rows(batch: Batch, chunk: int | None) -> PrefillRows:
    """The rows of a batch's prefill chunks. `chunk`: a token sees no token before the last multiple
    of this number of tokens; None: all. Chunks are cut there, so that every row is causal.
    """
    n = batch.num_decode
    ends = batch.context_lens_cpu[n:]
    query_lens = np.array(batch.query_lens[n:], dtype=np.int64)
    slots = batch.slots[n:]
    if chunk is None:
        return PrefillRows(slots, query_lens, ends, np.zeros_like(ends))
    starts = ends - query_lens
    counts = (ends - 1) // chunk - starts // chunk + 1
    row = np.arange(len(ends)).repeat(counts)
    part = np.arange(len(row)) - (counts.cumsum() - counts)[row]
    begins = (starts[row] // chunk + part) * chunk
    ends = np.minimum(begins + chunk, ends[row])
    copies = torch.from_numpy(counts).pin_memory().to(slots.device, non_blocking=True)
    return PrefillRows(
        slots.repeat_interleave(copies, output_size=len(row)),
        ends - np.maximum(begins, starts[row]),
        ends,
        begins,
    )


class ListedPages:
    """Which pages of each row FlashInfer reads: those that the row's first token sees, to the last.

    Tensors are int32 in pinned memory: copies to the device do not wait. `starts`: [rows + 1]
    offset of each row's pages, and the total. `lasts`: [rows] tokens in each row's last page.
    `longest`: most pages of a row.
    """

    def __init__(self, rows: PrefillRows, page_size: int, window: int) -> None:
        """`window`: tokens that a token sees, itself included; 0: all from the row's `begins` on.

        `begins` are multiples of `page_size`.
        """
        lens = rows.ends.astype(np.int32)
        ends = (lens + (page_size - 1)) // page_size
        firsts = rows.begins.astype(np.int32) // page_size
        if window:
            firsts = np.maximum(lens - rows.query_lens - window + 1, 0) // page_size
        count = len(lens)
        packed = np.zeros(3 * count + 1, np.int32)
        (ends - firsts).cumsum(out=packed[1 : count + 1])
        packed[count + 1 : 2 * count + 1] = firsts
        packed[2 * count + 1 :] = lens - (ends - 1) * page_size
        self._pinned = torch.from_numpy(packed).pin_memory()
        self.starts = self._pinned[: count + 1]
        self.lasts = self._pinned[2 * count + 1 :]
        self.longest = int((ends - firsts).max())

    def to(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`starts`, and [rows] the index of each row's first page, both on the device."""
        rows = len(self.lasts)
        there = self._pinned[: 2 * rows + 1].to(device, non_blocking=True)
        return there[: rows + 1], there[rows + 1 :]
