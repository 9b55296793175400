"""Grouped-query attention over the paged KV cache, described by a Gqa."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from gllm_engine.arch.model import Gqa, Model
from gllm_engine.layers.forward_context import ForwardContext, LogitTokens, PlanKey
from gllm_engine.layers.linear import Linear
from gllm_engine.layers.platform import Platform
from gllm_engine.layers.stacked_weight import Views
from gllm_engine.ops import (
    AttentionInputs,
    AttentionPlan,
    AttentionPlanner,
    Batch,
    HeadNorm,
    Norm,
)


class GqaAttention:
    """Projects, normalises and rotates heads, writes K and V to the cache, attends and projects."""

    def __init__(self, arch: Gqa, group: int, model: Model, platform: Platform) -> None:
        """`group`: the cache group of the layer."""
        self._arch = arch
        self._group = group
        self.plan_key: PlanKey = (group, arch.attention)
        self._ops = platform.ops
        self._ranks = platform.ranks
        shapes = arch.shapes(model.dim)
        names = [f"self_attn.{part}_proj" for part in "qkv"]
        if arch.output_gate:
            names.append("self_attn.gate_proj")
        self._in = Linear(names, shapes, platform, arch.formats)
        out = ["self_attn.o_proj"]
        self._out = Linear(out, shapes, platform, arch.formats)
        self._num_qkv_heads = arch.heads + 2 * arch.kv_heads
        # One row per query and key head, so that one kernel normalises both.
        self._qk_norm: HeadNorm | None = None
        if arch.qk_norm:
            size = (arch.heads + arch.kv_heads, arch.head_dim)
            gain = platform.empty(*size).fill_(1)
            after = arch.qk_norm in ("head_after", "l2_after")
            plus_one = model.norm == "rms_plus_one" and arch.qk_norm != "l2_after"
            self._qk_norm = HeadNorm(gain, model.eps, plus_one, after)
        self._sinks: Tensor | None = None
        if arch.sinks:
            self._sinks = platform.empty(arch.heads)

    def plan(self, planner: AttentionPlanner, batch: Batch, cache: tuple[Tensor]) -> AttentionPlan:
        """Plan a step for all layers with this `plan_key`. `batch`: from Batch.of_group."""
        (pages,) = cache
        return planner.plan(batch, pages, self._arch.attention, self._group)

    def __call__(
        self,
        x: Tensor,
        norm: Norm | None,
        context: ForwardContext,
        cache: tuple[Tensor],
        logit_tokens: LogitTokens | None = None,
        total: Tensor | None = None,
    ) -> Tensor:
        """x: [tokens, dim]. cache: ([num_pages, 2, page_size, kv_heads, head_dim],).

        Returns [tokens, dim], or [n, dim] for the `logit_tokens`. If `total` is given, the result
        is added to it in place.
        """
        arch = self._arch
        (pages,) = cache
        inputs, gate = self._project(x, norm, context, pages)
        attend = partial(self._attend, pages, logit_tokens)
        given = (part for part in inputs if part is not None)
        attended = context.attend(arch.attended_width, attend, *given)
        if gate is not None:
            gate = gate if logit_tokens is None else gate[logit_tokens.index]
            attended *= gate.sigmoid()
        return self._out.add_to(total, attended)

    def _attend(
        self,
        pages: Tensor,
        logit_tokens: LogitTokens | None,
        context: ForwardContext,
        q: Tensor,
        kept: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """`q`, `kept`: of AttentionInputs."""
        tokens = None
        plans = context.plans
        if logit_tokens is not None:
            tokens = logit_tokens.index
            plans = logit_tokens.plans
        if not plans:
            return q.new_empty(0, self._arch.attended_width)
        inputs = AttentionInputs(q, kept)
        return self._ops.attend(inputs, pages, plans[self.plan_key], tokens, self._sinks, out)

    def _project(
        self, x: Tensor, norm: Norm | None, context: ForwardContext, pages: Tensor
    ) -> tuple[AttentionInputs, Tensor | None]:
        """The heads, with K and V in the cache, and the gate of the result if there is one."""
        arch = self._arch
        projected = self._in(x, norm)
        width = self._num_qkv_heads * arch.head_dim
        qkv = projected[:, :width].unflatten(1, (self._num_qkv_heads, arch.head_dim))
        inputs = self._ops.rotate_and_store(
            qkv,
            arch.heads,
            self._norm_of(qkv),
            None if arch.rope is None else context.rotary[arch.rope],
            pages,
            context.plans[self.plan_key],
            None if arch.temperature is None else context.query_scales[arch.temperature],
        )
        return inputs, projected[:, width:] if arch.output_gate else None

    def _norm_of(self, qkv: Tensor) -> HeadNorm | None:
        """With the means, if the norm is of the heads of all ranks."""
        if self._qk_norm is None or self._arch.qk_norm != "whole":
            return self._qk_norm
        # All ranks have equally many heads. If several ranks hold the same K/V head, all K/V heads
        # are held equally often. So the mean of the ranks' means is the mean of the whole.
        means = self._ops.mean_squares(qkv, self._arch.heads)
        return self._qk_norm._replace(means=self._ranks.sum(means) / self._ranks.size)

    def weights(self) -> Views:
        views = self._in.weights() | self._out.weights()
        if self._sinks is not None:
            views["self_attn.sinks"] = self._sinks
        if self._qk_norm is not None and self._arch.qk_norm != "l2_after":
            q, k = self._qk_norm.gain.split((self._arch.heads, self._arch.kv_heads))
            if self._arch.qk_norm == "whole":
                q = q.flatten()
                k = k.flatten()
            # Views of [heads, head_dim] for weights of [head_dim]: loading fills every row.
            views |= {"self_attn.q_norm.weight": q, "self_attn.k_norm.weight": k}
        return views
