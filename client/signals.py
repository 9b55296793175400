"""Signals counted instead of obeyed, while a block runs that must not be cut short.

Knows nothing of what is made of the count.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Signals:
    """Which stop signals have come."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, number: int, frame: object) -> None:
        self.count += 1


@contextmanager
def caught_signals(*numbers: int) -> Iterator[Signals]:
    """These signals, by default SIGTERM and SIGINT, are counted instead of ending the program."""
    signals = Signals()
    before = {n: signal.signal(n, signals) for n in numbers or (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
