"""The residual stream, and how what a layer gives is added to it where several ranks share a layer.

Each rank's layers give a part of what is to be added; the parts are summed on the way. With the
sum, where it is one kernel, comes the norm that follows, which would read it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gllm_engine.ops import Norm, Ops
from gllm_engine.parallel import TensorParallel


@dataclass(frozen=True)
class Residual:
    """The stream after a layer.

    `total`: [tokens, dim]. `normed`: the same after the norm of the layer that follows, where the
    kernel that summed the ranks' parts did that too.
    """

    total: Tensor
    normed: Tensor | None = None

    def input_for(self, norm: Norm) -> tuple[Tensor, Norm | None]:
        """The input of a layer that begins with `norm`, and the norm that it still has to do."""
        return (self.total, norm) if self.normed is None else (self.normed, None)


class ResidualReducer:
    """Adds layers' results to the residual stream, over the ranks that share the layers."""

    def __init__(self, ops: Ops, ranks: TensorParallel, dim: int, dtype: torch.dtype) -> None:
        self._ranks = ranks
        self._one_shot = ops.make_one_shot_allreduce(ranks, dim, dtype)

    def __call__(
        self, total: Tensor, layer: Callable[[Tensor | None], Tensor], norm: Norm | None
    ) -> Residual:
        """The stream `total`, which is written to, with a layer's result added to it.

        `layer(into)` gives this rank's part, [tokens, dim], or adds it to `into`, in place. `norm`:
        with which the layer that follows begins; None: it is not known, or there is none.
        """
        if self._ranks.size == 1:
            return Residual(layer(total))
        part = layer(None)
        if self._one_shot is not None and self._one_shot.takes(part):
            return Residual(total, self._one_shot(part, total, norm))
        total += self._ranks.sum(part)
        return Residual(total)

    def sum(self, part: Tensor) -> Tensor:
        """All ranks' parts, summed in the memory of this one's."""
        return self._ranks.sum(part)
