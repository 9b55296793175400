"""Writes an answer of OpenAI's completion APIs as JSON: whole, or as the events of a stream.

What chat and text completions share: the object around the choices, what stands beside a choice's
text, the usage, the events and their end.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any, Generic, TypeVar

import msgspec

from gllm_client.openai_server.body import Json
from gllm_client.openai_server.errors import as_api_error, openai_error
from gllm_client.openai_server.fields import Common, StreamOptions, Usage

Part = TypeVar("Part")
Numbered = tuple[int, Json]  # a choice's index and the fields of its next event
DONE = b"data: [DONE]\n\n"


class Choice:
    """What one choice has so far, or of a stream: what waits for its next event."""

    def __init__(self) -> None:
        self.started = False
        self.token_ids: list[int] = []
        self.logprobs: list[Any] = []  # a row for each token, in the API's form
        self.reason: str | None = None
        self.stop_reason: str | int | None = None


class Writer(ABC, Generic[Part]):
    """Writes one answer in one of the two forms.

    `parts`: the answer as it comes; `_take` keeps a part for the whole answer, `_numbered` turns
    it into events. `kinds`: the object's name, whole and in a stream.
    """

    def __init__(
        self,
        asked: Common,
        about: Json,
        kinds: tuple[str, str],
        num_prompt: int,
        parts: AsyncGenerator[Part, None],
    ) -> None:
        self._usage = Usage(num_prompt)
        self._about = about | {"created": int(time.time())}
        self._kinds = kinds
        self._parts = parts
        self._has_ids = asked.return_token_ids
        self._options = asked.stream_options or StreamOptions()

    async def whole(self) -> Json:
        """The object of the whole answer. Raises ApiError."""
        async with aclosing(self._parts) as parts:
            async for part in parts:
                self._take(part)
        body = self._about | {"object": self._kinds[0], "choices": self._written()}
        return body | {"usage": self._usage.show()}

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The events, all those of one part together, and [DONE].

        Raises ApiError before the first event; a later failure is an event itself.
        """
        head = b'data: %s,"choices":[' % _json(self._about | {"object": self._kinds[1]})[:-1]
        started = False
        try:
            async with aclosing(self._parts) as parts:
                async for part in parts:
                    events = [self._event(head, *numbered) for numbered in self._numbered(part)]
                    if events:
                        started = True
                        yield b"".join(events)
        except Exception as error:
            if not started:
                raise
            yield b"data: %s\n\n" % _json(openai_error(as_api_error(error)))
        else:
            if self._options.include_usage:
                yield b'%s],"usage":%s}\n\n' % (head, _json(self._usage.show()))
        yield DONE

    def _event(self, head: bytes, index: int, fields: Json) -> bytes:
        """An event with one choice. With usage in the stream every event has the field."""
        body = _json({"index": index} | fields)
        if not (self._options.include_usage or self._options.continuous_usage_stats):
            return b"%s%s]}\n\n" % (head, body)
        so_far = self._usage.show() if self._options.continuous_usage_stats else None
        return b'%s%s],"usage":%s}\n\n' % (head, body, _json(so_far))

    def _beside(self, choice: Choice, logprobs: Json | None) -> Json:
        """What stands beside a choice's text; `logprobs` None: not asked for."""
        fields: Json = {"logprobs": logprobs, "finish_reason": choice.reason}
        if choice.reason is not None:
            fields["stop_reason"] = choice.stop_reason
        if self._has_ids:
            fields["token_ids"] = choice.token_ids
        return fields

    @abstractmethod
    def _take(self, part: Part) -> object:
        """Keep a part of the answer."""

    @abstractmethod
    def _numbered(self, part: Part) -> Iterable[Numbered]:
        """What a part adds to the stream."""

    @abstractmethod
    def _written(self) -> list[Json]:
        """The choices of the whole answer."""


_json = msgspec.json.Encoder().encode
