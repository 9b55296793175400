"""Grouped-query attention over the paged cache, as a Gqa describes it."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from gllm_engine.layers.linear import Linear
from gllm_engine.layers.step import Norm, Step, Wanted
from gllm_engine.spec.model import Gqa


class GqaAttention:
    """Projects, normalises and rotates heads, writes K and V to the cache, attends, projects."""

    def __init__(
        self,
        spec: Gqa,
        dim: int,
        eps: float,
        ops: ModuleType,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._spec, self._eps, self._ops = spec, eps, ops
        shapes = spec.weights(dim)
        names = [f"self_attn.{part}_proj" for part in "qkv"]
        self._qkv = Linear(names, shapes, ops, dtype, device)
        self._out = Linear(["self_attn.o_proj"], shapes, ops, dtype, device)
        self._heads = spec.heads + 2 * spec.kv_heads
        # One row for each query and key head, so that both are normalised at once.
        self._qk_norm: Tensor | None = None
        if spec.qk_norm:
            size = (spec.heads + spec.kv_heads, spec.head_dim)
            self._qk_norm = torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self,
        x: Tensor,
        norm: Norm | None,
        step: Step,
        cache: Tensor,
        wanted: Wanted | None = None,
        total: Tensor | None = None,
    ) -> Tensor:
        """x: [tokens, dim]. cache: [num_pages, 2, page_size, kv_heads, head_dim].

        Returns [tokens, dim], or that of the `wanted` tokens; added to `total`, in place, if given.
        """
        spec, plan = self._spec, step.plans[self._spec.window]
        heads = self._ops.rotate_and_store(
            self._qkv(x, norm).view(-1, self._heads, spec.head_dim),
            spec.heads,
            self._qk_norm,
            self._eps,
            step.rotations[spec.rope],
            spec.rope.interleaved,
            cache,
            plan,
        )
        if wanted is None:
            attended = self._ops.attend(heads, cache, plan)
        elif wanted.plans:
            attended = self._ops.attend(heads, cache, wanted.plans[spec.window], wanted.index)
        else:
            attended = x.new_empty(0, spec.heads * spec.head_dim)
        return self._out(attended) if total is None else self._out.add_to(total, attended)

    def weights(self) -> dict[str, Tensor]:
        views = self._qkv.weights() | self._out.weights()
        if self._qk_norm is not None:
            q, k = self._qk_norm.split((self._spec.heads, self._spec.kv_heads))
            # [heads, head_dim], where the weight is [head_dim]: copying it in fills every row.
            views |= {"self_attn.q_norm.weight": q, "self_attn.k_norm.weight": k}
        return views
