"""CUDA graphs of a step with prefill chunks, cut at attention.

What a layer computes of each token alone depends on nothing but the number of tokens. It is the
same kernels in every step, and a graph launches them at once. Attention is planned anew for each
step and is launched kernel by kernel, between two graphs; so is what begins and ends a step:

    embedding | piece 0 | attend | piece 1 | attend | ... | piece n | last layer, logits, sampling

    piece 0        norm, product of q, k and v, rotation, K and V to the cache, of the first layer
    attend         attention (see ForwardContext.attend)
    piece 1        output product, norm, ffn of the first layer; the next one as far as piece 0
    last layer     of the last stage: only tokens that need logits; on other stages it is in pieces

A step runs on the smallest pieces that have enough tokens. The tokens after its own ones are
padding: they pass through the pieces, but no attention sees them. Their K and V go to one place P
of the spare page, which no sequence ever owns.

    x           [ t t t t t 0 0 0 ]    the residual stream, of a step with 5 tokens in pieces of 8
    positions   [ p p p p p s s s ]    s: from a longer step before, or 0
    places      [ c c c c c P P P ]    of K and V in the cache, for each cache group
    results     [ a a a a a s s s ]    what attention gives

All are memory of all pieces. Padding is finite, as steps before it were.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from gllm_engine.arch.model import Layer, Moe
from gllm_engine.config import EngineConfig
from gllm_engine.model import Attend, Decoder, ForwardContext, LayerCache, Residual
from gllm_engine.ops import Batch
from gllm_engine.runner.graph_pool import Cut, GraphPool

# Operations of a layer's products that take a GPU as long as Python takes to launch the layer: half
# a millisecond of an H200. With more, the GPU does not wait, and padding would only cost time.
_HIDING = 3e11
# Most tokens of a step in pieces, whose memory is not free for anything else.
_MAX_TOKENS = 4096
# Bytes that the driver takes for a graph of some kernels.
_GRAPH_BYTES = 256 << 10


def token_counts(max_tokens: int) -> list[int]:
    """The token counts that have pieces, ascending; the last one is `max_tokens`.

    From 64 tokens on, padding is less than a ninth of the tokens. Below that, reading the weights
    takes all the time.
    """
    counts = [16, 32]
    power = 64
    while power < max_tokens:
        counts += range(power, 2 * power, power // 8)
        power *= 2
    return [n for n in counts if n < max_tokens] + [max_tokens]


def most_tokens(config: EngineConfig, decoder: Decoder) -> int:
    """The most tokens of a step in pieces, the same on all ranks of a stage; 0: no step is."""
    if config.enforce_eager or not decoder.num_trunk_layers:
        return 0
    shard = decoder.shard
    layers = decoder.arch.layers[shard.first : shard.end]
    numbers = sum(_numbers(layer, decoder.arch.dim) for layer in layers)
    of_layer = 2 * numbers / len(layers) / shard.size
    return min(_MAX_TOKENS, config.max_num_batched_tokens, int(_HIDING / of_layer))


def _numbers(layer: Layer, dim: int) -> int:
    """The numbers of the weights that a token is multiplied by."""
    if isinstance(layer.ffn, Moe):
        layer = replace(layer, ffn=replace(layer.ffn, local_experts=(0, layer.ffn.routing.top_k)))
    return sum(prod(shape) for shape in layer.weights(dim).values())


@dataclass(frozen=True)
class _Between:
    """A call between two graphs, its inputs [tokens, ...], and memory [tokens, width] for its
    result.
    """

    call: Attend
    inputs: tuple[Tensor, ...]
    result: Tensor


@dataclass(frozen=True)
class _Pieces:
    graphs: list[torch.cuda.CUDAGraph]
    calls: list[_Between]
    stream: Residual


class StepPieces:
    """Graphs of steps of up to `max_tokens` tokens, once `capture` has been called."""

    def __init__(
        self, decoder: Decoder, cache: list[LayerCache], max_tokens: int, spare: int
    ) -> None:
        """`spare`: the cache place of padding."""
        self.max_tokens = max_tokens
        self._decoder = decoder
        self._cache = cache
        self._counts = token_counts(max_tokens)
        self._x = self._zeros(decoder.arch.dim)
        size = (len(decoder.groups), max_tokens)
        self._places = torch.full(size, spare, dtype=torch.int64, device=decoder.device)
        self._positions = torch.zeros_like(self._places[0])
        self._spare = spare
        self._results: dict[int, Tensor] = {}  # by width
        self._of_count: list[_Pieces] = []

    @property
    def graph_bytes(self) -> int:
        """Bytes that the driver takes for all graphs."""
        return len(self._counts) * (self._decoder.num_trunk_layers + 1) * _GRAPH_BYTES

    def capture(self, pool: GraphPool) -> None:
        with pool.told(f"steps with chunks, of {self._counts} tokens"):
            # The largest ones come first: the others reuse their memory in the pool.
            of_count = [self._capture(pool, n) for n in reversed(self._counts)]
        self._of_count = of_count[::-1]

    def _capture(self, pool: GraphPool, num_tokens: int) -> _Pieces:
        self.compute(num_tokens)
        calls: list[_Between] = []
        graphs, stream = pool.capture(lambda cut: self._trunk(num_tokens, cut, calls))
        return _Pieces(graphs, calls, stream)

    def compute(self, num_tokens: int) -> None:
        """Run all that is captured once, without attention."""
        self._trunk(num_tokens, lambda inputs: inputs, [])

    def _trunk(self, num_tokens: int, cut: Cut, calls: list[_Between]) -> Residual:
        """Add the calls between the pieces to `calls`."""

        def between(width: int, call: Attend, inputs: tuple[Tensor, ...]) -> Tensor:
            if width not in self._results:
                self._results[width] = self._zeros(width)
            result = self._results[width][:num_tokens]
            calls.append(_Between(call, cut(inputs), result))
            return result

        positions = self._positions[:num_tokens]
        places = self._places[:, :num_tokens]
        context = self._decoder.storing(positions, places, between)
        return self._decoder.trunk(self._x[:num_tokens], context, self._cache)

    def _zeros(self, width: int) -> Tensor:
        decoder = self._decoder
        return torch.zeros(self.max_tokens, width, dtype=decoder.dtype, device=decoder.device)

    def __call__(self, x: Tensor, batch: Batch, context: ForwardContext) -> Residual:
        """As Decoder.trunk for x, [tokens, dim]. The next call overwrites the result."""
        n = len(x)
        index = bisect_left(self._counts, n)
        pieces = self._of_count[index]
        self._x[:n].copy_(x)
        self._x[n : self._counts[index]].zero_()
        self._positions[:n].copy_(batch.rotation)
        self._places[:, :n].copy_(batch.cache_index)
        self._places[:, n:].fill_(self._spare)
        for graph, between in zip(pieces.graphs, pieces.calls, strict=False):
            graph.replay()
            between.call(context, *(x[:n] for x in between.inputs), out=between.result[:n])
        pieces.graphs[-1].replay()
        return pieces.stream.up_to(n)
