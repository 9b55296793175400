"""Answers that clients of /v1/responses may read or continue later, in this process's memory."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """`response`: the response object. `items`: the whole conversation up to and with its output.

    Both are JSON text: small, and their size is known exactly. Each answer holds its conversation
    from the beginning, so that none depends on an earlier one that may be gone.
    """

    response: bytes
    items: bytes

    @property
    def size(self) -> int:
        return len(self.response) + len(self.items)


class ResponseStore:
    """At most `max_responses` answers of `max_bytes` together; the least recently used go first.

    With `max_responses` 0 nothing is stored.
    """

    def __init__(self, max_responses: int, max_bytes: int) -> None:
        self.max_responses = max_responses
        self.max_bytes = max_bytes
        self._by_id: OrderedDict[str, StoredResponse] = OrderedDict()
        self._size = 0

    def put(self, id: str, stored: StoredResponse) -> None:
        """Store an answer under a new id. One that is too large by itself is not stored."""
        if stored.size > self.max_bytes:
            return
        self._by_id[id] = stored
        self._size += stored.size
        while len(self._by_id) > self.max_responses or self._size > self.max_bytes:
            self.delete(next(iter(self._by_id)))

    def get(self, id: str) -> StoredResponse | None:
        stored = self._by_id.get(id)
        if stored is not None:
            self._by_id.move_to_end(id)
        return stored

    def delete(self, id: str) -> bool:
        """Whether there was such an answer."""
        stored = self._by_id.pop(id, None)
        if stored is None:
            return False
        self._size -= stored.size
        return True
