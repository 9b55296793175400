"""Collects the events of one answer: visible text, thoughts, calls."""

from __future__ import annotations

import secrets
import string

from gllm_client.openai_server.events import CallArguments, CallBegin, Event, Reasoning, Text
from gllm_client.openai_server.formats.reader import Reader, Sink, Steps
from gllm_client.openai_server.formats.values import is_json

_ALPHABET = string.ascii_letters + string.digits
Prose = type[Text] | type[Reasoning]


class Answer:
    """`malformed`: texts that looked like calls and are none, and calls cut off or without JSON.

    `dropped`: calls after the first one, where one is allowed. `calls`: how many have begun.
    `visible`: text or a call has come. `thinking`: the text up to here ends inside thoughts.
    """

    def __init__(self, parallel: bool, short_ids: bool) -> None:
        self.malformed = 0
        self.dropped = 0
        self.calls = 0
        self.visible = False
        self.thinking = False
        self._parallel = parallel
        self._short_ids = short_ids
        self._events: list[Event] = []
        self._run: tuple[Prose | None, int] = (Text, 0)
        self._pieces: list[str] = []  # of one event
        self._kind: Prose | None = None
        self._space: list[str] = []  # white space, until it is known what follows
        self._gap: str | None = None  # what replaces white space at a mark

    def text(self, text: str) -> None:
        self._write(Text, text)

    def thought(self, text: str) -> None:
        self._write(Reasoning, text)

    def _write(self, kind: Prose, text: str) -> None:
        words = text.rstrip()
        space = text[len(words) :]
        if words:
            self.visible = self.visible or kind is Text
            if self._gap is None:
                self._push(kind, 0, "".join(self._space))
            else:
                words = words.lstrip()
                self._push(kind, 0, self._gap if kind is self._kind else "")
            self._push(kind, 0, words)
            self._kind = kind
            self._gap = None
            self._space = []
        self._space.append(space)

    def mark(self, gap: str = "") -> None:
        """A mark stands here. White space beside it is none of the text.

        `gap` comes instead if text of the same kind stands on both sides.
        """
        self._space = []
        self._gap = gap

    @property
    def has_words(self) -> bool:
        """Whether text has come since the last mark, and no white space alone."""
        return self._gap is None

    def malform(self, text: str) -> None:
        """What should be a call is none: it is text."""
        self.malformed += 1
        self.text(text)

    def begin(self, name: str, id: str = "") -> Sink:
        """Begin a call; its arguments go to what is returned."""
        self.mark()
        self.visible = True
        index = self.calls
        self.calls += 1
        if index and not self._parallel:
            self.dropped += 1
            return lambda text: None
        self._flush()
        self._events.append(CallBegin(index, _clean(id) or self._new_id(), _clean(name)))
        return lambda text: self._push(None, index, text)

    def read_arguments(self, reader: Reader, sink: Sink) -> Steps[None]:
        """Pass a JSON object on as it comes; it is counted if it turns out to be none."""
        pieces: list[str] = []

        def both(text: str) -> None:
            pieces.append(text)
            sink(text)

        yield from reader.json_value(both)
        if not is_json("".join(pieces), dict):
            self.malformed += 1

    def end(self) -> None:
        if self._gap is None:
            self._push(self._kind or Text, 0, "".join(self._space))

    def take(self) -> list[Event]:
        """The events since the last call, neighbours of one kind in one."""
        self._flush()
        events = self._events
        self._events = []
        return events

    def _push(self, kind: Prose | None, index: int, text: str) -> None:
        """A piece of text, or of a call's arguments if `kind` is None."""
        if (kind, index) != self._run:
            self._flush()
            self._run = (kind, index)
        self._pieces.append(text)

    def _flush(self) -> None:
        kind, index = self._run
        text = "".join(self._pieces)
        self._pieces = []
        if text:
            self._events.append(CallArguments(index, text) if kind is None else kind(text))

    def _new_id(self) -> str:
        if self._short_ids:
            return "".join(secrets.choice(_ALPHABET) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"


def _clean(text: str) -> str:
    """`text` without halves of surrogate pairs, which no answer can carry."""
    return text.encode(errors="replace").decode()
