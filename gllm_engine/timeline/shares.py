"""Where the time of each rank's device went: shares of a period that add up to 1.

Every moment of a rank is the first of these that holds:

    communication  the device is in a collective, or receives activations that have been computed
    busy           the device computes
    bubble         the device waits for activations or tokens that another stage still computes
    no work        it is idle, and no sequence is live
    host-bound     it is idle, and the rank's or the engine's host is at work
    bubble         it is idle, and both hosts wait for other stages

With a single stage nobody waits for another one, so idle time with work is host-bound.

Every moment of a host is in one of its activities, so their shares add up to 1 too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import msgspec

from gllm_engine.timeline import activity
from gllm_engine.timeline.intervals import Interval, Times, length, minus, overlap, union
from gllm_engine.types import Span

_ENGINE_WORKS = {activity.PLAN, activity.DISPATCH, activity.COMMIT, activity.BETWEEN_STEPS}
_RANK_WORKS = {activity.MOVE, activity.PREPARE, activity.LAUNCH, activity.SAMPLE, activity.SEND}
_LAUNCHES = {activity.LAUNCH, activity.SAMPLE}
_COMPUTES = activity.COMPUTE, activity.SAMPLE
_CLOCKS_NS = 100_000  # how far the clocks of two devices may be apart

Step = tuple[tuple[int, ...], float]  # Span.work, seconds


class Share(msgspec.Struct, frozen=True):
    """Shares of one rank's device, each 0 to 1, over `seconds`.

    `launching`: the part of busy in which the host was still launching the same step. The device
    may have waited between kernels in it.
    """

    rank: int
    stage: int
    seconds: float
    steps: int
    busy: float
    communication: float
    bubble: float
    host_bound: float
    no_work: float
    launching: float


class Summary(msgspec.Struct, frozen=True):
    """`shares`: of each rank's device. `hosts`: by process, its host's share in each activity."""

    shares: list[Share]
    hosts: dict[str, dict[str, float]]

    def tables(self) -> list[list[list[str]]]:
        """Two tables in percent, of devices and of hosts; the first row of each is the header."""
        return [_devices_table(self.shares), _hosts_table(self.hosts)]


def host_shares(spans: Sequence[Span], period: Interval) -> dict[str, float]:
    """The share of each of a host's activities in `period`."""
    found: dict[str, float] = {}
    whole = period[1] - period[0]
    for span in spans:
        if span.track == "host":
            inside = max(0, min(span.end, period[1]) - max(span.begin, period[0]))
            found[span.name] = found.get(span.name, 0.0) + inside / whole
    return found


def find_shares(
    engine: Sequence[Span], ranks: Sequence[Sequence[Span]], stages: int, period: Interval
) -> list[Share]:
    """The shares of each rank over `period`, in the order of `ranks`, whose index is the rank."""
    per_stage = len(ranks) // stages
    of_engine = _Spans(engine, period)
    found = []
    before = _Spans([], period)
    by_rank = [_Spans(spans, period) for spans in ranks]
    for rank, spans in enumerate(by_rank):
        if rank >= per_stage:
            before = by_rank[rank - per_stage]
        parts = _parts(of_engine, spans, before, [period])
        if stages == 1:
            parts["host_bound"] += parts["bubble"]
            parts["bubble"] = 0
        whole = period[1] - period[0]
        found.append(
            Share(
                rank,
                rank // per_stage,
                whole / 1e9,
                sum(1 for _, end in spans.computed.values() if end <= period[1]),
                **{name: part / whole for name, part in parts.items()},
            )
        )
    return found


