"""Several streams at once, each on a thread and a connection of its own, and how each ended."""

from __future__ import annotations

import threading
import time
from typing import Any

from live import WAIT_S, Server, wait_for

from gllm_client import GenerateError
from gllm_client.client import SyncClient


class Stream:
    """One answer being read. `error` or `finish_reason` is set once it has ended."""

    def __init__(self, address: str, model: str, request_id: str, options: dict[str, Any]) -> None:
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.ended_at: float | None = None  # time.monotonic()
        self._client = SyncClient(address)
        self._thread = threading.Thread(
            target=self._read, args=(model, request_id, options), daemon=True
        )
        self._thread.start()

    def _read(self, model: str, request_id: str, options: dict[str, Any]) -> None:
        try:
            for chunk in self._client.generate(model=model, request_id=request_id, **options):
                self.num_tokens += chunk.num_output_tokens
                self.finish_reason = chunk.finish_reason
        except (GenerateError, ValueError) as error:
            self.error = str(error)
        self.ended_at = time.monotonic()

    def close(self) -> None:
        self._client.close()
        self._thread.join(WAIT_S)

    def __repr__(self) -> str:
        return f"<{self.num_tokens} tokens, {self.finish_reason}, {self.error}>"


class Streams:
    """`num` streams of exactly `max_tokens` tokens each, all of which have begun.

    Use it in a with statement: those still open at its end are cancelled.
    """

    def __init__(self, server: Server, model: str, num: int, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        options = {"prompt": "Once upon", "max_tokens": max_tokens, "ignore_eos": True}
        self.all = [
            Stream(server.grpc, model, f"stream-{i}", options | {"seed": i}) for i in range(num)
        ]

    def __enter__(self) -> Streams:
        begun = lambda: all(s.num_tokens or s.error for s in self.all)  # noqa: E731
        wait_for(begun, f"every stream has begun: {self.all}")
        return self

    def __exit__(self, *exc: object) -> None:
        for stream in self.all:
            stream.close()

    @property
    def open(self) -> list[Stream]:
        return [stream for stream in self.all if stream.ended_at is None]

    @property
    def whole(self) -> list[Stream]:
        """Those that have come to their exact end."""
        return [
            stream
            for stream in self.all
            if stream.error is None
            and stream.ended_at is not None
            and (stream.num_tokens, stream.finish_reason) == (self.max_tokens, "length")
        ]

    @property
    def failed(self) -> list[Stream]:
        return [stream for stream in self.all if stream.error is not None]

    def wait(self, timeout_s: float = WAIT_S) -> None:
        """Until all have ended, in whichever way."""
        wait_for(lambda: not self.open, "every stream has ended", timeout_s)

    def wait_still(self, still_s: float = 0.3) -> None:
        """Until no stream has got anything for a while, as when the engine is stopped."""
        last, since = -1, 0.0

        def still() -> bool:
            nonlocal last, since
            count = sum(stream.num_tokens for stream in self.all)
            if count != last:
                last, since = count, time.monotonic()
            return time.monotonic() - since > still_s

        wait_for(still, "the streams stand still")

    def wait_whole(self, timeout_s: float = WAIT_S) -> None:
        """Until all have ended, none short of its last token and none with an error."""
        self.wait(timeout_s)
        assert self.whole == self.all
