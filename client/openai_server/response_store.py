"""Answers that clients of /v1/responses may read or continue later, in this process's memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

Owner = tuple[str, bytes]  # a tenant or a key, see Door.check

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


class _Part(OrderedDict[str, StoredResponse]):
    """The answers of an owner by id, the least recently used first."""

    size = 0  # bytes


class ResponseStore:
    """At most `max_responses` answers of `max_bytes` together; with 0 responses nothing is stored.

    While they are too many, one goes of the owner who has most of them; while they are too large,
    one of the owner who has most bytes: the one least recently used. So an owner loses none to
    others who have more.
    """

    def __init__(self, max_responses: int, max_bytes: int) -> None:
        self.max_responses = max_responses
        self.max_bytes = max_bytes
        self._parts: dict[Owner, _Part] = {}  # by owner; none is empty

    def put(self, owner: Owner, id: str, stored: StoredResponse) -> None:
        """Store an answer under a new id. One that is too large by itself is not stored."""
        if stored.size > self.max_bytes:
            return
        part = self._parts.setdefault(owner, _Part())
        part[id] = stored
        part.size += stored.size
        self._bound(self.max_responses, len)
        self._bound(self.max_bytes, attrgetter("size"))

    def _bound(self, most: int, size: Callable[[_Part], int]) -> None:
        while sum(map(size, self._parts.values())) > most:
            _, owner = max((size(part), owner) for owner, part in self._parts.items())
            self.delete(owner, next(iter(self._parts[owner])))

    def get(self, owner: Owner, id: str) -> StoredResponse | None:
        part = self._parts.get(owner, _Part())
        if id in part:
            part.move_to_end(id)
        return part.get(id)

    def delete(self, owner: Owner, id: str) -> bool:
        """Whether there was such an answer."""
        part = self._parts.get(owner, _Part())
        if id not in part:
            return False
        part.size -= part.pop(id).size
        if not part:
            del self._parts[owner]
        return True
