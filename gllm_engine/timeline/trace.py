"""The spans of the engine and of all ranks on one clock, and the file they are written to.

The file is a Chrome trace (JSON, which ui.perfetto.dev opens): a process per rank, a thread per
track. Its "shares" hold the table. Ranks on one host share its monotonic clock. The clock of
another host is aligned by the time of day, which is as exact as the hosts' agreement on it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from gllm_engine.config import ConfigError, EngineConfig
from gllm_engine.files import shown
from gllm_engine.timeline.intervals import Interval
from gllm_engine.timeline.shares import Share, find_shares
from gllm_engine.types import RankSpans, Span

_TRACKS = ("host", "results", "device")
_ALIGNED = "all ranks are on one host and share its clock"
_BY_TIME_OF_DAY = (
    "ranks of other hosts are aligned by the time of day: waits between hosts are wrong by as much "
    "as the hosts disagree on it"
)


def check_writable(path: str) -> None:
    """Raise ConfigError unless a timeline can be written to `path`. Creates an empty file."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        os.close(descriptor)
    except OSError as error:
        raise ConfigError(
            f"timeline: {shown(path, most=500)} cannot be written ({error.strerror})"
        ) from None
    if not is_file:
        raise ConfigError(f"timeline: {shown(path, most=500)} is not a file")


class Timeline:
    """`missing`: ranks whose spans are not there."""

    def __init__(self, config: EngineConfig, engine: RankSpans, ranks: list[RankSpans]) -> None:
        """`ranks`: of the workers, in any order. Without workers the engine is rank 0."""
        self._stages = config.pipeline_parallel_size
        self._per_stage = config.tensor_parallel_size
        self._has_workers = config.num_ranks > 1
        self._clock = _ALIGNED if config.nnodes == 1 else _BY_TIME_OF_DAY
        self._engine = engine
        per_node = config.num_ranks // config.nnodes
        found = {0: engine}
        if self._has_workers:
            found = {
                rank.rank: rank if rank.rank < per_node else _shifted(rank, engine.wall_ns)
                for rank in ranks
            }
        self.missing = [rank for rank in range(config.num_ranks) if rank not in found]
        nothing = RankSpans(0, 0, 0, [])
        self._ranks = [found.get(rank, nothing) for rank in range(config.num_ranks)]

    def shares(self, period: Interval | None = None) -> list[Share]:
        """The shares of each rank over `period`, in nanoseconds of this host's monotonic clock.

        Default: from the engine's first step to its last, as far as no span was dropped. Empty if
        the engine took no step in it.
        """
        spans = self._engine.spans
        host = [span for span in spans if span.track == "host"]
        begin = max(rank.complete_from for rank in [self._engine, *self._ranks])
        end = 0
        if host:
            begin = max(begin, host[0].begin if period is None else period[0])
            end = host[-1].end if period is None else period[1]
        if begin >= end:
            return []
        inside = [_inside(rank.spans, (begin, end)) for rank in self._ranks]
        return find_shares(_inside(spans, (begin, end)), inside, self._stages, (begin, end))

    def write(self, path: str) -> list[Share]:
        """Write the Chrome trace; returns the shares in it. Raises OSError."""
        shares = self.shares()
        trace: dict[str, Any] = {
            "traceEvents": list(self._events()),
            "displayTimeUnit": "ms",
            "otherData": {"clock": self._clock, "shares": shares},
        }
        Path(path).write_bytes(msgspec.json.encode(trace))
        return shares

    def _events(self) -> Iterator[dict[str, Any]]:
        processes = {
            rank: (f"rank {rank}, stage {rank // self._per_stage}", spans.spans)
            for rank, spans in enumerate(self._ranks)
        }
        if self._has_workers:
            processes[-1] = "engine", self._engine.spans
        origin = min((s.begin for _, spans in processes.values() for s in spans), default=0)
        for rank, (name, spans) in sorted(processes.items()):
            pid = rank + 1  # Perfetto takes no process 0 for an ordinary one
            yield _about("process_name", pid, 0, {"name": name})
            yield _about("process_sort_index", pid, 0, {"sort_index": pid})
            for tid, track in enumerate(_TRACKS, 1):
                yield _about("thread_name", pid, tid, {"name": track})
                yield _about("thread_sort_index", pid, tid, {"sort_index": tid})
            for span in sorted(spans, key=lambda span: (span.begin, -span.end)):
                yield _event(span, pid, origin)


def _about(what: str, pid: int, tid: int, value: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": value}


def _event(span: Span, pid: int, origin: int) -> dict[str, Any]:
    """A complete event; the format's unit is a microsecond."""
    event: dict[str, Any] = {"ph": "X", "name": span.name, "cat": span.track, "pid": pid}
    event["tid"] = _TRACKS.index(span.track) + 1
    event["ts"] = (span.begin - origin) / 1000
    event["dur"] = (span.end - span.begin) / 1000
    if span.step >= 0:
        event["args"] = {"step": span.step}
    return event


def _inside(spans: list[Span], period: Interval) -> list[Span]:
    return [span for span in spans if span.end > period[0] and span.begin < period[1]]


def _shifted(rank: RankSpans, wall_ns: int) -> RankSpans:
    """The spans of a rank of another host, on the engine's clock."""
    by = rank.wall_ns - wall_ns
    spans = [
        Span(span.track, span.name, span.step, span.begin + by, span.end + by)
        for span in rank.spans
    ]
    return RankSpans(rank.rank, wall_ns, rank.complete_from + by, spans)
