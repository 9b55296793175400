"""Measures how long the device computes a step, by the device's clock, and tells the timeline.

Nothing waits for the device but seconds(). A recorded step has these spans; only compute and
sample count for seconds():

    host    | prepare | receive | launch ....... | sample | send |
    device            | receive ....... | compute ....... | sample |
                                           | collective |

On a GPU, times are events in the current stream. Collectives in a CUDA graph have none: they are a
part of compute.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gllm_engine.parallel import TensorParallel
from gllm_engine.timeline import NoRecorder, activity
from gllm_engine.types import Span

# A moment of the device's work, of the clock that gave it.
Moment = Any
# The GPU's clock drifts away from the host's by some microseconds a second.
_ANCHOR_EVERY_NS = 1_000_000_000
# Readings of both clocks for an anchor. One of them may take long: if the GPU computes for another
# process at that time, or the stream has its hardware queue in common with a busy one.
_READINGS = 4


class Clock(Protocol):
    """The clock of a device."""

    def now(self) -> Moment:
        """The moment at which the device has done all work launched so far. Does not wait."""
        ...

    def seconds(self, begin: Moment, end: Moment) -> float:
        """Wait until `end`; return the time since `begin`."""
        ...

    def anchor(self) -> Moment:
        """A moment of the last second whose time on the host's clock is known."""
        ...

    def times(self, anchor: Moment, moments: list[Moment]) -> list[int]:
        """The moments of one step, which has ended, in nanoseconds of the host's monotonic clock.

        Steps come in their order.
        """
        ...


class HostClock:
    """For a CPU: a call returns when its result is complete."""

    def now(self) -> Moment:
        return time.monotonic_ns()

    def seconds(self, begin: Moment, end: Moment) -> float:
        return float(end - begin) / 1e9

    def anchor(self) -> Moment:
        return None

    def times(self, anchor: Moment, moments: list[Moment]) -> list[int]:
        return moments


class _Anchor(NamedTuple):
    """An event that the GPU reached in [after, before], in nanoseconds of the host's clock."""

    event: torch.cuda.Event
    after: int
    before: int

    @property
    def at(self) -> int:
        return (self.after + self.before) // 2


class EventClock:
    """For a GPU: events in the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._anchor: _Anchor | None = None
        self._told_until = 0

    def now(self) -> Moment:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Moment, end: Moment) -> float:
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def anchor(self) -> _Anchor:
        """Once a second it waits some microseconds for events in streams without other work."""
        if self._anchor is None or time.monotonic_ns() - self._anchor.at > _ANCHOR_EVERY_NS:
            readings = [self._read_clocks() for _ in range(_READINGS)]
            self._anchor = min(readings, key=lambda one: one.before - one.after)
        return self._anchor

    def _read_clocks(self) -> _Anchor:
        # NCCL, whose streams wait for other ranks, has none of this priority.
        with torch.cuda.stream(torch.cuda.Stream(self._device, priority=-1)):
            after = time.monotonic_ns()
            event = self.now()
            event.synchronize()
        return _Anchor(event, after, time.monotonic_ns())

    def times(self, anchor: Moment, moments: list[Moment]) -> list[int]:
        ms = [anchor.event.elapsed_time(moment) for moment in moments]
        # A new anchor may be some microseconds off the last one: steps must not overlap.
        found = [max(self._told_until, anchor.at + round(each * 1e6)) for each in ms]
        self._told_until = max(found)
        return found


class StepTimer:
    """The time of one step, from its complete input to its last result.

    `work`: as Span.work.
    """

    work: tuple[int, ...] = ()

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began: Moment = None
        self._ended: Moment = None

    def mark(self, name: str) -> None:
        """The host and the device begin another part of the step."""

    def begin(self) -> None:
        """The step's input is complete; its computation begins."""
        self._began = self._clock.now()

    def end(self) -> None:
        """All work of the step has been launched."""
        self._ended = self._clock.now()

    def collective(self) -> AbstractContextManager[None]:
        """The device is in a collective in this context."""
        return nullcontext()

    def seconds(self) -> float:
        """Wait until the device has finished the step; return the step's duration."""
        return self._clock.seconds(self._began, self._ended)


class RecordedTimer(StepTimer):
    """Also records the spans of the step."""

    def __init__(self, clock: Clock, recorder: NoRecorder, step: int) -> None:
        super().__init__(clock)
        self._recorder = recorder
        self._step = step
        self._anchor = clock.anchor()
        self._parts: list[tuple[str, Moment]] = []  # name, begin; a part ends where the next begins
        self._collectives: list[tuple[Moment, Moment]] = []
        recorder.mark(activity.PREPARE, step)

    def mark(self, name: str) -> None:
        self._recorder.mark(name, self._step)
        self._parts.append((name, self._clock.now()))

    def begin(self) -> None:
        super().begin()
        self._recorder.mark(activity.LAUNCH, self._step)
        self._parts.append((activity.COMPUTE, self._began))

    def end(self) -> None:
        super().end()
        self._recorder.mark(activity.SEND, self._step)

    @contextmanager
    def collective(self) -> Iterator[None]:
        begin = self._clock.now()
        yield
        self._collectives.append((begin, self._clock.now()))

    def seconds(self) -> float:
        seconds = super().seconds()
        self._record()
        return seconds

    def _record(self) -> None:
        moments = [begin for _, begin in self._parts]
        moments.append(self._ended)
        for pair in self._collectives:
            moments += pair
        times = self._clock.times(self._anchor, moments)
        count = len(self._parts)
        ends = times[1 : count + 1]
        for (name, _), begin, end in zip(self._parts, times[:count], ends, strict=True):
            self._recorder.add(Span("device", name, self._step, begin, end, self.work))
        for begin, end in zip(times[count + 1 :: 2], times[count + 2 :: 2], strict=True):
            self._recorder.add(Span("device", activity.COLLECTIVE, self._step, begin, end))


class StepTimers:
    """Makes the timer of each step of a rank."""

    def __init__(self, device: torch.device, recorder: NoRecorder) -> None:
        self.recorder = recorder
        self.current: StepTimer | None = None  # of the latest step
        self._clock: Clock = EventClock(device) if device.type == "cuda" else HostClock()

    def start(self, step: int) -> StepTimer:
        if self.recorder.is_on:
            self.current = RecordedTimer(self._clock, self.recorder, step)
        else:
            self.current = StepTimer(self._clock)
        return self.current

    def collective(self) -> AbstractContextManager[None]:
        """The device is in a collective in this context, which may be of no step."""
        return nullcontext() if self.current is None else self.current.collective()


@dataclass
class RecordedRanks(TensorParallel):
    """Records collectives as parts of the steps that they are in."""

    timers: StepTimers

    def sum(self, x: Tensor) -> Tensor:
        with self.timers.collective():
            return super().sum(x)

    def max(self, x: Tensor) -> Tensor:
        with self.timers.collective():
            return super().max(x)

    def broadcast(self, x: Tensor) -> Tensor:
        with self.timers.collective():
            return super().broadcast(x)

    def gather(self, x: Tensor) -> Tensor:
        with self.timers.collective():
            return super().gather(x)
