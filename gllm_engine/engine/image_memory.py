"""The memory that images and videos take in a front end until their requests reach the engine.

Knows numbers of bytes only; who takes memory counts it before.
"""

from __future__ import annotations

import sys
from threading import Lock

from gllm_engine.engine.client import EngineUnavailable
from gllm_engine.sched import Amount, Room


class ImageMemory:
    """At most `most` bytes of all requests, or more of one alone. `held`: those counted now."""

    def __init__(self, most: int = sys.maxsize) -> None:
        self.held = 0
        self.room = Room(0, 0, most)
        self.lock = Lock()


class ImageShare:
    """What a request holds, or a part of the work for it. Threads may share it."""

    def __init__(self, memory: ImageMemory, request: ImageShare | None = None) -> None:
        self.memory = memory
        self._request = request or self
        self._held = 0  # of a request: with the parts of its work
        self._own = 0
        self._is_closed = False

    def reserve(self, size: int) -> None:
        """Count bytes until `close`, if that is not over. Raises EngineUnavailable for more than
        there is room for.
        """
        memory = self.memory
        with memory.lock:
            mine = self._request._held
            others = Amount(pixels=memory.held - mine)
            refusal = memory.room.refusal("", others, others, Amount(pixels=mine + size))
            if refusal is not None:
                raise EngineUnavailable(refusal)
            if not self._is_closed:
                self._own += size
                self._request._held += size
                memory.held += size

    def close(self, kept: int = 0) -> None:
        """Give back what is counted here. What parts hold is counted until they are closed.

        `kept`: bytes of a part that are the request's own from now on, if that is not over.
        """
        with self.memory.lock:
            request = self._request
            kept = 0 if request._is_closed else kept
            request._held += kept - self._own
            self.memory.held += kept - self._own
            self._own = 0
            self._is_closed = True
            request._own += kept
