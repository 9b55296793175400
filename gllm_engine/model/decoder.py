"""One decoder interprets every spec.

Owns the order of layers and norms and the residual stream. Knows no family, no checkpoint and no
scheduling: it is told which tokens stand where in the cache.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gllm_engine.layers import DenseFfn, GqaAttention, RopeTable, Step
from gllm_engine.ops import Batch, HostInts, select_ops
from gllm_engine.spec.model import Layer, Model, SandwichLayer
from gllm_engine.spec.rope import Rope


class PreNormBlock:
    """Interprets Layer.

    A block takes and gives the residual stream as two terms, what the last block added and what
    was there before, so that each addition is fused with the norm that follows it.
    """

    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")

    def __init__(
        self, spec: Layer, model: Model, ops: ModuleType, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._ops, self._eps = ops, model.eps
        self._mixer = GqaAttention(spec.mixer, model.dim, model.eps, ops, dtype, device)
        self._ffn = DenseFfn(spec.ffn, model.dim, ops, dtype, device)
        self._norms = {n: torch.empty(model.dim, dtype=dtype, device=device) for n in self.norms}

    def __call__(
        self, added: Tensor | None, residual: Tensor, step: Step, cache: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, residual = self._norm("input_layernorm", added, residual)
        x = self._mix(x, step, cache)
        x, residual = self._norm("post_attention_layernorm", x, residual)
        return self._feed(x), residual

    def _mix(self, x: Tensor, step: Step, cache: Tensor) -> Tensor:
        return self._mixer(x, step, cache)

    def _feed(self, x: Tensor) -> Tensor:
        return self._ffn(x)

    def _norm(self, name: str, added: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
        if added is None:  # the embedding, before any block
            return self._ops.rms_norm(residual, self._norms[name], self._eps), residual
        return self._ops.add_rms_norm(added, residual, self._norms[name], self._eps)

    def weights(self) -> dict[str, Tensor]:
        norms = {f"{name}.weight": tensor for name, tensor in self._norms.items()}
        return norms | self._mixer.weights() | self._ffn.weights()


class SandwichBlock(PreNormBlock):
    """Interprets SandwichLayer."""

    norms = (*PreNormBlock.norms, "post_self_attn_layernorm", "post_mlp_layernorm")

    def _mix(self, x: Tensor, step: Step, cache: Tensor) -> Tensor:
        x = super()._mix(x, step, cache)
        return self._ops.rms_norm(x, self._norms["post_self_attn_layernorm"], self._eps)

    def _feed(self, x: Tensor) -> Tensor:
        x = super()._feed(x)
        return self._ops.rms_norm(x, self._norms["post_mlp_layernorm"], self._eps)


_BLOCKS: dict[type[Layer], type[PreNormBlock]] = {
    Layer: PreNormBlock,
    SandwichLayer: SandwichBlock,
}


class Decoder:
    """A model whose weights are still to be filled in (load.py); `weights()` says where."""

    def __init__(
        self, spec: Model, *, dtype: torch.dtype, device: torch.device, max_model_len: int
    ) -> None:
        """`max_model_len`: no position reaches it. Dynamic RoPE scaling depends on it."""
        self.spec, self.dtype, self.device = spec, dtype, device
        self.ops = select_ops(device)
        self._planner = self.ops.Planner(device, dtype)
        self._blocks = [
            _BLOCKS[type(layer)](layer, spec, self.ops, dtype, device) for layer in spec.layers
        ]
        self._embedding = torch.empty(spec.vocab, spec.dim, dtype=dtype, device=device)
        self._norm = torch.empty(spec.dim, dtype=dtype, device=device)
        self._head = self._embedding if spec.tie else torch.empty_like(self._embedding)
        ropes = dict.fromkeys(layer.mixer.rope for layer in spec.layers)
        self._ropes = {rope: RopeTable(rope, max_model_len, device) for rope in ropes}
        # Heads are told once for each window: layers that share it are planned as one.
        self._windows = {layer.mixer.window: layer.mixer.heads for layer in spec.layers}

    def new_cache(
        self, num_pages: int, page_size: int, dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        """One [num_pages, 2, page_size, kv_heads, head_dim] a layer (0: K, 1: V), not cleared.

        `dtype`: the model's, which is the default, or float8_e4m3fn.
        """
        return [
            torch.empty(
                (num_pages, 2, page_size, layer.mixer.kv_heads, layer.mixer.head_dim),
                dtype=dtype or self.dtype,
                device=self.device,
            )
            for layer in self.spec.layers
        ]

    def plan(self, batch: Batch, cache: list[Tensor]) -> dict[int | None, Any]:
        """What `forward` needs to know of the batch beforehand: attention's plan by window."""
        return {
            window: self._planner.plan(batch, cache[0], heads, window)
            for window, heads in self._windows.items()
        }

    def has_fixed_plans(self, cache: list[Tensor]) -> bool:
        """Whether attention over such a cache can be in a CUDA graph."""
        return self._planner.has_fixed(cache[0])

    def fixed_plans(self, num_rows: int, max_pages: int) -> dict[int | None, Any]:
        """Attention of decode steps of always `num_rows` rows, by window, for a CUDA graph."""
        return {w: self._planner.fixed(num_rows, max_pages, w) for w in self._windows}

    def refresh(
        self, plans: dict[int | None, Any], context_lens: HostInts, cache: list[Tensor]
    ) -> None:
        """Prepare what `fixed_plans` gave for the next step, whose rows are so long after it."""
        for window, plan in plans.items():
            plan.refresh(context_lens, cache[0], self._windows[window])

    def forward(
        self, batch: Batch, cache: list[Tensor], plans: dict[int | None, Any] | None = None
    ) -> Tensor:
        """Write the batch's K and V to the cache and give the final normed hidden states, [n, dim],
        of the tokens at `batch.logit_index`. `plans`: what `plan` made of this batch.
        """
        step = Step(self.plan(batch, cache) if plans is None else plans, self._rotations(batch))
        residual, added = F.embedding(batch.tokens, self._embedding), None
        for block, layer_cache in zip(self._blocks, cache, strict=True):
            added, residual = block(added, residual, step, layer_cache)
        assert added is not None  # there is at least one layer
        if batch.logit_index is not None:
            added, residual = added[batch.logit_index], residual[batch.logit_index]
        return self.ops.add_rms_norm(added, residual, self._norm, self.spec.eps)[0]

    def scores(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[n, dim] hidden states to [n, vocab] logits in the model's dtype, into `out` if given."""
        if out is None:
            return F.linear(hidden, self._head)
        return torch.mm(hidden, self._head.T, out=out)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, dim] hidden states to [n, vocab] float32."""
        return self.scores(hidden).float()

    def weights(self) -> dict[str, Tensor]:
        """Canonical weight name -> the tensor (often a view) to copy it into.

        A view may have a leading dimension more than the weight: copying broadcasts over it.
        """
        views = {"model.embed_tokens.weight": self._embedding, "model.norm.weight": self._norm}
        for i, block in enumerate(self._blocks):
            views |= {f"model.layers.{i}.{name}": view for name, view in block.weights().items()}
        return views if self.spec.tie else views | {"lm_head.weight": self._head}

    def _rotations(self, batch: Batch) -> dict[Rope, Any]:
        return {
            rope: self.ops.rotation(
                table.cos, table.sin, batch.positions, self.dtype, rope.interleaved
            )
            for rope, table in self._ropes.items()
        }
