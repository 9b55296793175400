"""The parts of an answer as its events bring them: text, thoughts and calls in their order.

For APIs that stream an answer as a list of parts, each of which begins, goes on and is done.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal

from gllm_client.openai_server.body import Json
from gllm_client.openai_server.errors import ApiError, as_api_error
from gllm_client.openai_server.events import (
    CallArguments,
    CallBegin,
    End,
    Event,
    Reasoning,
    Text,
    Tokens,
)
from gllm_client.openai_server.generation import Answer
from gllm_client.openai_server.logprobs import chat_logprob

Kind = Literal["text", "thoughts", "call"]


@dataclass(slots=True)
class Part:
    """`logprobs`: of the tokens of a text."""

    kind: Kind
    index: int  # among the parts
    call: CallBegin | None = None
    texts: list[str] = field(default_factory=list)
    logprobs: list[Json] = field(default_factory=list)
    is_cut: bool = False  # by the limit of tokens

    @property
    def text(self) -> str:
        return "".join(self.texts)


@dataclass(frozen=True, slots=True)
class Step:
    """A part begins, goes on by `text` or is done."""

    what: Literal["begin", "text", "done"]
    part: Part
    text: str = ""
    logprobs: list[Json] = field(default_factory=list)


class Parts:
    """Collects one choice. `all`: the parts so far, of which only the last may not be done."""

    def __init__(self, top_logprobs: int = 0) -> None:
        self.all: list[Part] = []
        self.end: End | None = None
        self.num_tokens = 0
        self.num_reasoning = 0
        self._top_logprobs = top_logprobs
        self._is_open = False
        self._logprobs: list[Json] = []  # of tokens whose text has not come yet

    def add(self, event: Event) -> Iterator[Step]:
        """What the event means for the parts, each step before the next. To be read to its end."""
        match event:
            case Text(text):
                yield from self._extend("text", text)
            case Reasoning(text):
                yield from self._extend("thoughts", text)
            case CallBegin():
                yield from self._begin("call", event)
            case CallArguments(_, text):
                yield from self._extend("call", text)
            case Tokens():
                self._count(event)
            case End():
                self.end = event
                yield from self._done(event.reason == "length")

    def _count(self, tokens: Tokens) -> None:
        self.num_tokens += len(tokens.ids)
        self.num_reasoning += tokens.num_reasoning
        if tokens.logprobs is not None:
            pairs = list(zip(tokens.ids, tokens.logprobs, strict=True))[tokens.num_reasoning :]
            self._logprobs += [chat_logprob(id, entry, self._top_logprobs) for id, entry in pairs]

    def _extend(self, kind: Kind, text: str) -> Iterator[Step]:
        if not self._is_open or self.all[-1].kind != kind:
            yield from self._begin(kind)
        part = self.all[-1]
        part.texts.append(text)
        logprobs = self._logprobs
        self._logprobs = []
        if kind == "text":
            part.logprobs += logprobs
        yield Step("text", part, text, logprobs)

    def _begin(self, kind: Kind, call: CallBegin | None = None) -> Iterator[Step]:
        yield from self._done()
        self._is_open = True
        if kind != "text":
            self._logprobs = []  # of the marks before the part
        self.all.append(Part(kind, len(self.all), call))
        yield Step("begin", self.all[-1])

    def _done(self, is_cut: bool = False) -> Iterator[Step]:
        if self._is_open:
            self._is_open = False
            self.all[-1].is_cut = is_cut
            yield Step("done", self.all[-1])


async def collect(answer: Answer, write: Callable[[Event], Iterable[Json]]) -> None:
    """Write all events of the answer's only choice. Raises ApiError."""
    async with aclosing(answer):
        async for batch in answer.batches():
            for _, event in batch:
                list(write(event))


async def relay(
    answer: Answer,
    begin: Callable[[], list[Json]],
    write: Callable[[Event], Iterable[Json]],
    end: Callable[[ApiError | None], list[Json]],
    encode: Callable[[Json], bytes],
) -> AsyncGenerator[bytes, None]:
    """Stream the answer's only choice, after the API's first and before its last events.

    `end` gets the error of an answer that fails half way. One that fails at once raises ApiError.
    """
    begun = False
    failure = None
    try:
        async with aclosing(answer):
            async for batch in answer.batches():
                events = [] if begun else begin()
                begun = True
                events += [made for _, event in batch for made in write(event)]
                yield b"".join(map(encode, events))
    except Exception as error:
        if not begun:
            raise
        failure = as_api_error(error)
    yield b"".join(map(encode, end(failure)))
