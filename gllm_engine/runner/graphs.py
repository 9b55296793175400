"""CUDA graphs of the decode step: one launch replaces hundreds.

Owns one graph for each row count of `row_counts`. A graph holds the decode step from slots to
logits and plainly sampled tokens, or one pipeline stage's part of that step. If a row needs more
than plain sampling, the runner samples again from the logits and overwrites the tokens; the plain
sampling before it is cheap. Knows nothing of plans or requests.

A step runs on the smallest graph that has enough rows. Here 5 decode rows run on the graph of 8:

    start                              each step

    slots   [ S S S S S S S S ]        slots   [ 3 0 7 2 9 S S S ]   copied into the same memory
    _step(slots)   compiles            graph.replay()
    _step(slots)   is captured         hidden, scores, tokens: rows 0 .. 4 are valid

    S  the spare slot: the last row of the slot table; no sequence ever owns it
    P  the spare page: the last page of a group; the scheduler does not know of it

    page_table[S] = [ P P P ... ]
    lengths[S]    = 0 before every step: the captured step itself sets it back

So each padding row computes one token of an empty context and writes its K and V to offset 0 of P.
Many rows may write to that place at once: nothing reads it but padding rows.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gllm_engine.model import Decoder, LayerCache
from gllm_engine.runner.batch import decode_batch
from gllm_engine.runner.graph_pool import GraphPool
from gllm_engine.runner.host_arrays import pack
from gllm_engine.runner.sampling_state import SamplingState
from gllm_engine.runner.slot_table import SlotTable, StepRows


def row_counts(max_rows: int) -> list[int]:
    """The row counts that have a graph, ascending; the last one is `max_rows`.

    From 64 rows on, padding is less than a fifth of a graph's rows; from 512 on, less than a ninth.
    Below 64 rows, reading the weights takes all the time, and padding costs nothing. Above 2,048
    rows each doubling has eight graphs.
    """
    counts = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 512, 32)]
    counts += range(512, 2048, 64)
    power = 2048
    while power < max_rows:
        counts += range(power, 2 * power, power // 8)
        power *= 2
    return [n for n in counts if n < max_rows] + [max_rows]


@dataclass(frozen=True)
class _Graph:
    slots: Tensor  # [rows]
    recorded: torch.cuda.CUDAGraph
    hidden: Tensor  # [rows, dim] output of the layers


@dataclass(frozen=True)
class Decoded:
    """The results of a decode step of n rows. The next decode step overwrites all of them."""

    slots: Tensor  # [n]
    hidden: Tensor  # [n, dim]
    scores: Tensor  # [n, vocab] logits, or this rank's shard of them; empty before the last stage
    tokens: Tensor  # [n] plainly sampled tokens; empty before the last stage


class DecodeGraphs:
    """Graphs for up to `max_rows` decode rows. Padding rows use the last slot of `table`."""

    def __init__(
        self,
        decoder: Decoder,
        cache: list[LayerCache],
        table: SlotTable,
        sampling: SamplingState,
        max_rows: int,
        pool: GraphPool,
    ) -> None:
        self.max_rows = max_rows
        self._decoder = decoder
        self._cache = cache
        self._table = table
        self._sampling = sampling
        self._spare = len(table.lengths) - 1
        # The spare page: the last page of a group, which the scheduler does not know of.
        for pages, num_pages in zip(table.page_table, table.num_pages, strict=True):
            pages[self._spare] = num_pages - 1
        device = decoder.device
        dtype = decoder.dtype
        rows = max_rows if decoder.is_last else 0
        width = decoder.shard.vocab_width(sampling.vocab)
        self._scores = torch.empty(rows, width, dtype=dtype, device=device)
        self._tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self._inputs: Tensor | None = None
        if not decoder.is_first:
            self._inputs = torch.zeros(max_rows, decoder.arch.dim, dtype=dtype, device=device)
        self._counts = row_counts(max_rows)
        with pool.told(f"decode steps, of {self._counts} rows"):
            # The largest graph comes first: the smaller ones reuse its memory in the pool.
            captured = [self._capture(pool, n) for n in reversed(self._counts)]
        self._graphs = captured[::-1]

    def forward(self, rows: StepRows, x: Tensor | None) -> Decoded:
        """Run the decode step of `rows`, n of them; sampled tokens become the slots' last tokens.

        `x`: [n, dim] from the previous pipeline stage; None on the first stage.
        """
        n = len(rows.slots_cpu)
        graph = self._graph(n)
        spare = np.full(len(graph.slots) - n, self._spare)
        slots = pack(self._decoder.device, rows.slots_cpu, spare)
        graph.slots.copy_(slots, non_blocking=True)
        if x is not None and self._inputs is not None:
            self._inputs[:n].copy_(x)
            self._inputs[n : len(graph.slots)].zero_()
        graph.recorded.replay()
        return Decoded(graph.slots[:n], graph.hidden[:n], self._scores[:n], self._tokens[:n])

    def _graph(self, num_rows: int) -> _Graph:
        return self._graphs[bisect_left(self._counts, num_rows)]

    def _capture(self, pool: GraphPool, num_rows: int) -> _Graph:
        device = self._decoder.device
        slots = torch.full((num_rows,), self._spare, dtype=torch.int64, device=device)
        self._step(slots)
        (graph,), hidden = pool.capture(lambda cut: self._step(slots))
        return _Graph(slots, graph, hidden)

    def _step(self, slots: Tensor) -> Tensor:
        decoder = self._decoder
        table = self._table
        n = len(slots)
        batch = decode_batch(table, slots, np.zeros(0, np.int64), decoder.ops)
        table.lengths[self._spare].zero_()
        x = None if self._inputs is None else self._inputs[:n]
        hidden = decoder.forward(batch, self._cache, x)
        if decoder.is_last:
            scores = decoder.scores(hidden, out=self._scores[:n])
            decoder.sample_plain(scores, slots, self._sampling.plain, out=self._tokens[:n])
        return hidden
