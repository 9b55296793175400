"""Linear attention with the gated delta rule, described by a GatedDelta."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from gllm_engine.arch.model import GatedDelta, Model
from gllm_engine.layers.forward_context import ForwardContext, LogitTokens, PlanKey
from gllm_engine.layers.linear import Linear
from gllm_engine.layers.platform import Platform
from gllm_engine.layers.stacked_weight import Views
from gllm_engine.ops import AttentionPlan, AttentionPlanner, Batch, Norm, RecurrentState

_PARTS = ("q", "k", "v")


class GatedDeltaAttention:
    """Projects, convolves, updates each sequence's state, and projects the gated result."""

    def __init__(self, arch: GatedDelta, group: int, model: Model, platform: Platform) -> None:
        """`group`: the cache group of the layer, which has a state and no pages."""
        self._arch = arch
        self._eps = model.eps  # of the norm of the result, which is of each head, and plain
        self._ops = platform.ops
        self.plan_key: PlanKey = (group, arch.attention)
        shapes = arch.shapes(model.dim)
        names = [f"linear_attn.in_proj_{part}" for part in (*_PARTS, "z", "b", "a")]
        self._in = Linear(names, shapes, platform, arch.formats)
        out = ["linear_attn.out_proj"]
        self._out = Linear(out, shapes, platform, arch.formats)
        self._conv = platform.empty(arch.conv_width, arch.conv)
        self._gain = platform.empty(arch.v_dim)
        # Of the decay, in float32: exp(-exp(A_log)) is 1 for small numbers in other dtypes.
        self._a_log = platform.empty(arch.v_heads, dtype=torch.float32)
        self._dt_bias = platform.empty(arch.v_heads, dtype=torch.float32)

    def plan(self, planner: AttentionPlanner, batch: Batch, cache: RecurrentState) -> AttentionPlan:
        """Plan a step for all layers with this `plan_key`."""
        del cache
        return planner.plan_recurrent(batch)

    def __call__(
        self,
        x: Tensor,
        norm: Norm | None,
        context: ForwardContext,
        cache: RecurrentState,
        logit_tokens: LogitTokens | None = None,
        total: Tensor | None = None,
    ) -> Tensor:
        """x: [tokens, dim]. cache: the states of all slots.

        Returns [tokens, dim], or [n, dim] for the `logit_tokens`. If `total` is given, the result
        is added to it in place.
        """
        arch = self._arch
        widths = (arch.conv_width, arch.v_heads * arch.v_dim, arch.v_heads, arch.v_heads)
        qkv, z, b, a = self._in(x, norm).split(widths, 1)
        o = context.attend(arch.attended_width, partial(self._update, cache), qkv, b, a)
        if logit_tokens is not None:
            o = o[logit_tokens.index]
            z = z[logit_tokens.index]
        o, z = (each.unflatten(1, (arch.v_heads, arch.v_dim)) for each in (o, z))
        gated = self._ops.gated_norm(o, self._gain, self._eps, z)
        values = gated.flatten(1)
        return self._out.add_to(total, values)

    def _update(
        self,
        state: RecurrentState,
        context: ForwardContext,
        qkv: Tensor,
        b: Tensor,
        a: Tensor,
        out: Tensor | None = None,
    ) -> Tensor:
        """Update the states: [tokens, v_heads * v_dim]."""
        plan = context.plans[self.plan_key]
        weights = (self._conv, self._a_log, self._dt_bias)
        return self._ops.gated_delta(qkv, b, a, *weights, state, plan, out).flatten(1)

    def weights(self) -> Views:
        arch = self._arch
        k = arch.k_heads * arch.k_dim
        convs = self._conv[:, None].split((k, k, arch.v_heads * arch.v_dim))
        views = self._in.weights() | self._out.weights()
        views |= {
            f"linear_attn.conv_{part}.weight": conv
            for part, conv in zip(_PARTS, convs, strict=True)
        }
        views["linear_attn.norm.weight"] = self._gain
        views["linear_attn.A_log"] = self._a_log
        views["linear_attn.dt_bias"] = self._dt_bias
        return views
