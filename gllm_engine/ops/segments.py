"""Attention within segments of a sequence, without a cache: of vision towers.

On a GPU torch's kernel for segments of any lengths is used, if this torch has it. Else segments of
one length, one after the other, are a batch of scaled_dot_product_attention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import accumulate, groupby

import torch
import torch.nn.functional as F
from torch import Tensor


@cache
def _varlen_attn() -> Callable[..., object] | None:
    """Imported when it is needed: torch's compiler comes with it, and takes a second."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return None
    return varlen_attn


class Segments:
    """Runs of consecutive tokens. A token attends to all tokens of its run."""

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self._lengths = lengths
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        self._starts = starts.to(device, non_blocking=True)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[tokens, heads, dim], as q, k and v."""
        is_half = q.dtype in (torch.float16, torch.bfloat16)
        attend = _varlen_attn() if q.is_cuda and is_half else None
        if attend is not None:
            longest = max(self._lengths)
            found = attend(q, k, v, self._starts, self._starts, longest, longest)
            assert isinstance(found, Tensor)
            return found
        if q.is_meta:
            return torch.empty_like(q)  # a GPU's kernels keep no scores
        parts = []
        at = 0
        for length, run in groupby(self._lengths):
            count = len(list(run))
            here = slice(at, at + count * length)
            batch = (x[here].unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
            parts.append(F.scaled_dot_product_attention(*batch).transpose(1, 2).flatten(0, 1))
            at = here.stop
        return torch.cat(parts)
