"""Which chunks of a step latent attention computes in the expanded form, and of how many heads.

A step's rows are ordered: decode rows, chunks with a context, chunks from position 0. The absorbed
form is for the first rows, the expanded form for all others:

    decode rows       absorbed: each token has a context of its own, and no key would be used twice
    chunks            expanded, but not if their contexts are long and they are short: K and V of a
      with a context  context are computed for all its tokens, however few tokens attend to them
    other chunks      expanded
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gllm_engine.attention_shape import LatentShape
from gllm_engine.ops.batch import Batch
from gllm_engine.ops.kernels import EXPANDED_BYTES
from gllm_engine.ops.prefill_rows import prefill_rows

# Least tokens of a chunk, on average over the tokens of contexts, for which contexts are expanded.
# At DeepSeek's sizes K and V of a token take 2 * 512 * 256 operations per head, and each token that
# attends to it 2 * (192 + 128). In the absorbed form it takes 2 * (576 + 512), estimated to be four
# times as slow: equal for 33 tokens.
_LEAST_TOKENS = 64


@dataclass(frozen=True)
class Expansion:
    """The rows of the expanded form. The memory is for `at_once` of the heads, which divide them
    evenly.
    """

    first: int  # of these rows: first .. rows - 1
    at_once: int


def expansion(batch: Batch, shape: LatentShape, width: int, itemsize: int) -> Expansion | None:
    """None: there are no such rows. `width`: of what the cache holds of a token. `itemsize`: bytes
    of a number of K and V.
    """
    if len(batch.query_lens) == batch.num_decode:
        return None
    rows = prefill_rows(batch, None)
    paged = rows.num_paged
    lens = rows.ends[:paged]
    is_worthwhile = np.dot(rows.query_lens[:paged], lens) >= _LEAST_TOKENS * lens.sum()
    for first in (0, paged) if is_worthwhile else (paged,):
        at_once = _heads_at_once(int(rows.ends[first:].sum()), shape, width, itemsize)
        if at_once:
            return Expansion(batch.num_decode + first, at_once)
    return None


def _heads_at_once(keys: int, shape: LatentShape, width: int, itemsize: int) -> int:
    """0: K and V of `keys` tokens exceed the memory even for one head; or there are no keys."""
    for parts in range(1, shape.heads + 1):
        at_once, rest = divmod(shape.heads, parts)
        numbers = width + at_once * (shape.key_dim + shape.value_dim)
        if keys and not rest and keys * numbers * itemsize <= EXPANDED_BYTES:
            return at_once
    return 0


def places(batch: Batch, rows: slice, page_size: int) -> Tensor:
    """Where the cache holds the tokens of the sequences of some rows, row after row: [tokens], page
    * page_size + offset. The host does not wait.
    """
    lens = batch.context_lens[rows]
    ends = lens.cumsum(0)
    num_tokens = int(batch.context_lens_cpu[rows].sum())
    row = torch.arange(len(lens), device=lens.device)
    row = row.repeat_interleave(lens, output_size=num_tokens)
    position = torch.arange(num_tokens, device=lens.device) - (ends - lens)[row]
    page = batch.page_table[batch.slots[rows][row], position // page_size]
    return page * page_size + position % page_size


def split_memory(memory: Tensor, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Contiguous tensors of these shapes, one after the other in `memory` [numbers]."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    parts = memory[: sum(sizes)].split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
