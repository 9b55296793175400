"""The input of one forward pass, as tensors on the device.

Knows rows, pages and tokens; no models, no sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

# Integers in host memory, one per row.
HostInts = np.ndarray[Any, Any]


class TensorGroup(Protocol):
    """Processes with a shard each of the same tensors; this process is number `rank`."""

    rank: int
    size: int
    group: Any  # a torch.distributed process group; None for a single process
    same_node: bool

    def sum(self, x: Tensor) -> Tensor:
        """Replace x by the sum of all ranks' x; return x."""
        ...

    def max(self, x: Tensor) -> Tensor:
        """Replace x by the element-wise maximum of all ranks' x; return x."""
        ...

    def broadcast(self, x: Tensor) -> Tensor:
        """Replace x by rank 0's x; return x."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """Concatenate all ranks' x [n, width] to [n, size * width], contiguous, in rank order."""
        ...


class ImageRows(NamedTuple):
    """The tokens of a step whose embeddings are those of images."""

    places: Tensor  # [n] int64, of the tokens in the step
    # [1 + deep, n, dim]: what replaces their embeddings, then what is added to the residual stream
    # after layers 0, 1, ...
    embeddings: Tensor


@dataclass(frozen=True)
class Batch:
    """One step. The runner fills every field. All tensors are int64 and on the model's device.

    Fields whose names end in _cpu are host copies, so that the host never reads from the device.

    A row is a sequence: first `num_decode` decode rows of one token, then prefill chunks. The
    tokens of a row are consecutive, in the order of rows. A row's last token ends its context.

    Layers of one group share a page table. `of_group` returns the batch for one group, without the
    dimension of groups; attention planners get such batches.
    """

    tokens: Tensor  # [tokens]
    positions: Tensor  # [tokens]
    cache_index: Tensor  # [groups, tokens] page * page_size + offset of the token's K and V
    # [groups, slots, pages] Entries before a window and after a sequence's last page are unused.
    page_table: Tensor
    slots: Tensor  # [rows] row of a page table
    context_lens: Tensor  # [rows] tokens of the sequence in the cache after this step
    context_lens_cpu: HostInts  # [rows] host copy of context_lens
    query_lens: list[int]  # [rows] tokens of the row in this step
    num_decode: int
    logit_index: Tensor | None  # [n] indices of the tokens that need logits; None: all
    # The rows of logit_index, if it has only last tokens of rows; else both are None.
    logit_rows: Tensor | None = None  # [n]
    logit_rows_cpu: HostInts | None = None  # [n] host copy of logit_rows
    # The positions by which heads are rotated: [tokens], or [3, tokens] of time, row and column;
    # None: they are `positions`.
    rotary_positions: Tensor | None = None
    images: ImageRows | None = None  # on the first stage, if the step has any

    @property
    def rotation(self) -> Tensor:
        """The rotary positions, [tokens] or [3, tokens]."""
        return self.positions if self.rotary_positions is None else self.rotary_positions

    def of_group(self, group: int) -> Batch:
        """The step for layers of one group: cache_index [tokens], page_table [slots, pages]."""
        return replace(self, cache_index=self.cache_index[group], page_table=self.page_table[group])


def made_up_step(
    rows: list[tuple[int, int]],
    page_table: Tensor,
    page_size: int,
    logit_index: Tensor | None = None,
    num_groups: int = 1,
) -> Batch:
    """A step without real sequences, to measure or to compile kernels; its results mean nothing.

    `rows`: (context length after the step, tokens of the row in the step). All rows are prefill
    chunks unless every row has one token. Row i uses row i % slots of `page_table` [slots, pages],
    which all groups share.
    """
    device = page_table.device
    lens = np.array([n for n, _ in rows])
    query_lens = [num for _, num in rows]
    positions = torch.cat([torch.arange(n - num, n) for n, num in rows]).to(device)
    slots = torch.arange(len(rows), device=device) % len(page_table)
    num_tokens = torch.tensor(query_lens, device=device)
    of_tokens = slots.repeat_interleave(num_tokens, output_size=len(positions))
    pages = page_table[of_tokens, positions // page_size]
    return Batch(
        tokens=torch.zeros_like(positions),
        positions=positions,
        cache_index=(pages * page_size + positions % page_size).expand(num_groups, -1),
        page_table=page_table.expand(num_groups, -1, -1),
        slots=slots,
        context_lens=torch.tensor(lens, device=device),
        context_lens_cpu=lens,
        query_lens=query_lens,
        num_decode=len(rows) if max(query_lens) == 1 else 0,
        logit_index=logit_index,
    )
