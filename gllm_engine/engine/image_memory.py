"""The memory that images and videos take in a front end until their requests reach the engine.

Knows numbers of bytes only; who takes memory counts it before, and no more once it is free.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock

from gllm_engine.engine.client import EngineUnavailable
from gllm_engine.sched import Amount, Room


class ImageMemory:
    """At most `most` bytes of all requests, or more of one alone. Threads may share it.

    `held`: the bytes that are counted now.
    """

    def __init__(self, most: int = sys.maxsize) -> None:
        self.held = 0
        self._room = Room(0, 0, most)
        self._lock = Lock()

    def share(self) -> ImageShare:
        return ImageShare(self)

    def _count(self, share: ImageShare, size: int) -> None:
        others = Amount(pixels=self.held - share.held)
        more = Amount(pixels=share.held + size)
        refusal = self._room.refusal("", others, others, more) if size > 0 else None
        if refusal is not None:
            raise EngineUnavailable(refusal)
        self.held += size
        share.held += size


class ImageShare:
    """What one request has of an ImageMemory. `held`: as there."""

    def __init__(self, memory: ImageMemory) -> None:
        self.held = 0
        self._memory = memory
        self._kept = 0
        self._is_closed = False

    def keep(self, size: int) -> None:
        """Count bytes until `close`. Raises EngineUnavailable for more than there is room for."""
        with self._memory._lock:
            if not self._is_closed:
                self._memory._count(self, size)
                self._kept += size

    @contextmanager
    def reserving(self) -> Iterator[Callable[[int], None]]:
        """Yields a function that counts bytes until the end of the block; it raises as `keep`."""
        taken = 0

        def reserve(size: int) -> None:
            nonlocal taken
            with self._memory._lock:
                self._memory._count(self, size)
            taken += size

        try:
            yield reserve
        finally:
            with self._memory._lock:
                self._memory._count(self, -taken)

    def close(self) -> None:
        """The request is over. What its threads have reserved is counted until they end."""
        with self._memory._lock:
            self._memory._count(self, -self._kept)
            self._is_closed = True
