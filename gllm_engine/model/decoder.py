"""The decoder: interprets any architecture, or the shard of it that one rank holds.

This module owns the order of layers and norms, and the residual stream. It knows no family, no
checkpoint and no scheduling; a Batch gives the tokens and their positions in the KV cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gllm_engine.arch.cache import cache_groups
from gllm_engine.arch.model import (
    AttentionShape,
    Dense,
    GatedDelta,
    Gqa,
    Layer,
    Mla,
    Model,
    Moe,
    SandwichLayer,
)
from gllm_engine.arch.rope import Rope
from gllm_engine.arch.shard import Shard
from gllm_engine.layers import (
    DenseFfn,
    ForwardContext,
    GatedDeltaAttention,
    GqaAttention,
    LogitTokens,
    Mixer,
    MlaAttention,
    MoeFfn,
    PlanKey,
    Residual,
    ResidualReducer,
    RopeTable,
)
from gllm_engine.ops import (
    AttentionPlan,
    Batch,
    Norm,
    Ops,
    PlainSampling,
    RecurrentState,
    RotaryInputs,
    select_ops,
)
from gllm_engine.parallel import ALONE, TensorParallel


def _make_ffn(
    arch: Dense | Moe, dim: int, ops: Ops, dtype: torch.dtype, device: torch.device
) -> DenseFfn | MoeFfn:
    if isinstance(arch, Moe):
        return MoeFfn(arch, dim, ops, dtype, device)
    return DenseFfn(arch, dim, ops, dtype, device)


_MIXERS: dict[type[Any], Callable[..., Mixer]] = {
    Gqa: GqaAttention,
    Mla: MlaAttention,
    GatedDelta: GatedDeltaAttention,
}
# Of one layer: K and V or latents by pages, or the states of all slots.
LayerCache = Tensor | RecurrentState
_ALIGNMENT = 16  # bytes, of each part of a state
# The group of layers that keep a state.
_NO_GROUP = -1


class PreNormBlock:
    """Computes a Layer. A block adds to the residual stream in place."""

    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")

    def __init__(
        self,
        arch: Layer,
        group: int,
        model: Model,
        ops: Ops,
        dtype: torch.dtype,
        device: torch.device,
        reduce: ResidualReducer,
    ) -> None:
        """`group`: the cache group of the layer."""
        self._ops = ops
        self._reduce = reduce
        make_mixer = _MIXERS[type(arch.mixer)]
        self.mixer: Mixer = make_mixer(arch.mixer, group, model.dim, model.eps, ops, dtype, device)
        self._ffn = _make_ffn(arch.ffn, model.dim, ops, dtype, device)
        gains = {n: torch.empty(model.dim, dtype=dtype, device=device) for n in self.norms}
        self._norms = {name: (gain, model.eps) for name, gain in gains.items()}
        self.next_norm: Norm | None = None  # the first norm of the next block, if any

    @property
    def first_norm(self) -> Norm:
        return self._norms["input_layernorm"]

    def __call__(
        self,
        stream: Residual,
        context: ForwardContext,
        cache: LayerCache,
        logit_tokens: LogitTokens | None = None,
    ) -> Residual:
        """stream: [tokens, dim]. Returns it, or a new stream of the `logit_tokens` only."""
        total = stream.total if logit_tokens is None else stream.total[logit_tokens.index]
        x, norm = stream.input_for(self.first_norm)
        second = self._norms["post_attention_layernorm"]
        stream = self._reduce(
            total, lambda into: self.mixer(x, norm, context, cache, logit_tokens, into), second
        )
        y, ffn_norm = stream.input_for(second)
        return self._reduce(stream.total, lambda into: self._ffn(y, ffn_norm, into), self.next_norm)

    def weights(self) -> dict[str, Tensor]:
        gains = {f"{name}.weight": gain for name, (gain, _) in self._norms.items()}
        return gains | self.mixer.weights() | self._ffn.weights()


class SandwichBlock(PreNormBlock):
    """Computes a SandwichLayer: outputs are normalised before they are added to the stream."""

    norms = (*PreNormBlock.norms, "post_self_attn_layernorm", "post_mlp_layernorm")

    def __call__(
        self,
        stream: Residual,
        context: ForwardContext,
        cache: LayerCache,
        logit_tokens: LogitTokens | None = None,
    ) -> Residual:
        norms = self._norms
        x = stream.total
        total = x if logit_tokens is None else x[logit_tokens.index]
        x = self._reduce.sum(self.mixer(x, self.first_norm, context, cache, logit_tokens))
        total = self._ops.rms_norm(x, *norms["post_self_attn_layernorm"], add_to=total)
        x = self._reduce.sum(self._ffn(total, norms["post_attention_layernorm"]))
        return Residual(self._ops.rms_norm(x, *norms["post_mlp_layernorm"], add_to=total))


_BLOCKS: dict[type[Layer], type[PreNormBlock]] = {
    Layer: PreNormBlock,
    SandwichLayer: SandwichBlock,
}


class States:
    """The states of all layers that keep one per sequence.

    `flat`: [rows, bytes], so that one copy moves the state of a sequence. `layers`: index of the
    layer -> its part of every row.
    """

    def __init__(
        self, layers: Sequence[Layer], rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """`dtype`: of the convolution's inputs."""
        parts: list[tuple[int, torch.dtype, tuple[int, ...]]] = []
        for i, layer in enumerate(layers):
            for kind, shape in zip((torch.float32, dtype), layer.mixer.state_shapes, strict=False):
                parts.append((i, kind, shape))
        sizes = [
            -(-prod(shape) * kind.itemsize // _ALIGNMENT) * _ALIGNMENT for _, kind, shape in parts
        ]
        self.flat = torch.zeros(rows, sum(sizes), dtype=torch.uint8, device=device)
        views: dict[int, list[Tensor]] = {}
        for (i, kind, shape), columns in zip(parts, self.flat.split(sizes, 1), strict=True):
            used = columns[:, : prod(shape) * kind.itemsize]
            views.setdefault(i, []).append(used.view(kind).unflatten(1, shape))
        self.layers = {i: RecurrentState(conv, matrix) for i, (matrix, conv) in views.items()}

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copy rows to other rows."""
        self.flat.index_copy_(0, targets, self.flat[sources])

    def clear(self, rows: Tensor) -> None:
        """Set rows to zero."""
        self.flat.index_fill_(0, rows, 0)


class _Buffer(NamedTuple):
    """Memory of the cache for the layer at `place` of each group, `width` numbers per token."""

    place: int
    width: int


class Decoder:
    """A model whose weights are not yet loaded; load.py fills the tensors of `weights()`.

    `layers`: the layers that this rank computes. `groups`: the cache groups of the whole model.
    """

    def __init__(
        self,
        arch: Model,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_model_len: int,
        shard: Shard | None = None,
        ranks: TensorParallel = ALONE,
    ) -> None:
        """`max_model_len`: all positions are smaller. Dynamic RoPE scaling depends on it, and which
        windows matter.

        `shard`: this rank's shard (default: everything). `ranks`: the ranks that share its layers.
        """
        self.arch = arch
        self.dtype = dtype
        self.device = device
        self.shard = shard or Shard(0, len(arch.layers))
        self.layers = self.shard.of(arch)
        self.is_first = self.shard.first == 0
        self.is_last = self.shard.end == len(arch.layers)
        self.ops = select_ops(device)
        self._ranks = ranks
        self._planner = self.ops.make_planner(device, dtype)
        self.groups = cache_groups(arch, max_model_len)
        self._group_of = [
            next((n for n, group in enumerate(self.groups) if i in group.layers), _NO_GROUP)
            for i in range(self.shard.first, self.shard.end)
        ]
        reduce = ResidualReducer(self.ops, ranks, arch.dim, dtype)
        self._blocks = [
            _BLOCKS[type(layer)](layer, group, arch, self.ops, dtype, device, reduce)
            for layer, group in zip(self.layers, self._group_of, strict=True)
        ]
        for block, after in pairwise(self._blocks):
            block.next_norm = after.first_norm
        self._outer_weights = {
            name: torch.empty(shape, dtype=dtype, device=device)
            for name, shape in self.shard.weights(arch).items()
            if not name.startswith("model.layers.")
        }
        ropes = dict.fromkeys(
            layer.mixer.rope for layer in self.layers if not isinstance(layer.mixer, GatedDelta)
        )
        self._ropes = {rope: RopeTable(rope, max_model_len, device) for rope in ropes}
        # The first of the layers that share a plan.
        self._planned: dict[PlanKey, int] = {}
        for i, block in enumerate(self._blocks):
            self._planned.setdefault(block.mixer.plan_key, i)

    @property
    def _embedding(self) -> Tensor:
        return self._outer_weights["model.embed_tokens.weight"]

    @property
    def _head(self) -> Tensor:
        return self._embedding if self.arch.tie else self._outer_weights["lm_head.weight"]

    def new_cache(
        self,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype | None = None,
        states: States | None = None,
    ) -> list[LayerCache]:
        """An uninitialised tensor [num_pages, *mixer.cache_shape(page_size)] per layer.

        `dtype`: the model's dtype (default) or float8_e4m3fn. The n-th layers of all groups have
        the same memory, because a page belongs to one group at a time. `states`: from new_states,
        for the layers that keep a state per sequence.
        """
        memory = {
            buffer: torch.empty(
                num_pages, buffer.width * page_size, dtype=dtype or self.dtype, device=self.device
            )
            for buffer in dict.fromkeys(self._buffers())
        }
        cache: list[LayerCache] = []
        for i, (buffer, layer) in enumerate(zip(self._buffers(), self.layers, strict=True)):
            if states is not None and i in states.layers:
                cache.append(states.layers[i])
            else:
                cache.append(memory[buffer].view(num_pages, *layer.mixer.cache_shape(page_size)))
        return cache

    def new_states(self, rows: int) -> States:
        """The states of `rows` slots and snapshots, all zero."""
        return States(self.layers, rows, self.dtype, self.device)

    def page_bytes(self, page_size: int, dtype: torch.dtype) -> int:
        """Bytes of one page of `page_size` tokens in a cache of `dtype`."""
        width = sum(buffer.width for buffer in set(self._buffers()))
        return width * page_size * dtype.itemsize

    def _buffers(self) -> list[_Buffer]:
        """The memory of each layer. Layers of different widths never share memory."""
        counts: Counter[tuple[int, int]] = Counter()
        buffers = []
        for layer, group in zip(self.layers, self._group_of, strict=True):
            width = prod(layer.mixer.cache_shape(1))
            buffers.append(_Buffer(counts[group, width], width))
            counts[group, width] += 1
        return buffers

    def compile_kernels(self, page_size: int, dtype: torch.dtype) -> None:
        """Compile the kernels for attention over such a cache, unless they are compiled already."""
        cache = self.new_cache(1, page_size, dtype)
        kinds = []
        for (_, shape), i in self._planned.items():
            pages = cache[i]
            # Latent and linear attention have kernels of our own.
            if isinstance(shape, AttentionShape) and isinstance(pages, Tensor):
                kinds.append((pages, shape.heads, shape.window))
        self.ops.compile_attention(kinds, self.dtype)

    def forward(self, batch: Batch, cache: list[LayerCache], x: Tensor | None = None) -> Tensor:
        """Write the batch's K and V to the cache and return the residual stream after the layers.

        The last stage returns [n, dim] for the tokens at `batch.logit_index`; other stages return
        [tokens, dim]. A batch of decode rows only may be recorded in a CUDA graph.

        `x`: on stages after the first, the previous stage's output, [tokens, dim]; it is
        overwritten.
        """
        plans = {key: self._plan(batch, cache, i) for key, i in self._planned.items()}
        context = ForwardContext(plans, self._rotary_inputs(batch))
        stream = Residual(self._embed(batch.tokens) if x is None else x)
        for block, layer_cache in zip(self._blocks[:-1], cache, strict=False):
            stream = block(stream, context, layer_cache)
        logit_tokens = self._logit_tokens(batch, cache) if self.is_last else None
        total = self._blocks[-1](stream, context, cache[-1], logit_tokens).total
        if logit_tokens or batch.logit_index is None or not self.is_last:
            return total
        return total[batch.logit_index]

    def _plan(self, batch: Batch, cache: list[LayerCache], layer: int) -> AttentionPlan:
        group = self._group_of[layer]
        of_group = batch if group == _NO_GROUP else batch.of_group(group)
        return self._blocks[layer].mixer.plan(self._planner, of_group, cache[layer])

    def _embed(self, tokens: Tensor) -> Tensor:
        table = self._embedding
        if self._ranks.size == 1:
            return F.embedding(tokens, table)
        at = tokens - self._ranks.rank * len(table)
        here = (at >= 0) & (at < len(table))
        return self._ranks.sum(F.embedding(at * here, table) * here[:, None])

    def _logit_tokens(self, batch: Batch, cache: list[LayerCache]) -> LogitTokens | None:
        """The tokens whose logits are needed, if each is the last token of its row; else None.

        Attention treats such a token as a decode row.
        """
        index = batch.logit_index
        rows = batch.logit_rows
        rows_cpu = batch.logit_rows_cpu
        if index is None or rows is None or rows_cpu is None:
            return None
        if not len(rows_cpu):
            return LogitTokens(index, {})
        ends = replace(
            batch,
            slots=batch.slots[rows],
            context_lens=batch.context_lens[rows],
            context_lens_cpu=batch.context_lens_cpu[rows_cpu],
            query_lens=[1] * len(rows_cpu),
            num_decode=len(rows_cpu),
        )
        key = self._blocks[-1].mixer.plan_key
        return LogitTokens(index, {key: self._plan(ends, cache, len(self.layers) - 1)})

    def scores(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """This rank's share of the logits, [n, vocab / ranks] in the model's dtype.

        `hidden`: the output of `forward`, [n, dim]. `out`: memory for the result.
        """
        norm = self._outer_weights["model.norm.weight"], self.arch.eps
        return self.ops.linear(hidden, self._head, None, norm, out)

    def whole(self, scores: Tensor) -> Tensor:
        """Gather all ranks' `scores` of the same rows: [n, vocab]."""
        return self._ranks.gather(scores)

    def sample_plain(
        self, scores: Tensor, slots: Tensor, state: PlainSampling, out: Tensor | None = None
    ) -> Tensor:
        """One token for each row of `scores`, [n] int64; see Ops.sample_plain."""
        return self.ops.sample_plain(scores, slots, state, out=out, ranks=self._ranks)

    def broadcast(self, tokens: Tensor) -> Tensor:
        """Overwrite `tokens`, [n] int64, with the tokens that the first rank sampled."""
        return self._ranks.broadcast(tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits, [n, vocab] in float32, from the output of `forward`, [n, dim]."""
        return self.whole(self.scores(hidden)).float()

    def weights(self) -> dict[str, Tensor]:
        """Canonical weight name -> the tensor (often a view) for this rank's shard of the weight.

        A view may have one more leading dimension than the weight; copying broadcasts over it.
        """
        views = dict(self._outer_weights)
        for i, block in enumerate(self._blocks, self.shard.first):
            views |= {f"model.layers.{i}.{name}": view for name, view in block.weights().items()}
        return views

    def _rotary_inputs(self, batch: Batch) -> dict[Rope, RotaryInputs]:
        return {
            rope: self.ops.rotary_inputs(
                table.cos, table.sin, batch.positions, self.dtype, rope.interleaved
            )
            for rope, table in self._ropes.items()
        }
