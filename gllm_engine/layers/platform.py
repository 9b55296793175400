"""What all layers of a decoder compute with: operations, dtype, device and ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gllm_engine.ops import Ops
from gllm_engine.parallel import TensorParallel


@dataclass(frozen=True)
class Platform:
    """`dtype`: of plain weights and biases. `ranks`: those that share the layers."""

    ops: Ops
    dtype: torch.dtype
    device: torch.device
    ranks: TensorParallel

    def empty(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised memory for a weight; None: of the platform's dtype."""
        return torch.empty(size, dtype=dtype or self.dtype, device=self.device)
