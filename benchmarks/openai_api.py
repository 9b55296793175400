"""An asynchronous client of any OpenAI server, for load and for evaluations.

This module owns HTTP, server-sent events and the API's JSON. It knows nothing of clocks or records.
A prompt of token ids goes to /v1/completions as it is. /v1/chat/completions takes text only, so
there it is one word for each id; the server's usage tells how many tokens that makes.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec

from gllm_client import GenerateError

# From a path under /v1 and a body to the answer; raises GenerateError.
Post = Callable[[str, dict[str, Any]], Awaitable[Any]]
PATHS = {"completions": "/completions", "chat": "/chat/completions"}
BLOCK_BYTES = 1 << 18  # read at a time


class Response(NamedTuple):
    """A part of an answer.

    `tokens`: output tokens that it adds to the answer's count. `is_output`: False for the usage at
    an answer's end, which has the tokens of the whole answer. `cached`: prompt tokens that the
    server took from its cache, if it tells.
    """

    tokens: int
    is_output: bool = True
    cached: int | None = None


class Usage(msgspec.Struct):
    completion_tokens: int = 0
    prompt_tokens_details: dict[str, Any] | None = None


class Choice(msgspec.Struct):
    delta: dict[str, Any] = {}
    finish_reason: str | None = None


class Event(msgspec.Struct):
    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Raise GenerateError in place of the errors of the connection and of JSON."""
    try:
        yield
    except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError) as error:
        raise GenerateError(f"the server fails: {error!r}") from None


class OpenAIClient:
    """Requests to one model of one server; use it in an async with statement.

    `url`: with or without /v1 at its end. `key_file`: holds the API key.
    """

    def __init__(
        self, url: str, model: str, api: str = "completions", key_file: str | Path | None = None
    ) -> None:
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._model = model
        self._api = api
        self._headers = {"Content-Type": "application/json"}
        if key_file:
            self._headers["Authorization"] = f"Bearer {Path(key_file).read_text().strip()}"
        self._events = msgspec.json.Decoder(Event)

    async def __aenter__(self) -> OpenAIClient:
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            connector=aiohttp.TCPConnector(limit=0),
            read_bufsize=BLOCK_BYTES,
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._session.close()

    async def is_ready(self, model: str) -> bool:
        """Whether the server lists the model. Raises GenerateError."""
        with _told():
            async with self._session.get(f"{self._url}/models") as answer:
                models = await self._read(answer)
        return any(each["id"] == model for each in models["data"])

    async def post(self, path: str, body: dict[str, Any], *, timeout: float) -> Any:
        """The answer to a request that does not stream. Raises GenerateError."""
        with _told():
            async with self._send(path, body, timeout) as answer:
                return await self._read(answer)

    async def ask(
        self, prompt: list[int], options: dict[str, Any], timeout: float
    ) -> AsyncIterator[Response]:
        """Stream one answer. `timeout`: seconds for all of it. Raises GenerateError."""
        if "images" in options:
            raise GenerateError("images: only a tritonserver is asked about them")
        body = options | {"stream": True, "stream_options": {"include_usage": True}}
        if self._api == "chat":
            body["messages"] = [{"role": "user", "content": " ".join(map(str, prompt))}]
        else:
            body["prompt"] = prompt
        usage = None
        with _told():
            async with self._send(PATHS[self._api], body, timeout) as answer:
                if answer.status != 200:
                    await self._read(answer)
                async for event in self._read_events(answer):
                    usage = event.usage or usage
                    if any(map(self._is_output, event.choices)):
                        yield Response(0)
        if usage is None:
            raise GenerateError("the stream has ended without its usage")
        details = usage.prompt_tokens_details or {}
        yield Response(usage.completion_tokens, False, details.get("cached_tokens"))

    def _is_output(self, choice: Choice) -> bool:
        """Whether it may hold tokens: a chat begins with a role alone, before any token."""
        if self._api == "completions" or choice.finish_reason:
            return True
        return any(value for key, value in choice.delta.items() if key != "role")

    def _send(self, path: str, body: dict[str, Any], timeout: float) -> Any:
        return self._session.post(
            self._url + path,
            data=msgspec.json.encode(body | {"model": self._model}),
            timeout=aiohttp.ClientTimeout(total=timeout),
        )

    async def _read(self, answer: aiohttp.ClientResponse) -> Any:
        """The JSON of an answer. Raises GenerateError with the server's words."""
        data = await answer.read()
        if answer.status != 200:
            text = data[:500].decode("utf-8", "replace")
            raise GenerateError(f"status {answer.status}: {text}", str(answer.status))
        return msgspec.json.decode(data)

    async def _read_events(self, answer: aiohttp.ClientResponse) -> AsyncIterator[Event]:
        """The events of a stream until [DONE]. Raises GenerateError for one that is an error."""
        rest = b""
        async for block in answer.content.iter_any():
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                if not data or data == line.strip():  # a blank line, a comment or another field
                    continue
                event = self._events.decode(data)
                if event.error is not None:
                    raise GenerateError(str(event.error))
                yield event
