"""Attention within segments of a sequence, without a cache: of vision towers.

On a GPU torch's kernel for segments of any lengths is used, if this torch has it. Else segments of
one length, one after the other, are a batch of scaled_dot_product_attention. An implementation of
`Ops` may have a kernel for long segments.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import accumulate, groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from gllm_engine.attention_shape import AttentionShape

# Attention of q, k and v, [tokens, heads, dim]; so is the result.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# Tokens of a segment from which on the kernel for long ones is faster, the padding included.
_LONG = 512


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


class _PaddedHeads:
    """Attention of heads that are padded with zeros, as a kernel needs them."""

    def __init__(self, attend: Attend, width: int) -> None:
        """`attend`: of heads of `width` channels."""
        self._attend = attend
        self._width = width
        self._padded: Tensor | None = None  # q, k and v of a layer

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens, heads, dim = q.shape
        if dim == self._width:
            return self._attend(q, k, v)
        if self._padded is None:
            self._padded = q.new_zeros(3, tokens, heads, self._width)
        for there, x in zip(self._padded[..., :dim], (q, k, v), strict=True):
            there.copy_(x)
        return self._attend(self._padded[0], self._padded[1], self._padded[2])[..., :dim]


class SegmentPlanner:
    """Plans attention within the segments of one pass after another."""

    def __init__(
        self,
        device: torch.device,
        shape: AttentionShape | None = None,
        plan_long: Callable[[list[int]], Attend] | None = None,
    ) -> None:
        """`plan_long`: of a kernel for heads of `shape`, which may be wider than what it is given;
        None: there is no such kernel.
        """
        self._device = device
        self.shape = shape
        self._plan_long = plan_long

    def __call__(self, lengths: list[int]) -> Attend:
        """Of segments of so many tokens; valid until the next call."""
        if self.shape is None or self._plan_long is None or max(lengths) < _LONG:
            return Segments(lengths, self._device).attend
        return _PaddedHeads(self._plan_long(lengths), self.shape.head_dim)
