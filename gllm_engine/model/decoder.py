"""One decoder interprets every spec.

Owns the order of layers and norms and the residual stream. Knows no family, no checkpoint and no
scheduling: it is told which tokens stand where in the cache.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gllm_engine.layers import DenseFfn, GqaAttention, MoeFfn, RopeTable, Step, Wanted
from gllm_engine.ops import Batch, select_ops
from gllm_engine.spec.model import Dense, Layer, Model, Moe, SandwichLayer
from gllm_engine.spec.rope import Rope


class PreNormBlock:
    """Interprets Layer. A block adds to the residual stream in place."""

    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")

    def __init__(
        self, spec: Layer, model: Model, ops: ModuleType, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._ops = ops
        self._mixer = GqaAttention(spec.mixer, model.dim, model.eps, ops, dtype, device)
        self._ffn = _FFNS[type(spec.ffn)](spec.ffn, model.dim, ops, dtype, device)
        gains = {n: torch.empty(model.dim, dtype=dtype, device=device) for n in self.norms}
        self._norms = {name: (gain, model.eps) for name, gain in gains.items()}

    def __call__(
        self, x: Tensor, step: Step, cache: Tensor, wanted: Wanted | None = None
    ) -> Tensor:
        """x: [tokens, dim]. Returns it, or new memory with the `wanted` tokens' alone."""
        norms, total = self._norms, x if wanted is None else x[wanted.index]
        total = self._mixer(x, norms["input_layernorm"], step, cache, wanted, total)
        return self._ffn(total, norms["post_attention_layernorm"], total)

    def prepare(self) -> None:
        """On a GPU: compile what no step of a few tokens would."""
        if isinstance(self._ffn, MoeFfn):
            self._ffn.prepare(self._norms["post_attention_layernorm"])

    def weights(self) -> dict[str, Tensor]:
        gains = {f"{name}.weight": gain for name, (gain, _) in self._norms.items()}
        return gains | self._mixer.weights() | self._ffn.weights()


class SandwichBlock(PreNormBlock):
    """Interprets SandwichLayer: what is added goes through a norm first."""

    norms = (*PreNormBlock.norms, "post_self_attn_layernorm", "post_mlp_layernorm")

    def __call__(
        self, x: Tensor, step: Step, cache: Tensor, wanted: Wanted | None = None
    ) -> Tensor:
        norms, total = self._norms, x if wanted is None else x[wanted.index]
        x = self._mixer(x, norms["input_layernorm"], step, cache, wanted)
        total = self._ops.rms_norm(x, *norms["post_self_attn_layernorm"], add_to=total)
        x = self._ffn(total, norms["post_attention_layernorm"])
        return self._ops.rms_norm(x, *norms["post_mlp_layernorm"], add_to=total)


_FFNS: dict[type, type[DenseFfn] | type[MoeFfn]] = {Dense: DenseFfn, Moe: MoeFfn}
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

    def prepare(self, page_size: int, dtype: torch.dtype) -> None:
        """On a GPU: compile what attention over such a cache, and experts, need, unless that is
        done already.
        """
        self.ops.prepare(self.new_cache(1, page_size, dtype)[0], self.dtype, self._windows)
        kinds = zip((layer.ffn for layer in self.spec.layers), self._blocks, strict=True)
        for block in dict(kinds).values():
            block.prepare()

    def forward(self, batch: Batch, cache: list[Tensor]) -> Tensor:
        """Write the batch's K and V to the cache and give the last layer's residual stream,
        [n, dim], of the tokens at `batch.logit_index`. A batch of nothing but decode rows may be
        recorded in a CUDA graph.
        """
        plans = {w: self._planner.plan(batch, cache[0], h, w) for w, h in self._windows.items()}
        step = Step(plans, self._rotations(batch))
        x = F.embedding(batch.tokens, self._embedding)
        for block, layer_cache in zip(self._blocks[:-1], cache, strict=False):
            x = block(x, step, layer_cache)
        wanted = self._wanted(batch, cache[-1])
        x = self._blocks[-1](x, step, cache[-1], wanted)
        return x if wanted or batch.logit_index is None else x[batch.logit_index]

    def _wanted(self, batch: Batch, cache: Tensor) -> Wanted | None:
        """The last tokens of the rows whose logits are asked for; None if other tokens' are too,
        or every token's. To attention, such a token is a decode row.
        """
        rows = batch.logit_rows_cpu
        if rows is None:
            return None
        if not len(rows):
            return Wanted(batch.logit_index, {})
        ends = replace(
            batch,
            slots=batch.slots[batch.logit_rows],
            context_lens=batch.context_lens[batch.logit_rows],
            context_lens_cpu=batch.context_lens_cpu[rows],
            query_lens=[1] * len(rows),
            num_decode=len(rows),
        )
        window = self.spec.layers[-1].mixer.window
        plan = self._planner.plan(ends, cache, self._windows[window], window)
        return Wanted(batch.logit_index, {window: plan})

    def scores(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """What `forward` gave, [n, dim], to [n, vocab] logits in the model's dtype; into `out` if
        given.
        """
        return self.ops.linear(hidden, self._head, None, (self._norm, self.spec.eps), out)

    def logits(self, hidden: Tensor) -> Tensor:
        """What `forward` gave, [n, dim], to [n, vocab] logits in float32."""
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
