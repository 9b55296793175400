"""The residual stream, and the addition of a layer's output when several ranks share the layer.

Each rank's layer computes a partial output, and the partial outputs are summed over the ranks. If
one kernel does the sum, it also computes the next norm, which saves reading the sum again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from gllm_engine.layers.norm import NormLayer
from gllm_engine.layers.platform import Platform
from gllm_engine.ops import Norm


@dataclass(frozen=True)
class Residual:
    """The residual stream after a layer.

    `total`: [tokens, dim]. `normed`: `total` after the next layer's norm, if the kernel that summed
    the ranks' outputs computed it.
    """

    total: Tensor
    normed: Tensor | None = None

    def up_to(self, count: int) -> Residual:
        """The stream of the first `count` tokens."""
        return Residual(self.total[:count], None if self.normed is None else self.normed[:count])

    def input_for(self, norm: NormLayer | None) -> tuple[Tensor, Norm | None]:
        """The input of a layer that begins with `norm`, and the norm if the layer must compute it.

        None: the layer begins with no norm.
        """
        if norm is None:
            return self.total, None
        return norm.input_of(self.total) if self.normed is None else (self.normed, None)


class ResidualReducer:
    """Adds the outputs of layers to the residual stream, summed over the ranks of the layers."""

    def __init__(self, dim: int, platform: Platform) -> None:
        self._ranks = platform.ranks
        self._one_shot = platform.ops.make_one_shot_allreduce(self._ranks, dim, platform.dtype)

    def __call__(
        self, total: Tensor, layer: Callable[[Tensor | None], Tensor], norm: NormLayer | None
    ) -> Residual:
        """Add a layer's output to the stream `total`, [tokens, dim], in place.

        `layer(into)` returns this rank's partial output, [tokens, dim], or adds it to `into` in
        place. `norm`: the norm at the start of the next layer; None if unknown or absent.
        """
        if self._ranks.size == 1:
            return Residual(layer(total))
        part = layer(None)
        if self._one_shot is not None and self._one_shot.takes(part):
            fused = None if norm is None else norm.fused
            return Residual(total, self._one_shot(part, total, fused))
        total += self._ranks.sum(part)
        return Residual(total)

    def sum(self, part: Tensor) -> Tensor:
        """Sum `part` over all ranks, in place."""
        return self._ranks.sum(part)
