"""The decoder: interprets any architecture, or the shard of it that one rank holds.

This module owns the order of layers and norms, and the residual stream. It knows no family, no
checkpoint and no scheduling; a Batch gives the tokens and their positions in the KV cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from itertools import count, pairwise
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gllm_engine.arch.cache import cache_groups
from gllm_engine.arch.model import (
    EMBEDDING,
    HEAD,
    AttentionShape,
    Dense,
    GatedDelta,
    Gqa,
    Layer,
    Mla,
    Model,
    Moe,
    Place,
    QueryTemperature,
    RecurrentShape,
    within_layer,
)
from gllm_engine.arch.rope import Rope
from gllm_engine.arch.shard import Shard
from gllm_engine.layers import (
    CutPass,
    DenseFfn,
    ForwardContext,
    GatedDeltaAttention,
    GqaAttention,
    LogitTokens,
    Mixer,
    MlaAttention,
    MoeFfn,
    NormLayer,
    PlanKey,
    Platform,
    Residual,
    ResidualReducer,
    RopeTable,
    Staging,
    Views,
    VocabularyMatrix,
)
from gllm_engine.model.states import States, bytes_of_states
from gllm_engine.model.vision_tower import VisionTower
from gllm_engine.ops import (
    AttentionLayer,
    AttentionPlan,
    Batch,
    ImageRows,
    PagedPlan,
    PlainSampling,
    RotaryInputs,
    Weight,
    select_ops,
)
from gllm_engine.parallel import ALONE, TensorParallel

_MIXERS: dict[type[Any], Callable[..., Mixer]] = {
    Gqa: GqaAttention,
    Mla: MlaAttention,
    GatedDelta: GatedDeltaAttention,
}
_FFNS: dict[type[Any], Callable[..., DenseFfn | MoeFfn]] = {Dense: DenseFfn, Moe: MoeFfn}
# Of one layer: the parts of its pages (K and V in one; latents and index keys in two), or a
# RecurrentState of all slots.
LayerCache = tuple[Tensor, ...]
_POSITIONS = "model.embed_positions.weight"
# The group of layers that keep a state.
_NO_GROUP = -1


class PreNormBlock:
    """Computes a Layer of place "pre". A block adds to the residual stream in place."""

    def __init__(
        self,
        arch: Layer,
        group: int,
        model: Model,
        platform: Platform,
        reduce: ResidualReducer,
    ) -> None:
        """`group`: the cache group of the layer."""
        self._reduce = reduce
        self.mixer = _MIXERS[type(arch.mixer)](arch.mixer, group, model, platform)
        self._ffn = _FFNS[type(arch.ffn)](arch.ffn, model.dim, platform)
        self._norms: dict[str, NormLayer] = {}
        for name in arch.norms:
            eps = model.eps if name in _OUTPUT_NORMS else _stream_eps(model)
            self._norms[name] = NormLayer(model.norm, eps, model.dim, platform)
        self.next_norm: NormLayer | None = None  # the first norm of the next block, if any

    @property
    def first_norm(self) -> NormLayer | None:
        return self._norms.get("input_layernorm")

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

    def weights(self) -> Views:
        views: Views = {}
        for name, norm in self._norms.items():
            views |= norm.weights(name)
        return views | self.mixer.weights() | self._ffn.weights()


class OutputNormBlock(PreNormBlock):
    """Computes a Layer of place "post" or "sandwich": outputs are normalised before they are added
    to the stream.
    """

    def __call__(
        self,
        stream: Residual,
        context: ForwardContext,
        cache: LayerCache,
        logit_tokens: LogitTokens | None = None,
    ) -> Residual:
        total = stream.total if logit_tokens is None else stream.total[logit_tokens.index]
        x, norm = stream.input_for(self.first_norm)
        x = self._reduce.sum(self.mixer(x, norm, context, cache, logit_tokens))
        total = self._norms["post_self_attn_layernorm"](x, add_to=total)
        x, norm = Residual(total).input_for(self._norms.get("post_attention_layernorm"))
        x = self._reduce.sum(self._ffn(x, norm))
        return Residual(self._norms["post_mlp_layernorm"](x, add_to=total))


class ParallelBlock(PreNormBlock):
    """Computes a Layer of place "parallel" or "parallel_shared"."""

    def __call__(
        self,
        stream: Residual,
        context: ForwardContext,
        cache: LayerCache,
        logit_tokens: LogitTokens | None = None,
    ) -> Residual:
        total = stream.total if logit_tokens is None else stream.total[logit_tokens.index]
        # Both inputs are computed first, because the mixer adds to the stream in place.
        x = self._norms["input_layernorm"](stream.total)
        second = self._norms.get("post_attention_layernorm")
        if second is not None:
            y = second(total)
        else:
            y = x if logit_tokens is None else x[logit_tokens.index]

        def mixer_and_ffn(into: Tensor | None) -> Tensor:
            return self._ffn(y, None, self.mixer(x, None, context, cache, logit_tokens, into))

        return self._reduce(total, mixer_and_ffn, None)


_BLOCKS: dict[Place, type[PreNormBlock]] = {
    "pre": PreNormBlock,
    "post": OutputNormBlock,
    "sandwich": OutputNormBlock,
    "parallel": ParallelBlock,
    "parallel_shared": ParallelBlock,
}
_OUTPUT_NORMS = ("post_self_attn_layernorm", "post_mlp_layernorm")


def _stream_eps(model: Model) -> float:
    """Epsilon of the norms of the residual stream.

    The stream is kept divided by residual_scale, r, so that outputs are added as they are. Then
    norm(x, eps) = norm(x / r, eps / r^2).
    """
    return model.eps / model.residual_scale**2


class _Buffer(NamedTuple):
    """Memory of the cache for a part of a layer's pages, `width` numbers per token. `place`: the
    number of such parts before it in its group.
    """

    place: int
    width: int


class Decoder:
    """A model whose weights are not yet loaded; load.py fills the tensors of `weights()`.

    `layers`: the layers that this rank computes. `groups`: the cache groups of the whole model.
    `tower`: of a model that takes images, on its first stage, unless others encode them; else None.
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
        encodes: bool = True,
    ) -> None:
        """`max_model_len`: all positions are smaller, but for those of time. Dynamic RoPE scaling
        depends on it, and which windows matter.

        `shard`: this rank's shard (default: everything). `ranks`: the ranks that share its layers.
        `encodes`: whether it encodes the images that it takes.
        """
        self.arch = arch
        self.dtype = dtype
        self.device = device
        self.ops = select_ops(device)
        self._platform = Platform(self.ops, dtype, device, ranks)
        self._ranks = ranks
        self._planner = self.ops.make_planner(device, dtype)
        self._max_model_len = max_model_len
        self.groups = cache_groups(arch, max_model_len)
        self._reduce = ResidualReducer(arch.dim, self._platform)
        self._ropes: dict[Rope, RopeTable] = {}
        self._vocabulary: dict[str, VocabularyMatrix] = {}
        self._positions: Tensor | None = None  # a row for each position
        # Only the last stage computes it.
        self._norm = NormLayer(arch.norm, _stream_eps(arch), arch.dim, self._platform)
        self._hold(shard or Shard(0, len(arch.layers)), {})
        self.tower: VisionTower | None = None
        if encodes and self.is_first and arch.vision is not None:
            self.tower = VisionTower(arch.vision, dtype, device)

    def with_layers(self, first: int, end: int, arrived: Decoder | None = None) -> Decoder:
        """This rank's decoder of layers `first` .. `end` - 1, without weights of its own but for
        layers that neither this decoder nor `arrived` has. It takes the place of both.

        The first and the last layer of the model stay on their ranks.
        """
        decoder = copy(self)
        blocks: dict[int, PreNormBlock] = {}
        for held in (self, arrived):
            if held is not None:
                blocks |= enumerate(held._blocks, held.shard.first)
        decoder._hold(replace(self.shard, first=first, end=end), blocks)
        decoder.tower = self.tower if decoder.is_first else None
        return decoder

    def _hold(self, shard: Shard, blocks: dict[int, PreNormBlock]) -> None:
        """Take the layers of `shard`. `blocks`: those that exist, by the number of the layer."""
        arch = self.arch
        self.shard = shard
        self.layers = shard.of(arch)
        self.is_first = shard.first == 0
        self.is_last = shard.end == len(arch.layers)
        self._group_of = [
            next((n for n, group in enumerate(self.groups) if i in group.layers), _NO_GROUP)
            for i in range(shard.first, shard.end)
        ]
        self._blocks = [
            blocks.get(i) or _BLOCKS[layer.place](layer, group, arch, self._platform, self._reduce)
            for i, layer, group in zip(count(shard.first), self.layers, self._group_of)
        ]
        for block, after in pairwise(self._blocks):
            block.next_norm = after.first_norm
        self._blocks[-1].next_norm = None
        held = shard.weights(arch).keys()
        self._vocabulary = {
            name: self._vocabulary.get(name) or self._new_matrix(name)
            for name in (EMBEDDING, HEAD)
            if any(stored.startswith(name.removesuffix("weight")) for stored in held)
        }
        if _POSITIONS not in held:
            self._positions = None
        elif self._positions is None:
            self._positions = self._platform.empty(arch.positions, arch.dim)
        ropes = dict.fromkeys(rope for layer in self.layers for rope in layer.mixer.ropes)
        self._ropes = {
            rope: self._ropes.get(rope)
            or RopeTable(rope, self._max_model_len, self.device, arch.max_len)
            for rope in ropes
        }
        # The first of the layers that share a plan.
        self._planned: dict[PlanKey, int] = {}
        for i, block in enumerate(self._blocks):
            self._planned.setdefault(block.mixer.plan_key, i)

    @property
    def image_numbers(self) -> int:
        """Numbers in the embeddings of a token of an image; 0 if this rank takes no images."""
        vision = self.arch.vision
        return (1 + vision.num_deep) * self.arch.dim if vision and self.is_first else 0

    def _new_matrix(self, name: str) -> VocabularyMatrix:
        arch = self.arch
        return VocabularyMatrix(
            name,
            (self.shard.vocab_rows(arch.vocab), arch.dim),
            self.shard.vocab_width(arch.vocab),
            self.shard.vocab_formats(arch),
            self._platform,
        )

    @property
    def _embedding(self) -> Tensor:
        table = self._vocabulary[EMBEDDING].value
        assert isinstance(table, Tensor)
        return table

    @property
    def _head(self) -> Weight:
        return self._vocabulary[EMBEDDING if self.arch.tie else HEAD].value

    def new_cache(
        self,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype | None = None,
        states: States | None = None,
    ) -> list[LayerCache]:
        """Uninitialised tensors [num_pages, *shape] for mixer.cache_shapes(page_size) per layer.

        `dtype`: the model's dtype (default) or float8_e4m3fn. The n-th layers of all groups have
        the same memory, because a page belongs to one group at a time. `states`: from new_states,
        for the layers that keep a state per sequence.
        """
        memory = {
            buffer: torch.empty(
                num_pages, buffer.width * page_size, dtype=dtype or self.dtype, device=self.device
            )
            for buffer in self._distinct_buffers()
        }
        cache: list[LayerCache] = []
        for i, (buffers, layer) in enumerate(zip(self._buffers(), self.layers, strict=True)):
            if states is not None and i in states.layers:
                cache.append(states.layers[i])
            else:
                shapes = layer.mixer.cache_shapes(page_size)
                parts = zip(buffers, shapes, strict=True)
                cache.append(
                    tuple(memory[buffer].view(num_pages, *shape) for buffer, shape in parts)
                )
        return cache

    def new_states(self, rows: int) -> States:
        """The states of `rows` slots and snapshots, all zero."""
        return States(self.layers, rows, self.dtype, self.device)

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of one sequence in all layers of this rank."""
        return bytes_of_states(self.layers, self.dtype)

    def page_bytes(self, page_size: int, dtype: torch.dtype) -> int:
        """Bytes of one page of `page_size` tokens in a cache of `dtype`."""
        width = sum(buffer.width for buffer in self._distinct_buffers())
        return width * page_size * dtype.itemsize

    def _buffers(self) -> list[list[_Buffer]]:
        """The memory of each layer's parts. Parts of different widths never share memory."""
        counts: Counter[tuple[int, int]] = Counter()
        of_layers = []
        for layer, group in zip(self.layers, self._group_of, strict=True):
            buffers = []
            for shape in layer.mixer.cache_shapes(1):
                width = prod(shape)
                buffers.append(_Buffer(counts[group, width], width))
                counts[group, width] += 1
            of_layers.append(buffers)
        return of_layers

    def _distinct_buffers(self) -> set[_Buffer]:
        return {buffer for buffers in self._buffers() for buffer in buffers}

    def layers_of_all_stages(self) -> tuple[Layer, ...]:
        """The layers of the model, each as this rank would hold it."""
        return replace(self.shard, first=0, end=len(self.arch.layers)).of(self.arch)

    def compile_kernels(
        self, page_size: int, dtype: torch.dtype, layers_move: bool = False
    ) -> None:
        """Compile the kernels for attention over such a cache, unless they are compiled already.

        `layers_move`: those of the other stages' layers too.
        """
        kinds: dict[Any, AttentionLayer] = {}
        # Before layers with the same kernels, which need those over float8 pages too.
        if self.tower is not None and (of_tower := self.tower.compiled_attention) is not None:
            pages = torch.empty(0, 2, page_size, of_tower.kv_heads, of_tower.head_dim)
            kinds[of_tower] = AttentionLayer(pages.to(self.device, self.dtype), of_tower)
        for layer in self.layers_of_all_stages() if layers_move else self.layers:
            shape = layer.mixer.attention
            if isinstance(shape, AttentionShape) and shape.chunked:
                shape = replace(shape, window=None, chunked=False)  # the same kernels
            if not isinstance(shape, RecurrentShape):  # which has kernels of our own
                size = (1, *layer.mixer.cache_shapes(page_size)[0])
                pages = torch.empty(size, dtype=dtype, device=self.device)
                kinds[shape, size] = AttentionLayer(pages, shape)
        self.ops.compile_attention(list(kinds.values()), self.dtype)

    def forward(
        self,
        batch: Batch,
        cache: list[LayerCache],
        x: Tensor | None = None,
        pieces: Callable[[Tensor, Batch, ForwardContext], Residual] | None = None,
    ) -> Tensor:
        """Write the batch's K and V to the cache and return the residual stream after the layers.

        The last stage returns [n, dim] for the tokens at `batch.logit_index`; other stages return
        [tokens, dim]. A batch of decode rows only may be recorded in a CUDA graph.

        `x`: on stages after the first, the previous stage's output, [tokens, dim]; it is
        overwritten. `pieces`: computes `trunk` of a batch without images, and may do so in memory
        of its own.
        """
        plans = {key: self._plan(batch, cache, i) for key, i in self._planned.items()}
        rotary = self._rotary_inputs(batch.rotation)
        context = ForwardContext(plans, rotary, self._query_scales(batch.positions))
        x = self._embed(batch) if x is None else x
        if pieces is None:
            stream = self.trunk(x, context, cache, batch.images)
        else:
            stream = pieces(x, batch, context)
        if not self.is_last:
            return stream.total
        logit_tokens = self._logit_tokens(batch, cache)
        total = self._blocks[-1](stream, context, cache[-1], logit_tokens).total
        if logit_tokens or batch.logit_index is None:
            return total
        return total[batch.logit_index]

    def storing(self, positions: Tensor, cache_index: Tensor, cut: CutPass) -> ForwardContext:
        """The context of a pass with `cut`, for tokens at these positions [tokens] and with this
        Batch.cache_index. CUDA graphs of the pass, this call included, follow changes of both.

        The positions are those of the rotation too, or these: no model has both sections of
        rotated channels and scales of queries that depend on the position.
        """
        plans: dict[PlanKey, AttentionPlan] = {
            key: PagedPlan(cache_index[key[0]], keeps=True)
            for key in self._planned
            if key[0] != _NO_GROUP
        }
        rotary = self._rotary_inputs(positions)
        return ForwardContext(plans, rotary, self._query_scales(positions), cut=cut)

    @property
    def num_trunk_layers(self) -> int:
        """The last stage's last layer is not in `trunk`: few tokens need all of it."""
        return len(self.layers) - self.is_last

    def trunk(
        self,
        x: Tensor,
        context: ForwardContext,
        cache: list[LayerCache],
        images: ImageRows | None = None,
    ) -> Residual:
        """The residual stream x, [tokens, dim], after the first `num_trunk_layers`, in place."""
        stream = Residual(x)
        blocks = self._blocks[: self.num_trunk_layers]
        for i, (block, layer_cache) in enumerate(zip(blocks, cache, strict=False)):
            stream = block(stream, context, layer_cache)
            if images is not None and i + 1 < len(images.embeddings):
                more = images.embeddings[i + 1]
                stream = Residual(stream.total.index_add_(0, images.places, more))
        return stream

    def _plan(self, batch: Batch, cache: list[LayerCache], layer: int) -> AttentionPlan:
        group = self._group_of[layer]
        of_group = batch if group == _NO_GROUP else batch.of_group(group)
        return self._blocks[layer].mixer.plan(self._planner, of_group, cache[layer])

    def _embed(self, batch: Batch) -> Tensor:
        """The residual stream before the first layer, [tokens, dim]."""
        x = self._token_embeddings(batch.tokens)
        arch = self.arch
        scale = float(torch.tensor(arch.embed_scale, dtype=self.dtype)) / arch.residual_scale
        if scale != 1:
            x *= scale
        if self._positions is not None:
            x += F.embedding(batch.positions, self._positions)
        if batch.images is not None:
            x.index_copy_(0, batch.images.places, batch.images.embeddings[0])
        return x

    def _token_embeddings(self, tokens: Tensor) -> Tensor:
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
        """This rank's share of the logits, [n, Shard.vocab_width] in the model's dtype.

        `hidden`: the output of `forward`, [n, dim]. `out`: memory for the result. The last rank's
        columns past the vocabulary have no meaning.
        """
        x, norm = self._norm.input_of(hidden)
        scores = self.ops.linear(x, self._head, None, norm, out)
        cap = self.arch.logit_softcap
        if self.arch.logit_scale != 1:
            scores *= self.arch.logit_scale
        return scores if cap is None else scores.div_(cap).tanh_().mul_(cap)

    def whole(self, scores: Tensor) -> Tensor:
        """Gather all ranks' `scores` of the same rows: [n, vocab]."""
        return self._ranks.gather(scores)[:, : self.arch.vocab]

    def sample_plain(
        self, scores: Tensor, slots: Tensor, state: PlainSampling, out: Tensor | None = None
    ) -> Tensor:
        """One token for each row of `scores`, [n] int64; see Ops.sample_plain."""
        vocab = self.arch.vocab
        return self.ops.sample_plain(scores, slots, state, out=out, ranks=self._ranks, vocab=vocab)

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
        return {name: view for name, view in self._views().items() if isinstance(view, Tensor)}

    def stagings(self) -> dict[str, Staging]:
        """The weights that are not in `weights`, because they are stored in another form."""
        return {name: view for name, view in self._views().items() if isinstance(view, Staging)}

    def weight_bytes(self) -> dict[str, int]:
        """Canonical weight name -> bytes that this rank holds; scales have names of their own."""
        return {name: view.nbytes for name, view in self._views().items()}

    @property
    def largest_layer_bytes(self) -> int:
        """Bytes of the weights of this rank's largest layer."""
        views = [block.weights().values() for block in self._blocks]
        return max(sum(view.nbytes for view in of_layer) for of_layer in views)

    def _views(self) -> Views:
        views: Views = {}
        for matrix in self._vocabulary.values():
            views |= matrix.weights()
        if self._positions is not None:
            views[_POSITIONS] = self._positions
        if self.is_last:
            views |= self._norm.weights("model.norm")
        for i, block in enumerate(self._blocks, self.shard.first):
            views |= within_layer(i, block.weights())
        if self.tower is not None:
            views |= self.tower.weights()
        return views

    def _rotary_inputs(self, positions: Tensor) -> dict[Rope, RotaryInputs]:
        return {
            rope: self.ops.rotary_inputs(*table.rows(positions), self.dtype, rope.interleaved)
            for rope, table in self._ropes.items()
        }

    def _query_scales(self, positions: Tensor) -> dict[QueryTemperature, Tensor]:
        kinds = dict.fromkeys(layer.mixer.temperature for layer in self.layers)
        return {
            kind: 1 + kind.beta * torch.log1p(((positions + kind.offset) // kind.length).float())
            for kind in kinds
            if kind is not None
        }
