"""Grouped-query attention over the paged KV cache, described by a Gqa."""

from __future__ import annotations

import torch
from torch import Tensor

from gllm_engine.arch.model import Gqa
from gllm_engine.layers.forward_context import ForwardContext, LogitTokens
from gllm_engine.layers.linear import Linear
from gllm_engine.ops import Norm, Ops


class GqaAttention:
    """Projects, normalises and rotates heads, writes K and V to the cache, attends and projects."""

    def __init__(
        self,
        arch: Gqa,
        group: int,
        dim: int,
        eps: float,
        ops: Ops,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`group`: the cache group of the layer."""
        self._arch = arch
        self._plan_key = (group, arch.attention)
        self._eps = eps
        self._ops = ops
        shapes = arch.weights(dim)
        names = [f"self_attn.{part}_proj" for part in "qkv"]
        self._qkv = Linear(names, shapes, ops, dtype, device, arch.formats)
        out = ["self_attn.o_proj"]
        self._out = Linear(out, shapes, ops, dtype, device, arch.formats)
        self._num_qkv_heads = arch.heads + 2 * arch.kv_heads
        # One row per query and key head, so that one kernel normalises both.
        self._qk_norm: Tensor | None = None
        if arch.qk_norm:
            size = (arch.heads + arch.kv_heads, arch.head_dim)
            self._qk_norm = torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self,
        x: Tensor,
        norm: Norm | None,
        context: ForwardContext,
        cache: Tensor,
        logit_tokens: LogitTokens | None = None,
        total: Tensor | None = None,
    ) -> Tensor:
        """x: [tokens, dim]. cache: [num_pages, 2, page_size, kv_heads, head_dim].

        Returns [tokens, dim], or [n, dim] for the `logit_tokens`. If `total` is given, the result
        is added to it in place.
        """
        arch = self._arch
        plan = context.plans[self._plan_key]
        inputs = self._ops.rotate_and_store(
            self._qkv(x, norm).view(-1, self._num_qkv_heads, arch.head_dim),
            arch.heads,
            self._qk_norm,
            self._eps,
            context.rotary[arch.rope],
            arch.rope.interleaved,
            cache,
            plan,
        )
        if logit_tokens is None:
            attended = self._ops.attend(inputs, cache, plan)
        elif logit_tokens.plans:
            plan = logit_tokens.plans[self._plan_key]
            attended = self._ops.attend(inputs, cache, plan, logit_tokens.index)
        else:
            attended = x.new_empty(0, arch.heads * arch.head_dim)
        return self._out(attended) if total is None else self._out.add_to(total, attended)

    def weights(self) -> dict[str, Tensor]:
        views = self._qkv.weights() | self._out.weights()
        if self._qk_norm is not None:
            q, k = self._qk_norm.split((self._arch.heads, self._arch.kv_heads))
            # Views of [heads, head_dim] for weights of [head_dim]: loading fills every row.
            views |= {"self_attn.q_norm.weight": q, "self_attn.k_norm.weight": k}
        return views
