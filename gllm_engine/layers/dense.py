"""The gated feed-forward layer, described by a Dense."""

from __future__ import annotations

import torch
from torch import Tensor

from gllm_engine.arch.model import Dense
from gllm_engine.layers.linear import Linear
from gllm_engine.ops import Norm, Ops


class DenseFfn:
    """down(silu(gate(x)) * up(x)); gate and up are one matrix product."""

    def __init__(
        self, arch: Dense, dim: int, ops: Ops, dtype: torch.dtype, device: torch.device
    ) -> None:
        shapes = arch.weights(dim)
        gate_up = ["mlp.gate_proj", "mlp.up_proj"]
        self._gate_up = Linear(gate_up, shapes, ops, dtype, device, arch.formats)
        self._down = Linear(["mlp.down_proj"], shapes, ops, dtype, device, arch.formats)

    def __call__(self, x: Tensor, norm: Norm | None, total: Tensor | None = None) -> Tensor:
        """[tokens, dim] to [tokens, dim]; the result is added to `total`, in place, if given."""
        x = self._gate_up.gated(x, norm)
        return self._down(x) if total is None else self._down.add_to(total, x)

    def weights(self) -> dict[str, Tensor]:
        return self._gate_up.weights() | self._down.weights()
