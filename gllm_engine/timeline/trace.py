"""The spans of the engine and of all ranks on one clock, and the file they are written to.

The file is a Chrome trace (JSON, which ui.perfetto.dev opens): a process per rank, a thread per
track. Its "otherData" hold the summary, and what each stage's steps took. Ranks on one host share
its monotonic clock. The clock of another host is aligned by the time of day, which is as exact as
the hosts' agreement on it.
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
from gllm_engine.timeline import activity
from gllm_engine.timeline.intervals import Interval
from gllm_engine.timeline.shares import Summary, find_shares, host_shares, stage_steps
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


class _Complete(msgspec.Struct, tag_field="ph", tag="X", omit_defaults=True):
    """A span in the format of the trace, whose unit is a microsecond."""

    name: str
    pid: int
    tid: int
    ts: float
    dur: float
    args: dict[str, int] | None = None


class Timeline:
    """`missing`: ranks whose spans are not there; nothing is told of them."""

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
        self._spans = [rank.spans for rank in self._ranks]

    def summary(self, period: Interval | None = None) -> Summary:
        """The shares of all devices and hosts over `period`, in nanoseconds of this host's
        monotonic clock.

        Default: from the engine's first step to its last. It begins later if spans were dropped.
        Empty if the engine took no step in it.
        """
        host = [
            span
            for span in self._engine.spans
            if span.track == "host" and span.name != activity.NO_WORK
        ]
        begin = max(rank.complete_from for rank in [self._engine, *self._ranks])
        end = 0
        if host:
            begin = max(begin, host[0].begin if period is None else period[0])
            end = host[-1].end if period is None else period[1]
        if begin >= end:
            return Summary([], {})
        whole = begin, end
        hosts = {name: host_shares(spans, whole) for name, spans in self._processes().items()}
        shares = find_shares(self._engine.spans, self._spans, self._stages, whole)
        return Summary([share for share in shares if share.rank not in self.missing], hosts)

    def write(self, path: str) -> Summary:
        """Write the Chrome trace; returns the summary in it. Raises OSError."""
        summary = self.summary()
        spans = [span for spans in self._processes().values() for span in spans]
        origin = min((span.begin for span in spans), default=0)
        trace: dict[str, Any] = {
            "traceEvents": list(self._events(origin)),
            "displayTimeUnit": "ms",
            "otherData": {
                "clock": self._clock,
                "begin_ns": origin,
                "summary": summary,
                "steps": stage_steps(self._engine.spans, self._spans, self._stages),
            },
        }
        Path(path).write_bytes(msgspec.json.encode(trace))
        return summary

    def _processes(self) -> dict[str, list[Span]]:
        """The spans of each process by its name."""
        processes = {"engine": self._engine.spans} if self._has_workers else {}
        for rank, spans in enumerate(self._spans):
            if rank not in self.missing:
                processes[f"rank {rank}, stage {rank // self._per_stage}"] = spans
        return processes

    def _events(self, origin: int) -> Iterator[dict[str, Any] | _Complete]:
        for pid, (name, spans) in enumerate(self._processes().items(), 1):  # 0 is the idle process
            yield _about("process_name", pid, 0, {"name": name})
            yield _about("process_sort_index", pid, 0, {"sort_index": pid})
            for track in _TRACKS:
                tid = _thread(pid, track)
                yield _about("thread_name", pid, tid, {"name": track})
                yield _about("thread_sort_index", pid, tid, {"sort_index": tid})
            for span in spans:
                yield _event(span, pid, origin)


def _thread(pid: int, track: str) -> int:
    """A thread's number, which no other process has."""
    return 10 * pid + _TRACKS.index(track)


def _about(what: str, pid: int, tid: int, value: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": value}


def _event(span: Span, pid: int, origin: int) -> _Complete:
    args = {"step": span.step} if span.step >= 0 else None
    begin = (span.begin - origin) / 1000
    length = (span.end - span.begin) / 1000
    return _Complete(span.name, pid, _thread(pid, span.track), begin, length, args)


def _shifted(rank: RankSpans, wall_ns: int) -> RankSpans:
    """The spans of a rank of another host, on the engine's clock."""
    by = rank.wall_ns - wall_ns
    spans = [
        msgspec.structs.replace(span, begin=span.begin + by, end=span.end + by)
        for span in rank.spans
    ]
    return RankSpans(rank.rank, wall_ns, rank.complete_from + by, spans)
