"""Records what one process does, in a bounded number of spans.

The thread that makes the recorder is the host track: it says when it begins something else, so its
spans follow each other without gaps.
"""

from __future__ import annotations

import time
from collections import deque

from gllm_engine.types import RankSpans, Span

# Older spans are dropped. A step takes about ten, so a process keeps its last 13,000 steps, in
# 20 MB of memory.
MAX_SPANS = 1 << 17


class NoRecorder:
    """Records nothing."""

    is_on = False

    def mark(self, name: str, step: int = -1) -> None:
        """From now on the host does `name`."""

    def add(self, span: Span) -> None:
        """Add a span of another track than the host's."""

    def spans(self, rank: int) -> RankSpans:
        """What was done so far."""
        return _now(rank, 0, [])


class Recorder(NoRecorder):
    """Records one process. Any thread may call `add`, only the host's thread all else."""

    is_on = True

    def __init__(self, max_spans: int = MAX_SPANS) -> None:
        self._spans: deque[Span] = deque(maxlen=max_spans)
        self._doing: tuple[str, int, int] | None = None  # name, step, since when

    def mark(self, name: str, step: int = -1) -> None:
        now = time.monotonic_ns()
        if self._doing is not None:
            doing, of_step, since = self._doing
            self._spans.append(Span("host", doing, of_step, since, now))
        self._doing = name, step, now

    def add(self, span: Span) -> None:
        self._spans.append(span)

    def spans(self, rank: int) -> RankSpans:
        if self._doing is not None:  # what the host does now ends here, and goes on
            doing, of_step, _ = self._doing
            self.mark(doing, of_step)
        spans = list(self._spans.copy())  # another thread may add one during an iteration
        # Whatever was dropped had been added, so had ended, before this span was added.
        oldest = next((span.end for span in spans if span.track == "host"), 0)
        complete_from = oldest if len(spans) == self._spans.maxlen else 0
        return _now(rank, complete_from, spans)


def _now(rank: int, complete_from: int, spans: list[Span]) -> RankSpans:
    return RankSpans(rank, time.time_ns() - time.monotonic_ns(), complete_from, spans)


OFF = NoRecorder()
