"""The ranks that hold a share each of every weight of the same layers.

Each computes with its share; sums and gathers make one result of it, the same on all of them.
Knows tensors and nothing of what they mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class TensorParallel:
    """`size` ranks, this one is number `rank`. With a size of 1 nothing is ever sent."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None
    same_node: bool

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, in its place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def max(self, x: Tensor) -> Tensor:
        """The largest of all ranks' x, number by number, in its place."""
        if self.size > 1:
            dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's x, in the place of this rank's."""
        if self.size > 1:
            dist.broadcast(x, group=self.group, group_src=0)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """[n, width] of each rank to [n, size * width], contiguous: rank after rank in a row."""
        if self.size == 1:
            return x
        parts = list(x.new_empty(self.size, *x.shape))
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, 1)


ALONE = TensorParallel(0, 1, torch.device("cpu"), None, True)
