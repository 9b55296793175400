"""A mixture of experts, described by a Moe: the experts whose weights this rank holds."""

from __future__ import annotations

import torch
from torch import Tensor

from gllm_engine.arch.model import Dense, Moe, within
from gllm_engine.layers.dense import DenseFfn
from gllm_engine.layers.linear import Linear
from gllm_engine.layers.stacked_weight import StackedWeight, stack_weights
from gllm_engine.ops import Norm, Ops


class MoeFfn:
    """Routes tokens over all experts and sums the outputs of this rank's experts.

    A token gets zeros if other ranks hold all of its experts.
    """

    def __init__(
        self, arch: Moe, dim: int, ops: Ops, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._arch = arch
        self._ops = ops
        shapes = arch.weights(dim)
        self._router = Linear(["mlp.gate"], shapes, ops, dtype, device, arch.formats)
        self._stacks = _stack_experts(arch, dim, dtype, device)
        self._gate_up, self._down = (stack.value for stack in self._stacks)
        self._shared: DenseFfn | None = None
        if arch.shared:
            shared = Dense(arch.shared, formats=arch.formats_within("shared_expert"))
            self._shared = DenseFfn(shared, dim, ops, dtype, device)
            gate = ["mlp.shared_expert_gate"]
            self._shared_gate = Linear(gate, shapes, ops, dtype, device, arch.formats)

    def __call__(self, x: Tensor, norm: Norm | None, total: Tensor | None = None) -> Tensor:
        """[tokens, dim] to [tokens, dim]; the result is added to `total`, in place, if given."""
        normed = x if norm is None else self._ops.rms_norm(x, *norm)
        shared = None if self._shared is None else self._shared(x, norm)  # before x changes
        arch = self._arch
        weights, experts = self._ops.route(self._router(normed), arch.top_k, arch.renorm)
        out = self._ops.sum_experts(
            normed,
            weights,
            experts,
            self._gate_up,
            self._down,
            first=arch.experts.start,
            num_experts=arch.num_experts,
            total=total,
        )
        if shared is not None:
            out.addcmul_(self._shared_gate(normed).sigmoid_(), shared)
        return out

    def weights(self) -> dict[str, Tensor]:
        views = self._router.weights()
        gate_up, down = self._stacks
        for i, expert in enumerate(self._arch.experts):
            views |= within(f"experts.{expert}", gate_up.views(i) | down.views(i))
        if self._shared is not None:
            views |= within("shared_expert", self._shared.weights()) | self._shared_gate.weights()
        return views


def _stack_experts(
    arch: Moe, dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[StackedWeight, StackedWeight]:
    """The memory of gate and up, and of down, of this rank's experts."""
    shapes = Dense(arch.hidden).shapes(dim)
    formats = arch.formats_within("experts")
    gate_up = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    count = len(arch.experts)
    return (
        stack_weights(gate_up, shapes, formats, dtype, device, count),
        stack_weights(["mlp.down_proj.weight"], shapes, formats, dtype, device, count),
    )
