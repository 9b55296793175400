"""Turns the text of an answer into events, as it comes.

What is malformed is never an error: it is text, and counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gllm_client.openai_server.conversation import Tool
from gllm_client.openai_server.events import Event
from gllm_client.openai_server.formats import channels, python_values
from gllm_client.openai_server.formats.answer import Answer
from gllm_client.openai_server.formats.reader import Malformed, Marks, Reader, Sink, Steps, marks
from gllm_client.openai_server.formats.table import Spelling, Thoughts
from gllm_client.openai_server.formats.values import (
    definition,
    is_json,
    json_string,
    string_part,
    to_json,
    types_of,
)

_MAX_NAME = 256  # characters of a function's name; what is longer is none
_KEYS = ("name", "arguments", "parameters", "id", "type")


class OutputParser:
    """The events of one answer: feed() its text as it comes, then finish()."""

    def __init__(
        self,
        spelling: Spelling | None,
        thoughts: Thoughts | None,
        tools: Sequence[Tool],
        in_thoughts: bool,
        special_tokens: Sequence[str],
        parallel: bool,
    ) -> None:
        self._spelling = spelling or Spelling("none")
        self._thoughts = thoughts
        self._tools: Mapping[str, Any] = {tool.name: tool.parameters for tool in tools}
        self._special = tuple(special_tokens)
        self._reader = Reader()
        self._answer = Answer(parallel, self._spelling.short_ids)
        self._answer.thinking = in_thoughts
        self._steps = self._read()
        next(self._steps)

    @property
    def in_thoughts(self) -> bool:
        """Whether the text up to here ends inside thoughts."""
        return self._answer.thinking

    @property
    def malformed(self) -> int:
        """Texts that looked like calls and are none, and calls cut off or without JSON."""
        return self._answer.malformed

    @property
    def dropped(self) -> int:
        """Calls after the first one, where one is allowed."""
        return self._answer.dropped

    def feed(self, text: str) -> list[Event]:
        self._reader.add(text)
        next(self._steps)
        return self._answer.take()

    def finish(self) -> list[Event]:
        self._reader.end()
        next(self._steps, None)
        self._answer.end()
        return self._answer.take()

    def _read(self) -> Steps[None]:
        yield
        if self._spelling.kind == "channels":
            return (
                yield from channels.read(self._reader, self._answer, self._tools, self._special)
            )
        triggers = self._spelling.triggers if self._tools else ()
        opening = (self._thoughts.begin,) if self._thoughts else ()
        stops = marks(*triggers, *opening, *self._special)
        if self._answer.thinking:
            self._answer.mark()
            yield from self._read_thoughts(triggers)
        elif self._spelling.bare and self._tools:
            yield from self._read_bare()
        while mark := (yield from self._reader.upto(stops, self._answer.text)):
            if mark in triggers:
                yield from self._attempt(mark)
            elif mark in opening and not self._answer.visible:
                self._answer.mark()
                yield from self._read_thoughts(triggers)
            elif mark not in self._special:
                self._answer.text(mark)

    def _read_thoughts(self, triggers: tuple[str, ...]) -> Steps[None]:
        """Read thoughts and their end, or the mark of a call if that is a special token."""
        assert self._thoughts is not None
        end = self._thoughts.end
        self._answer.thinking = True
        calls = tuple(mark for mark in triggers if mark in self._special)
        stops = marks(end, *calls, *self._special)
        while mark := (yield from self._reader.upto(stops, self._answer.thought)):
            if mark == end or mark in calls:
                self._answer.thinking = False
                self._answer.mark()
                break
        if mark in calls:
            yield from self._attempt(mark)
        elif mark and self._spelling.bare and self._tools:
            yield from self._read_bare()

    def _read_bare(self) -> Steps[None]:
        """Calls at the beginning of the visible text, if there are any."""
        self._reader.hold()
        yield from self._reader.space()
        if (yield from self._reader.peek()) == self._spelling.bare:
            yield from self._attempt("", self._reader.held())
        else:
            self._answer.text(self._reader.held())

    def _attempt(self, mark: str, before: str = "") -> Steps[None]:
        """Read calls after a mark, or what follows it is text."""
        calls = self._answer.calls
        self._reader.hold(before or mark)
        try:
            yield from self._read_calls(mark)
        except Malformed:
            if mark or self._answer.calls > calls:
                self._answer.malform(self._reader.held())
            else:
                self._answer.text(self._reader.held())
        else:
            self._reader.held()
            self._answer.mark()

    def _read_calls(self, mark: str) -> Steps[None]:
        spelling = self._spelling
        begin, end = (word.strip() for word in spelling.section)
        if not begin or mark != begin:
            return (yield from self._read_call())
        while True:
            yield from self._reader.space()
            if (yield from self._reader.literal(end)):
                return None
            if not (yield from self._reader.literal(spelling.begin)):
                raise Malformed
            yield from self._read_call()
            self._reader.hold()

    def _read_call(self) -> Steps[None]:
        kind = self._spelling.kind
        yield from self._reader.space()
        first = yield from self._reader.peek()
        if kind == "tagged":
            yield from self._read_tagged()
        elif kind == "pythonic":
            yield from python_values.read_calls(self._reader, self._begin)
        elif kind == "json" or (first and first in "[{"):
            yield from self._read_json(first == "[")
        else:
            yield from self._read_named()
        if self._spelling.end:
            self._reader.hold()
            yield from self._reader.space()
            yield from self._reader.literal(self._spelling.end.strip())

    def _begin(self, name: str, id: str = "") -> Sink:
        if not name or (self._spelling.bare and name not in self._tools):
            raise Malformed
        self._reader.held()
        return self._answer.begin(name, id)

    def _expect(self, word: str) -> Steps[None]:
        yield from self._reader.space()
        if not (yield from self._reader.literal(word)):
            raise Malformed
        yield from self._reader.space()

    # Calls as JSON

    def _read_json(self, is_list: bool) -> Steps[None]:
        separator = self._spelling.between.strip() or ","
        if is_list:
            yield from self._expect("[")
            separator = ","
        while True:
            yield from self._read_object()
            self._reader.hold()
            yield from self._reader.space()
            if is_list and (yield from self._reader.literal("]")):
                break
            if not (yield from self._reader.literal(separator)):
                if is_list:
                    raise Malformed
                break
            yield from self._reader.space()

    def _read_object(self) -> Steps[None]:
        """A call as an object; its arguments stream if its name comes before them."""
        found: dict[str, str] = {}
        begun = False
        yield from self._expect("{")
        while not (yield from self._reader.literal("}")):
            key = _string((yield from self._capture()))
            if self._spelling.bare and key not in _KEYS:
                raise Malformed
            yield from self._expect(":")
            first = yield from self._reader.peek()
            if key in ("arguments", "parameters") and "name" in found and first == "{":
                sink = self._begin(_string(found["name"]), _string(found.get("id", '""')))
                yield from self._answer.read_arguments(self._reader, sink)
                begun = True
                self._reader.hold()
            else:
                found[key] = yield from self._capture()
                if not is_json(found[key]):
                    raise Malformed
            yield from self._reader.space()
            if (
                not (yield from self._reader.literal(","))
                and (yield from self._reader.peek()) != "}"
            ):
                raise Malformed
            yield from self._reader.space()
        if not begun:
            arguments = found.get("arguments") or found.get("parameters") or "{}"
            if arguments.startswith('"'):
                arguments = _string(arguments)
            if not is_json(arguments, dict):
                raise Malformed
            name = _string(found.get("name", '""'))
            self._begin(name, _string(found.get("id", '""')))(arguments)

    def _capture(self) -> Steps[str]:
        pieces: list[str] = []
        yield from self._reader.json_value(pieces.append)
        return "".join(pieces)

    # Calls as a name and a JSON object

    def _read_named(self) -> Steps[None]:
        spelling = self._spelling
        mark, name = yield from self._read_name(marks(spelling.name_end.strip(), spelling.id_mark))
        id = ""
        if mark == spelling.id_mark and mark:
            _, id = yield from self._read_name(marks(spelling.name_end))
        if spelling.numbered and name:
            id = name
            name = name.removeprefix("functions.").rpartition(":")[0] or name
        yield from self._reader.space()
        if (yield from self._reader.peek()) != "{":
            raise Malformed
        yield from self._answer.read_arguments(self._reader, self._begin(name, id))

    def _read_name(self, stops: Marks) -> Steps[tuple[str, str]]:
        pieces: list[str] = []

        def limited(text: str) -> None:
            pieces.append(text)
            if sum(map(len, pieces)) > _MAX_NAME:
                raise Malformed

        mark = yield from self._reader.upto(stops, limited)
        if not mark:
            raise Malformed
        return mark, "".join(pieces).strip()

    # Calls as text between marks

    def _read_tagged(self) -> Steps[None]:
        spelling = self._spelling
        key_begin = spelling.key_begin
        end = spelling.end.strip()
        name_end = spelling.name_end.strip()
        mark, name = yield from self._read_name(
            marks(name_end or key_begin, "" if name_end else end)
        )
        sink = self._begin(name)
        sink("{")
        separator = ""
        while mark != end:
            if mark != key_begin:  # only white space belongs here
                self._answer.mark()
                mark = yield from self._reader.upto(marks(key_begin, end), self._answer.text)
                self._answer.malformed += self._answer.has_words
            if not mark:
                self._answer.malformed += 1
                return
            if mark == key_begin:
                sink(separator)
                mark = yield from self._read_argument(self._tools.get(name), sink)
                separator = ", "
        sink("}")

    def _read_argument(self, schema: Any, sink: Sink) -> Steps[str]:
        """Read a key and its value. Returns the last mark: "" if the text has ended."""
        spelling = self._spelling
        key_ends = {mark.strip(): kind for mark, kind in spelling.key_ends.items()}
        pieces: list[str] = []
        mark = yield from self._reader.upto(marks(*key_ends), pieces.append)
        key = "".join(pieces).strip()
        sink(json_string(key) + ": ")
        if spelling.value_begin:
            yield from self._reader.space()
            yield from self._reader.literal(spelling.value_begin)
        kind = key_ends.get(mark, "")
        end = spelling.value_end.strip()
        padding = "\n" if spelling.value_end.startswith("\n") else ""
        yield from self._reader.literal(padding)
        stops = marks(padding + end, end)
        types = frozenset([kind]) if kind == "string" else frozenset()
        if not kind:
            types = types_of(definition(schema, key), schema)
        if types == {"string"}:
            sink('"')
            mark = yield from self._reader.upto(stops, lambda text: sink(string_part(text)))
            sink('"' if mark else "")
        else:
            pieces = []
            mark = yield from self._reader.upto(stops, pieces.append)
            sink(to_json("".join(pieces), types) if mark else "")
        return mark


def _string(text: str) -> str:
    """The string that JSON text is. Raises Malformed."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise Malformed from None
    if not isinstance(value, str):
        raise Malformed
    return value
