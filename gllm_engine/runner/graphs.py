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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gllm_engine.model import Decoder
from gllm_engine.runner.batch import Rows, decode_batch
from gllm_engine.runner.state import State, pack

_log = logging.getLogger(__name__)


def row_counts(max_rows: int) -> list[int]:
    """For which numbers of rows there are graphs, ascending; at most an eighth is spare from 64 on
    (and where it is more, reading the weights takes all the time anyway).
    """
    counts = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 512, 32)]
    counts += range(512, 2049, 64)
    return [n for n in counts if n < max_rows] + [max_rows]


@dataclass(frozen=True)
class _Graph:
    slots: Tensor  # [rows]
    plans: dict[int | None, Any]
    graph: torch.cuda.CUDAGraph


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
        self._pool = torch.cuda.graph_pool_handle()
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
        slots = np.full(len(graph.slots), self._spare)
        context_lens = np.ones(len(slots), np.int64)
        slots[:n], context_lens[:n] = rows.slots_cpu, rows.context_lens_cpu
        graph.slots.copy_(pack(self._decoder.device, slots), non_blocking=True)
        self._decoder.refresh(graph.plans, context_lens, self._cache)
        graph.graph.replay()
        return graph.slots[:n], self._scores[:n], self._tokens[:n]

    def _graph(self, num_rows: int) -> _Graph:
        return self._graphs[bisect_left(self._counts, num_rows)]

    def _capture(self, num_rows: int) -> _Graph:
        device = self._decoder.device
        slots = torch.full((num_rows,), self._spare, dtype=torch.int64, device=device)
        max_pages = self._state.page_table.shape[1]
        plans = self._decoder.fixed_plans(num_rows, max_pages)
        self._decoder.refresh(plans, np.ones(num_rows, np.int64), self._cache)
        return _Graph(slots, plans, self._record(lambda: self._step(slots, plans)))

    def _record(self, body: Callable[[], None]) -> torch.cuda.CUDAGraph:
        body()  # compiles kernels and creates handles, which must not happen while recording
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            body()
        return graph

    def _step(self, slots: Tensor, plans: dict[int | None, Any]) -> None:
        decoder, state = self._decoder, self._state
        batch = decode_batch(state, slots, np.zeros(0, np.int64), decoder.ops)
        state.lengths[self._spare].zero_()
        listed = {
            window: plan.listing(batch.page_table, slots, batch.cache_index)
            for window, plan in plans.items()
        }
        hidden = decoder.forward(batch, self._cache, listed)
        scores = decoder.scores(hidden, out=self._scores[: len(slots)])
        decoder.ops.sample(scores, slots, *state.draws, out=self._tokens[: len(slots)])
