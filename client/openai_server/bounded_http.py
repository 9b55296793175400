"""HTTP/1.1 whose clients are bounded: uvicorn waits for them, and httptools collects what they
send, without a limit.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 65_536  # bytes, of a trailer too
MAX_WAITING = 4096  # connections that wait for their clients; each may hold MAX_HEAD bytes


class BoundedHttp(HttpToolsProtocol):
    """Closes a connection that waits for its client for timeout_keep_alive seconds in which no
    request or piece of a body ends, or in which MAX_HEAD bytes come and none ends.
    """

    _unread = 0  # bytes since the last of these

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._watch()

    def data_received(self, data: bytes) -> None:
        while data and not self.transport.is_closing():
            if self._unread == MAX_HEAD:
                self.send_400_response(f"The head of the request is larger than {MAX_HEAD} bytes.")
            piece = data[: MAX_HEAD - self._unread]
            data = data[len(piece) :]
            self._unread += len(piece)
            super().data_received(piece)

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._watch()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def _watch(self) -> None:
        """Wait for the client anew, unless a whole request is under way, or one before another."""
        self._unread = 0
        # The server's connections that wait, the longest first, and their timers.
        waiting = self.app_state.setdefault("waiting", OrderedDict())
        if late := waiting.pop(self, None):
            late.cancel()
        if not (self.transport.is_closing() or self.pipeline) and (
            self.cycle is None or self.cycle.response_complete or self.cycle.more_body
        ):
            waiting[self] = self.loop.call_later(self.timeout_keep_alive, self.transport.abort)
            if len(waiting) > MAX_WAITING:
                first, late = waiting.popitem(last=False)
                late.cancel()
                first.transport.abort()
