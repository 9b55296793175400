"""Counts signals while a block runs that a signal must not interrupt.

Knows nothing of how callers use the count.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Signals:
    """The number of stop signals received. `news`: readable from the first signal on."""

    def __init__(self) -> None:
        self.count = 0
        self.news = os.eventfd(0)

    def __call__(self, number: int, frame: object) -> None:
        self.count += 1
        os.eventfd_write(self.news, 1)


@contextmanager
def caught_signals(*numbers: int) -> Iterator[Signals]:
    """Count these signals (default: SIGTERM and SIGINT) while the block runs; do not end."""
    signals = Signals()
    before = {n: signal.signal(n, signals) for n in numbers or (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(signals.news)
