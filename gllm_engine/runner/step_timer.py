"""How long the device computes a step, by the clock of the device.

A timer starts when it is made. end() does not wait for the device, seconds() does.
"""

from __future__ import annotations

import time
from typing import Protocol

import torch


class StepTimer(Protocol):
    """The time of one step, from when it has all that it needs to its last result."""

    def end(self) -> None:
        """The step's work has all been launched."""
        ...

    def seconds(self) -> float:
        """Wait for the device to come to the end; how long the step took."""
        ...


class HostTimer:
    """For a CPU, which has computed what was launched when the call returns."""

    def __init__(self) -> None:
        self._began = self._ended = time.perf_counter()

    def end(self) -> None:
        self._ended = time.perf_counter()

    def seconds(self) -> float:
        return self._ended - self._began


class EventTimer:
    """For a GPU: two events in its current stream."""

    def __init__(self) -> None:
        self._began = torch.cuda.Event(enable_timing=True)
        self._ended = torch.cuda.Event(enable_timing=True)
        self._began.record()

    def end(self) -> None:
        self._ended.record()

    def seconds(self) -> float:
        self._ended.synchronize()
        return float(self._began.elapsed_time(self._ended)) / 1000
