"""What holds in every trace, wherever it was recorded."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

Event = dict[str, Any]
# How far two clocks may be apart, in microseconds: a GPU's is read through the host's.
CLOCKS_US = 300.0


def read_trace(path: Path) -> dict[str, Any]:
    """The trace in a file; what holds in every trace is checked."""
    trace: dict[str, Any] = json.loads(path.read_text())
    check_nesting(trace)
    check_order(trace)
    for share in trace["otherData"]["summary"]["shares"]:
        parts = ("busy", "communication", "bubble", "host_bound", "no_work")
        assert sum(share[part] for part in parts) == pytest.approx(1)
        assert all(0 <= share[part] <= 1 for part in parts)
        assert 0 <= share["launching"] <= share["busy"] + 1e-9
    return trace


def tracks(trace: dict[str, Any]) -> dict[tuple[str, str], list[Event]]:
    """The spans of each track by the names of process and track, in order."""
    names: dict[tuple[str, int], str] = {}
    found: defaultdict[tuple[str, str], list[Event]] = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["name"] in ("process_name", "thread_name"):
            assert event["ph"] == "M"
            key = event["tid"] if event["name"] == "thread_name" else event["pid"]
            names[event["name"], key] = event["args"]["name"]
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            process = names["process_name", event["pid"]]
            found[process, names["thread_name", event["tid"]]].append(event)
    return {
        key: sorted(events, key=lambda e: (e["ts"], -e["dur"])) for key, events in found.items()
    }


def check_nesting(trace: dict[str, Any]) -> None:
    """Of two spans of a track, one lies in the other or they do not overlap."""
    for key, events in tracks(trace).items():
        around: list[float] = []
        for event in events:
            end = event["ts"] + event["dur"]
            while around and around[-1] <= event["ts"] + 1e-3:
                around.pop()
            assert event["dur"] >= 0
            assert not around or end <= around[-1] + 1e-3, (key, event)
            around.append(end)


def check_order(trace: dict[str, Any]) -> None:
    """A device computes a step after its host began to launch it, and before the result is there.

    The other ranks of a stage may end after the first one, which reports.
    """
    by_track = tracks(trace)
    engine = next(iter({process: 0 for process, _ in by_track}))
    results = _steps(by_track[engine, "host"], "commit")
    stages: set[str] = set()
    for (process, track), events in by_track.items():
        if track != "device":
            continue
        launched = _steps(by_track[process, "host"], "prepare")
        stage = process.partition(", ")[2]
        for event in events:
            step = event["args"]["step"]
            if step:  # those of the start have no numbers of their own
                early = launched[step]["ts"] - event["ts"]
                assert early <= CLOCKS_US, (process, event, launched[step])
                late = event["ts"] + event["dur"] - results[step]["ts"]
                assert stage in stages or late <= CLOCKS_US, (process, event, results[step])
        stages.add(stage)


def covered(events: Iterable[Event], begin: float, end: float) -> float:
    """The share of a period, in microseconds, that is in a span."""
    total = 0.0
    until = begin
    for event in events:
        first = max(until, event["ts"])
        until = max(until, min(end, event["ts"] + event["dur"]))
        total += max(0.0, until - first)
    return total / (end - begin)


def _steps(events: Iterable[Event], name: str) -> dict[int, Event]:
    return {e["args"]["step"]: e for e in events if e["name"] == name}
