"""CUDA graphs of the decode step: what takes hundreds of launches becomes one.

Owns, for each of some row counts, the graph of a step from the slots' rows to the logits and to
plainly sampled tokens, or of a stage's part of it. Who asks for more samples again from the logits,
and plain sampling, which costs little beside that, has done no harm. A step runs on the next larger
graph; its spare rows compute a slot and write to a page that are nobody's. Knows nothing of plans
or requests.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gllm_engine.model import Decoder
from gllm_engine.runner.batch import decode_batch
from gllm_engine.runner.host_arrays import pack
from gllm_engine.runner.sampling_state import SamplingState
from gllm_engine.runner.slot_table import SlotTable, StepRows

_log = logging.getLogger(__name__)


def row_counts(max_rows: int) -> list[int]:
    """For which numbers of rows there are graphs, ascending. Less than a fifth of a graph's rows is
    spare from 64 rows on, and less than a ninth from 512 on; with fewer rows, reading the weights
    takes all the time anyway. Above 2,048, eight graphs for each doubling.
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
    hidden: Tensor  # [rows, dim] what the layers give


@dataclass(frozen=True)
class Decoded:
    """What a decode step of n rows leaves; all of it is overwritten by the next one."""

    slots: Tensor  # [n]
    hidden: Tensor  # [n, dim]
    scores: Tensor  # [n, vocab], or a rank's share of it; on the last stage only, like the next
    tokens: Tensor  # [n] plainly sampled ones


class DecodeGraphs:
    """Graphs for up to `max_rows` decode rows. The last slot is the spare rows'."""

    def __init__(
        self,
        decoder: Decoder,
        cache: list[Tensor],
        table: SlotTable,
        sampling: SamplingState,
        max_rows: int,
    ) -> None:
        self.max_rows = max_rows
        self._decoder = decoder
        self._cache = cache
        self._table = table
        self._sampling = sampling
        self._spare = len(table.lengths) - 1
        # The cache's last page, which the scheduler does not know of.
        table.page_table[self._spare] = cache[0].shape[0] - 1
        device = decoder.device
        dtype = decoder.dtype
        rows = max_rows if decoder.is_last else 0
        width = sampling.vocab // decoder.shard.size
        self._scores = torch.empty(rows, width, dtype=dtype, device=device)
        self._tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self._inputs: Tensor | None = None
        if not decoder.is_first:
            self._inputs = torch.zeros(max_rows, decoder.arch.dim, dtype=dtype, device=device)
        self._counts = row_counts(max_rows)
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        start = time.perf_counter()
        # The largest first: the others fit the memory that it leaves in the pool.
        captured = [self._capture(n) for n in reversed(self._counts)]
        self._graphs = captured[::-1]
        seconds = time.perf_counter() - start
        _log.info("captured decode graphs for %s rows in %.1f s", self._counts, seconds)

    def forward(self, rows: StepRows, x: Tensor | None) -> Decoded:
        """Run the decode step of `rows`; plainly sampled tokens are recorded as the slots' last.

        `x`: [n, dim] from the stage before, if there is one.
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

    def _capture(self, num_rows: int) -> _Graph:
        device = self._decoder.device
        slots = torch.full((num_rows,), self._spare, dtype=torch.int64, device=device)
        self._step(slots)  # compiles kernels and creates handles, which must not happen below
        graph = torch.cuda.CUDAGraph()
        # What torch.cuda.graph() does, but that one waits for the device and gives all unused
        # memory back to the driver before each graph, only for the next step to ask for it again.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                hidden = self._step(slots)
            finally:
                graph.capture_end()
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
