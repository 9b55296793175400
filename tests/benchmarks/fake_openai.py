"""An OpenAI server in the test's own process: it answers with what a function says.

Owns a thread with a loop of its own, and remembers the requests. Bodies are sent as they are, in as
many writes as the function gives; nothing is generated.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

# From path and body to a status and the parts of the answer's body.
Answer = Callable[[str, dict[str, Any]], tuple[int, list[bytes]]]
MODEL = "m"


class Asked(NamedTuple):
    path: str
    headers: dict[str, str]  # by lower-case name
    body: dict[str, Any]


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def usage(tokens: int, cached: int | None = None) -> bytes:
    """The last event of a stream, and what ends it."""
    about: dict[str, Any] = {"prompt_tokens": 9, "completion_tokens": tokens}
    if cached is not None:
        about["prompt_tokens_details"] = {"cached_tokens": cached}
    return event(choices=[], usage=about) + b"data: [DONE]\n\n"


def told(**fields: Any) -> tuple[int, list[bytes]]:
    """A whole answer that is no stream."""
    return 200, [json.dumps(fields).encode()]


class FakeOpenAI:
    """Serves while in a with statement; `url` is its address."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._open: set[asyncio.StreamWriter] = set()
        self.asked: list[Asked] = []

    def __enter__(self) -> FakeOpenAI:
        self._thread.start()
        started = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(started, self._loop).result()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *exc: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self) -> None:
        self._server.close()
        for writer in self._open:
            writer.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await self._respond(head.decode(), reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            self._open.discard(writer)
            writer.close()

    async def _respond(
        self, head: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        request, *lines = head.strip().split("\r\n")
        pairs = (line.split(": ", 1) for line in lines)
        headers = {name.lower(): value for name, value in pairs}
        data = await reader.readexactly(int(headers.get("content-length", 0)))
        path = request.split()[1]
        if path == "/v1/models":
            status, parts = told(data=[{"id": MODEL}])
        else:
            body = json.loads(data)
            self.asked.append(Asked(path, headers, body))
            status, parts = self._answer(path, body)
        length = sum(map(len, parts))
        writer.write(f"HTTP/1.1 {status} Status\r\nContent-Length: {length}\r\n\r\n".encode())
        for part in parts:
            writer.write(part)
            await writer.drain()
