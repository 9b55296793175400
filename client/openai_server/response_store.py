"""Answers that clients of /v1/responses may read or continue later, in this process's memory."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

Key = tuple[Hashable, str]


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
    """At most `max_responses` answers of `max_bytes` together. With `max_responses` 0 nothing is
    stored. A key holds the answer's owner and id.

    While they are too many, one goes of the owner who has most of them; while they are too large,
    one of the owner who has most bytes: the one least recently used. So an owner loses none to
    others who have more.
    """

    def __init__(self, max_responses: int, max_bytes: int) -> None:
        self.max_responses = max_responses
        self.max_bytes = max_bytes
        self._by_key: OrderedDict[Key, StoredResponse] = OrderedDict()
        self._size = 0

    def put(self, key: Key, stored: StoredResponse) -> None:
        """Store an answer under a new key. One that is too large by itself is not stored."""
        if stored.size > self.max_bytes:
            return
        self._by_key[key] = stored
        self._size += stored.size
        while (too_many := len(self._by_key) > self.max_responses) or self._size > self.max_bytes:
            parts = Counter[Hashable]()
            for (owner, _), each in self._by_key.items():
                parts[owner] += 1 if too_many else each.size
            most = max(parts, key=parts.__getitem__)
            self.delete(next(key for key in self._by_key if key[0] == most))

    def get(self, key: Key) -> StoredResponse | None:
        stored = self._by_key.get(key)
        if stored is not None:
            self._by_key.move_to_end(key)
        return stored

    def delete(self, key: Key) -> bool:
        """Whether there was such an answer."""
        stored = self._by_key.pop(key, None)
        if stored is None:
            return False
        self._size -= stored.size
        return True
