"""Collectives among the tensor parallel ranks, each of which holds a shard of the same layers.

Each rank computes with its shard. Sums and gathers combine the results, and all ranks get the same
result. This module does not interpret tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class TensorParallel:
    """A group of `size` ranks, in which this rank has number `rank`. A group of 1 sends nothing."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None
    same_node: bool

    def sum(self, x: Tensor) -> Tensor:
        """Sum x over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def max(self, x: Tensor) -> Tensor:
        """Elementwise maximum of x over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """Overwrite x with rank 0's x."""
        if self.size > 1:
            dist.broadcast(x, group=self.group, group_src=0)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Concatenate every rank's [n, width] along dimension 1: contiguous [n, size * width]."""
        if self.size == 1:
            return x
        parts = list(x.new_empty(self.size, *x.shape))
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, 1)


ALONE = TensorParallel(0, 1, torch.device("cpu"), None, True)
