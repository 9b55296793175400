"""The input of one forward pass, as tensors on the device.

Knows no models and no sequences: rows, pages and tokens only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

# Integers that the host knows, one a row.
HostInts = np.ndarray[Any, Any]


class TensorGroup(Protocol):
    """Processes that hold a share each of the same tensors; this one is number `rank`."""

    rank: int
    size: int
    group: Any  # torch.distributed's; None for a single one
    same_node: bool

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, in its place."""
        ...

    def max(self, x: Tensor) -> Tensor:
        """The largest of all ranks' x, number by number, in its place."""
        ...

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's x, in the place of this rank's."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """[n, width] of each rank to [n, size * width], contiguous: rank after rank in a row."""
        ...


@dataclass(frozen=True)
class Batch:
    """One step. The runner fills every field. All tensors are int64 and on the model's device.

    What the host knows too comes twice, so that nothing ever has to wait for the device to tell.

    Rows are sequences: `num_decode` rows of one token first, then chunks. The tokens of a row are
    consecutive, rows follow each other, and a row's last token is the last one of its context.
    """

    tokens: Tensor  # [tokens]
    positions: Tensor  # [tokens]
    cache_index: Tensor  # [tokens] page * page_size + offset: where the token's K and V go
    page_table: Tensor  # [slots, pages] any number beyond a sequence's own pages; unused there
    slots: Tensor  # [rows] which row of page_table is a row's
    context_lens: Tensor  # [rows] tokens of the sequence in the cache after this step
    context_lens_cpu: HostInts  # the same
    query_lens: list[int]  # [rows] tokens of the row in this step
    num_decode: int
    logit_index: Tensor | None  # [n] which of `tokens` need logits; None: all of them
    # If each of these is the last token of a row: which rows; the host knows them too. All three
    # are there, or these two are not.
    logit_rows: Tensor | None = None  # [n]
    logit_rows_cpu: HostInts | None = None  # the same


def made_up_step(
    rows: list[tuple[int, int]],
    page_table: Tensor,
    page_size: int,
    logit_index: Tensor | None = None,
) -> Batch:
    """A step of no sequences, to be measured or compiled for: what it computes means nothing.

    `rows`: (tokens in the cache after it, how many of them in it) of each, all chunks unless every
    row has one token. They take turns with the rows of `page_table` [slots, pages].
    """
    device = page_table.device
    lens = np.array([n for n, _ in rows])
    query_lens = [num for _, num in rows]
    positions = torch.cat([torch.arange(n - num, n) for n, num in rows]).to(device)
    slots = torch.arange(len(rows), device=device) % len(page_table)
    of_tokens = slots.repeat_interleave(torch.tensor(query_lens, device=device))
    pages = page_table[of_tokens, positions // page_size]
    return Batch(
        tokens=torch.zeros_like(positions),
        positions=positions,
        cache_index=pages * page_size + positions % page_size,
        page_table=page_table,
        slots=slots,
        context_lens=torch.tensor(lens, device=device),
        context_lens_cpu=lens,
        query_lens=query_lens,
        num_decode=len(rows) if max(query_lens) == 1 else 0,
        logit_index=logit_index,
    )