def stage_steps(
    engine: Sequence[Span], ranks: Sequence[Sequence[Span]], stages: int
) -> list[list[Step]]:
    """The steps of each stage, on its first rank.

    A step begins when it is planned, the stage has ended the step before, and its input is there:
    activations, or the tokens of a step before. So what the hosts do then counts. The first few
    steps are left out, and all that follow a step that computes nothing.
    """
    planned = {span.step: span.begin for span in engine if span.name == activity.DISPATCH}
    firsts = ranks[:: len(ranks) // stages]
    times = [_Spans(rank, (0, 1 << 63)).computed for rank in firsts]
    found: list[list[Step]] = []
    for stage, of_stage in enumerate(times):
        works = {span.step: span.work for span in firsts[stage] if span.work}
        before = times[stage - 1]  # of the first stage the last one, which samples
        found.append([])
        for step, (begin, end) in of_stage.items():
            near = range(step - stages, step + 1)
            if step - 1 in of_stage and before.keys() >= {*near}:
                ready = [before[s][1] for s in near if before[s][1] < begin + _CLOCKS_NS]
                since = min(begin, max(planned.get(step, 0), of_stage[step - 1][1], *ready))
                found[-1].append((works[step], (end - since) / 1e9))
    return found


def _devices_table(shares: Sequence[Share]) -> list[list[str]]:
    names = ("busy", "communication", "bubble", "host_bound", "no_work", "launching")
    header = ["rank", "stage", "steps", "s", *(name.replace("_", "-") for name in names)]
    rows = [header]
    for share in shares:
        row = [str(share.rank), str(share.stage), str(share.steps), f"{share.seconds:.2f}"]
        rows.append(row + [f"{getattr(share, name):.1%}" for name in names])
    return rows


def _hosts_table(hosts: dict[str, dict[str, float]]) -> list[list[str]]:
    names = list(dict.fromkeys(name for shares in hosts.values() for name in shares))
    rows = [["host of", *names]]
    for process, shares in hosts.items():
        rows.append([process, *(f"{shares.get(name, 0.0):.1%}" for name in names)])
    return rows


class _Spans:
    """The spans of one process in a period, by name.

    `computed`: from the first to the last computation of each step on the device.
    """

    def __init__(self, spans: Iterable[Span], period: Interval) -> None:
        self._host: defaultdict[str, list[Span]] = defaultdict(list)
        self._device: defaultdict[str, list[Span]] = defaultdict(list)
        for span in spans:
            if span.end > period[0] and span.begin < period[1] and span.track != "results":
                by_name = self._host if span.track == "host" else self._device
                by_name[span.name].append(span)
        self.computed = _extents(self.on_device(*_COMPUTES))

    def on_host(self, *names: str) -> list[Span]:
        return [span for name in names for span in self._host[name]]

    def on_device(self, *names: str) -> list[Span]:
        return [span for name in names for span in self._device[name]]


def _parts(engine: _Spans, rank: _Spans, before: _Spans, period: Times) -> dict[str, int]:
    """Nanoseconds of each kind. `before`: the rank that sends activations to `rank`."""
    received = rank.on_device(activity.RECEIVE)
    transfers = []
    for span in received:
        _, sent = before.computed.get(span.step, (0, span.end))
        transfers.append((max(span.begin, sent), span.end))
    collectives = _intervals(rank.on_device(activity.COLLECTIVE))
    communication = union([*collectives, *_not_empty(transfers)])
    computing = union(_intervals(rank.on_device(*_COMPUTES)))
    waiting = union(_intervals(received))
    idle = minus(minus(minus(period, communication), computing), waiting)
    no_work = overlap(idle, union(_intervals(engine.on_host(activity.NO_WORK))))
    at_work = engine.on_host(*_ENGINE_WORKS) + rank.on_host(*_RANK_WORKS)
    host_bound = overlap(minus(idle, no_work), union(_intervals(at_work)))
    busy = overlap(minus(computing, communication), period)
    waits = minus(minus(waiting, communication), computing)
    rest = minus(minus(idle, no_work), host_bound)
    return {
        "busy": length(busy),
        "communication": length(overlap(communication, period)),
        "bubble": length(overlap(waits, period)) + length(rest),
        "host_bound": length(host_bound),
        "no_work": length(no_work),
        "launching": length(overlap(busy, _while_launching(rank))),
    }


def _while_launching(rank: _Spans) -> Times:
    """When the device computed a step that the host was still launching."""
    launched = _extents(rank.on_host(*_LAUNCHES))
    found = []
    for step, (begin, end) in rank.computed.items():
        first, last = launched.get(step, (begin, begin))
        found.append((max(begin, first), min(end, last)))
    return union(_not_empty(found))


def _extents(spans: Iterable[Span]) -> dict[int, Interval]:
    """By step: from the first begin to the last end of its spans."""
    found: dict[int, Interval] = {}
    for span in spans:
        begin, end = found.get(span.step, (span.begin, span.end))
        found[span.step] = min(begin, span.begin), max(end, span.end)
    return found


def _intervals(spans: Iterable[Span]) -> Times:
    return [(span.begin, span.end) for span in spans]


def _not_empty(intervals: Iterable[Interval]) -> Times:
    return [(begin, end) for begin, end in intervals if begin < end]
