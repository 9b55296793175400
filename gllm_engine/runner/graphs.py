"""CUDA graphs of the decode step: what takes hundreds of launches becomes one.

Owns, for each of some row counts, the graph of a step from the slots' state to the logits and to
plainly sampled tokens: who asks for more samples again from the logits, and plain sampling, which
costs little beside that, has done no harm. A step runs on the next larger graph; its spare rows
compute a slot and write to a page that are nobody's. Knows nothing of plans or requests.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gllm_engine.model import Decoder
from gllm_engine.runner.batch import Rows, decode_batch
from gllm_engine.runner.state import State, pack

_log = logging.getLogger(__name__)


def row_counts(max_rows: int) -> list[int]:
    """For which numbers of rows there are graphs, ascending. Less than a fifth of the rows is spare
    from 64 to 2,048 of them; where it is more, reading the weights takes all the time anyway.
    """
    counts = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 512, 32)]
    counts += range(512, 2049, 64)
    return [n for n in counts if n < max_rows] + [max_rows]


@dataclass(frozen=True)
class _Graph:
    slots: Tensor  # [rows]
    recorded: torch.cuda.CUDAGraph


class DecodeGraphs:
    """Graphs for up to `max_rows` decode rows. The state's last slot is the spare rows'."""

    def __init__(self, decoder: Decoder, cache: list[Tensor], state: State, max_rows: int) -> None:
        self.max_rows = max_rows
        self._decoder, self._cache, self._state = decoder, cache, state
        self._spare = state.lengths.shape[0] - 1
        # The cache's last page, which the scheduler does not know of.
        state.page_table[self._spare] = cache[0].shape[0] - 1
        vocab, device = state.vocab, decoder.device
        self._scores = torch.empty(max_rows, vocab, dtype=decoder.dtype, device=device)
        self._tokens = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._counts = row_counts(max_rows)
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        start = time.perf_counter()
        # The largest first: the others fit the memory that it leaves in the pool.
        captured = [self._capture(n) for n in reversed(self._counts)]
        self._graphs = captured[::-1]
        seconds = time.perf_counter() - start
        _log.info("captured decode graphs for %s rows in %.1f s", self._counts, seconds)

    def forward(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Run the decode step of `rows`: their slots [n], logits [n, vocab] and plainly sampled
        tokens [n], recorded as the slots' last ones. All are overwritten by the next call.
        """
        n = len(rows.slots_cpu)
        graph = self._graph(n)
        spare = np.full(len(graph.slots) - n, self._spare)
        slots = pack(self._decoder.device, rows.slots_cpu, spare)
        graph.slots.copy_(slots, non_blocking=True)
        graph.recorded.replay()
        return graph.slots[:n], self._scores[:n], self._tokens[:n]

    def _graph(self, num_rows: int) -> _Graph:
        return self._graphs[bisect_left(self._counts, num_rows)]

    def _capture(self, num_rows: int) -> _Graph:
        device = self._decoder.device
        slots = torch.full((num_rows,), self._spare, dtype=torch.int64, device=device)
        return _Graph(slots, self._record(lambda: self._step(slots)))

    def _record(self, body: Callable[[], None]) -> torch.cuda.CUDAGraph:
        body()  # compiles kernels and creates handles, which must not happen while recording
        graph = torch.cuda.CUDAGraph()
        # What torch.cuda.graph() does, but that one waits for the device and gives all unused
        # memory back to the driver before each graph, only for the next body() to ask for it again.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                body()
            finally:
                graph.capture_end()
        return graph

    def _step(self, slots: Tensor) -> None:
        decoder, state = self._decoder, self._state
        batch = decode_batch(state, slots, np.zeros(0, np.int64), decoder.ops)
        state.lengths[self._spare].zero_()
        hidden = decoder.forward(batch, self._cache)
        scores = decoder.scores(hidden, out=self._scores[: len(slots)])
        decoder.ops.sample(scores, slots, *state.draws, out=self._tokens[: len(slots)])
