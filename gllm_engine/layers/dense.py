"""The gated feed-forward layer, as a Dense describes it."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from gllm_engine.layers.linear import Linear
from gllm_engine.spec.model import Dense


class DenseFfn:
    """down(silu(gate(x)) * up(x)), gate and up in one product."""

    def __init__(
        self, spec: Dense, dim: int, ops: ModuleType, dtype: torch.dtype, device: torch.device
    ) -> None:
        shapes = spec.weights(dim)
        self._ops = ops
        self._gate_up = Linear(["mlp.gate_proj", "mlp.up_proj"], shapes, dtype, device)
        self._down = Linear(["mlp.down_proj"], shapes, dtype, device)

    def __call__(self, x: Tensor) -> Tensor:
        """[tokens, dim] to [tokens, dim]."""
        return self._down(self._ops.silu_mul(self._gate_up(x)))

    def weights(self) -> dict[str, Tensor]:
        return self._gate_up.weights() | self._down.weights()
