"""Measures how long the device computes a step, by the device's clock.

A timer starts at its construction. end() does not wait for the device; seconds() does.
"""

from __future__ import annotations

import time
from typing import Protocol

import torch


class StepTimer(Protocol):
    """The time of one step, from its complete input to its last result."""

    def end(self) -> None:
        """Mark the end of the step: all its work has been launched."""
        ...

    def seconds(self) -> float:
        """Wait until the device has finished the step; return the step's duration."""
        ...


class HostTimer:
    """For a CPU: a call returns when its result is complete."""

    def __init__(self) -> None:
        self._began = self._ended = time.perf_counter()

    def end(self) -> None:
        self._ended = time.perf_counter()

    def seconds(self) -> float:
        return self._ended - self._began


class EventTimer:
    """For a GPU: two events in the current stream."""

    def __init__(self) -> None:
        self._began = torch.cuda.Event(enable_timing=True)
        self._ended = torch.cuda.Event(enable_timing=True)
        self._began.record()

    def end(self) -> None:
        self._ended.record()

    def seconds(self) -> float:
        self._ended.synchronize()
        return float(self._began.elapsed_time(self._ended)) / 1000
