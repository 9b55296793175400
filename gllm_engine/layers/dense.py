"""The feed-forward layer, described by a Dense."""

from __future__ import annotations

from torch import Tensor

from gllm_engine.arch.model import Dense
from gllm_engine.layers.linear import Linear
from gllm_engine.layers.platform import Platform
from gllm_engine.layers.stacked_weight import Views
from gllm_engine.ops import Norm, Rows


class DenseFfn:
    """down(act(gate(x)) * up(x)) or down(act(up(x))); gate and up are one matrix product."""

    def __init__(self, arch: Dense, dim: int, platform: Platform) -> None:
        self._arch = arch
        self._ops = platform.ops
        shapes = arch.shapes(dim)
        names = ["mlp.gate_proj", "mlp.up_proj"] if arch.gated else ["mlp.up_proj"]
        self._gate_up = Linear(names, shapes, platform, arch.formats)
        self._down = Linear(["mlp.down_proj"], shapes, platform, arch.formats)

    def __call__(self, x: Tensor, norm: Norm | None, total: Tensor | None = None) -> Tensor:
        """[tokens, dim] to [tokens, dim]; the result is added to `total`, in place, if given."""
        return self.output(self.hidden(x, norm), total)

    def hidden(self, x: Tensor, norm: Norm | None) -> Rows:
        """The input of the second product, [tokens, hidden]."""
        then = self._down.only_weight
        if self._arch.gated and self._arch.act == "silu":
            return self._gate_up.gated(x, norm, then)
        return self._ops.activate(self._gate_up(x, norm), self._arch.act, self._arch.gated, then)

    def output(self, hidden: Rows, total: Tensor | None = None) -> Tensor:
        """[tokens, hidden] to [tokens, dim]; the result is added to `total`, in place, if given."""
        return self._down.add_to(total, hidden)

    def weights(self) -> Views:
        return self._gate_up.weights() | self._down.weights()
