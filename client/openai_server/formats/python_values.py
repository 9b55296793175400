"""Calls that are written as a list of Python calls: [f(a=1, b=["x"]), g()]."""

from __future__ import annotations

import re
from collections.abc import Callable

from gllm_client.openai_server.formats.reader import Malformed, Reader, Sink, Steps, marks
from gllm_client.openai_server.formats.values import json_string, string_part

_WORDS = {"True": "true", "False": "false", "None": "null"}
_CLOSING = {"[": "]", "(": ")", "{": "}"}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0"}
_DIGITS = {"x": 2, "u": 4, "U": 8}  # of the escape of a character by its number
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_ENDS = " \t\r\n,)]}:"
_MAX_DEPTH = 64
_MAX_NAME = 256


def read_calls(reader: Reader, begin: Callable[[str], Sink]) -> Steps[None]:
    """Read a list of calls. Raises Malformed."""
    yield from _expect(reader, "[")
    while True:
        name = yield from _name(reader, "(")
        sink = begin(name)
        yield from reader.space()
        separator = "{"
        while not (yield from reader.literal(")")):
            key = yield from _name(reader, "=")
            sink(separator + json_string(key) + ": ")
            separator = ", "
            yield from _value(reader, sink, 0)
            yield from _separate(reader, ")")
        sink("{}" if separator == "{" else "}")
        reader.hold()
        yield from _separate(reader, "]")
        if (yield from reader.literal("]")):
            return


def _expect(reader: Reader, word: str) -> Steps[None]:
    if not (yield from reader.literal(word)):
        raise Malformed
    yield from reader.space()


def _name(reader: Reader, end: str) -> Steps[str]:
    name = ""
    while (char := (yield from reader.peek())) and (char.isalnum() or char in "_.-"):
        name += reader.take(1)
        if len(name) > _MAX_NAME:
            raise Malformed
    yield from reader.space()
    yield from _expect(reader, end)
    return name


def _separate(reader: Reader, closing: str) -> Steps[None]:
    """Read a comma, unless `closing` comes next."""
    yield from reader.space()
    if (yield from reader.peek()) != closing:
        yield from _expect(reader, ",")


def _value(reader: Reader, sink: Sink, depth: int) -> Steps[None]:
    """Give a Python value to `sink` as JSON. Raises Malformed."""
    first = yield from reader.peek()
    if first and first in "'\"":
        yield from _quoted(reader, sink)
    elif first in _CLOSING and depth < _MAX_DEPTH:
        reader.take(1)
        yield from _items(reader, sink, first, depth)
    else:
        word = ""
        while (char := (yield from reader.peek())) and char not in _ENDS:
            word += reader.take(1)
        sink(_WORDS.get(word) or _number(word))


def _items(reader: Reader, sink: Sink, opening: str, depth: int) -> Steps[None]:
    closing = _CLOSING[opening]
    sink("{" if opening == "{" else "[")
    yield from reader.space()
    separator = ""
    while not (yield from reader.literal(closing)):
        sink(separator)
        separator = ", "
        yield from _value(reader, sink, depth + 1)
        yield from reader.space()
        if opening == "{":
            yield from _expect(reader, ":")
            sink(": ")
            yield from _value(reader, sink, depth + 1)
        yield from _separate(reader, closing)
    sink("}" if opening == "{" else "]")


def _quoted(reader: Reader, sink: Sink) -> Steps[None]:
    quote = reader.take(1)
    stops = marks(quote, "\\")
    sink('"')
    while (mark := (yield from reader.upto(stops, lambda text: sink(string_part(text))))) == "\\":
        char = yield from reader.peek()
        reader.take(1)
        if char in _DIGITS:
            sink(string_part((yield from _numbered(reader, _DIGITS[char]))))
        elif char != "\n":
            sink(string_part(_ESCAPES.get(char, char if char in "'\"\\" else "\\" + char)))
    if not mark:
        raise Malformed
    sink('"')


def _numbered(reader: Reader, length: int) -> Steps[str]:
    digits = ""
    while len(digits) < length and (yield from reader.peek()):
        digits += reader.take(1)
    try:
        return chr(int(digits, 16)).encode(errors="replace").decode()
    except (ValueError, OverflowError):
        raise Malformed from None


def _number(word: str) -> str:
    if not _NUMBER.fullmatch(word):
        raise Malformed
    return word
