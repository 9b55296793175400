"""A mixture of experts, described by a Moe: the experts whose weights this rank holds."""

from __future__ import annotations

import torch
from torch import Tensor

from gllm_engine.arch.model import SELECTION_BIAS, Dense, Moe, within
from gllm_engine.layers.dense import DenseFfn
from gllm_engine.layers.linear import Linear
from gllm_engine.layers.platform import Platform
from gllm_engine.layers.stacked_weight import Views, stack_weights
from gllm_engine.ops import Norm


class MoeFfn:
    """Routes tokens over all experts and sums the outputs of this rank's experts.

    A token gets zeros if other ranks hold all of its experts.
    """

    def __init__(self, arch: Moe, dim: int, platform: Platform) -> None:
        self._arch = arch
        self._ops = platform.ops
        shapes = arch.shapes(dim)
        self._router = Linear(["mlp.gate"], shapes, platform, arch.formats)
        self._bias: Tensor | None = None
        if arch.routing.biased:
            self._bias = platform.empty(arch.num_experts, dtype=torch.float32)
        expert = arch.expert
        count = len(arch.experts)
        parts = (["mlp.gate_proj.weight", "mlp.up_proj.weight"], ["mlp.down_proj.weight"])
        self._stacks = [
            stack_weights(names, expert.shapes(dim), expert.formats, platform, count)
            for names in parts
        ]
        self._gate_up, self._down = (stack.value for stack in self._stacks)
        gate_up_bias = platform.empty(count, 2 * arch.hidden)
        down_bias = platform.empty(count, dim)
        self._biases = (gate_up_bias if arch.bias else None, down_bias if arch.out_bias else None)
        self._shared: DenseFfn | None = None
        self._shared_gate: Linear | None = None
        if arch.shared:
            shared = Dense(arch.shared, formats=arch.formats_within("shared_expert"))
            self._shared = DenseFfn(shared, dim, platform)
        if arch.shared_gate:
            gate = ["mlp.shared_expert_gate"]
            self._shared_gate = Linear(gate, shapes, platform, arch.formats)

    def __call__(self, x: Tensor, norm: Norm | None, total: Tensor | None = None) -> Tensor:
        """[tokens, dim] to [tokens, dim]; the result is added to `total`, in place, if given."""
        arch = self._arch
        normed = x if norm is None else self._ops.rms_norm(x, *norm)
        # All that reads x comes before `total` changes, which may be x.
        hidden = None if self._shared is None else self._shared.hidden(normed, None)
        gate = None if self._shared_gate is None else self._shared_gate(normed).sigmoid_()
        weights, experts = self._ops.route(self._router(normed), arch.routing, self._bias)
        out = self._ops.sum_experts(
            normed,
            weights,
            experts,
            self._gate_up,
            self._down,
            first=arch.experts.start,
            num_experts=arch.num_experts,
            total=total,
            on_input=arch.on_input,
            biases=self._biases,
            clamp=arch.clamp,
        )
        if self._shared is None or hidden is None:
            return out
        if gate is None:
            return self._shared.output(hidden, out)
        return out.addcmul_(gate, self._shared.output(hidden))

    def weights(self) -> Views:
        views = self._router.weights()
        if self._bias is not None:
            views[SELECTION_BIAS] = self._bias
        gate_up, down = self._stacks
        gate_up_bias, down_bias = self._biases
        for i, expert in enumerate(self._arch.experts):
            dense = gate_up.views(i) | down.views(i)
            if gate_up_bias is not None:
                parts = gate_up_bias[i].chunk(2)
                dense |= {"mlp.gate_proj.bias": parts[0], "mlp.up_proj.bias": parts[1]}
            if down_bias is not None:
                dense["mlp.down_proj.bias"] = down_bias[i]
            views |= within(f"experts.{expert}", dense)
        if self._shared is not None:
            views |= within("shared_expert", self._shared.weights())
        if self._shared_gate is not None:
            views |= self._shared_gate.weights()
        return views
