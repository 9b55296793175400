"""Text that comes in pieces, for parsers that are generators.

A parser yields whenever it needs more text. What has been read is dropped, so that reading takes
time linear in the text, however it is cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
Sink = Callable[[str], object]

_SPACE = re.compile(r"\s*")
_IN_STRING = re.compile(r'["\\]')
_OUTSIDE = re.compile(r'["{}\[\]]')
_SCALAR_ENDS = ",}] \t\r\n"


class Malformed(Exception):
    """What has been read is not what it seemed to be."""


class Marks:
    """A set of texts to look for."""

    def __init__(self, marks: Iterable[str]) -> None:
        words = sorted({mark for mark in marks if mark})
        self.pattern = re.compile(_either(words) or r"(?!)")
        self._beginnings = frozenset(word[:n] for word in words for n in range(1, len(word)))
        self._longest = max(map(len, words), default=1)
        self._first = re.compile(_either(sorted({word[0] for word in words})) or r"(?!)")

    def begun(self, text: str, at: int) -> int:
        """Where a mark may begin whose end is still to come; the end of `text` if none does."""
        start = max(at, len(text) - self._longest + 1)
        while found := self._first.search(text, start):
            if text[found.start() :] in self._beginnings:
                return found.start()
            start = found.end()
        return len(text)


@lru_cache(256)
def marks(*words: str) -> Marks:
    return Marks(words)


def _either(words: list[str]) -> str:
    """A regular expression for all words that tries no word twice; the longest wins."""
    tails: dict[str, list[str]] = {}
    for word in words:
        if word:
            tails.setdefault(word[0], []).append(word[1:])
    branches = [re.escape(first) + _either(rest) for first, rest in tails.items()]
    if "" in words and branches:
        return "(?:" + "|".join(branches) + ")?"
    return "(?:" + "|".join(branches) + ")" if len(branches) > 1 else "".join(branches)


class Reader:
    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._ended = False
        self._held: list[str] | None = None

    def add(self, text: str) -> None:
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self) -> None:
        self._ended = True

    def hold(self, before: str = "") -> None:
        """Begin to keep what is read, in case that it turns out to be text."""
        self._held = [before]

    def held(self) -> str:
        """What has been read since hold(); it is kept no longer."""
        text = "".join(self._held or ())
        self._held = None
        return text

    def take(self, length: int) -> str:
        text = self._text[self._at : self._at + length]
        self._at += length
        if self._held is not None:
            self._held.append(text)
        return text

    def peek(self) -> Steps[str]:
        """The next character; "" at the end."""
        while self._at == len(self._text) and not self._ended:
            yield
        return self._text[self._at : self._at + 1]

    def space(self) -> Steps[None]:
        """Read white space."""
        while True:
            found = _SPACE.match(self._text, self._at)
            assert found is not None
            self.take(found.end() - self._at)
            if self._at < len(self._text) or self._ended:
                return
            yield

    def literal(self, word: str) -> Steps[bool]:
        """Read `word` if it is what comes next."""
        while True:
            there = self._text[self._at : self._at + len(word)]
            if there == word:
                self.take(len(word))
                return True
            if self._ended or not word.startswith(there):
                return False
            yield

    def upto(self, stops: Marks, sink: Sink) -> Steps[str]:
        """Give the text before the first mark to `sink`. Returns the mark, "" at the end."""
        while True:
            found = stops.pattern.search(self._text, self._at)
            limit = len(self._text)
            if not self._ended:
                limit = stops.begun(self._text, self._at)
            if found is not None and found.start() < limit:
                limit = found.start()
            else:
                found = None
            if limit > self._at:
                sink(self.take(limit - self._at))
            if found is not None:
                return self.take(len(found[0]))
            if self._ended:
                return ""
            yield

    def json_value(self, sink: Sink) -> Steps[bool]:
        """Give one JSON value to `sink`, as it is written; False if the text ends before it does.

        Brackets and strings alone are understood, so that a value may be wrong JSON.
        """
        first = yield from self.peek()
        if first not in '{["' or not first:
            while (char := (yield from self.peek())) and char not in _SCALAR_ENDS:
                sink(self.take(1))
            return True
        depth = 0
        in_string = False
        while True:
            at, depth, in_string = _json_end(self._text, self._at, depth, in_string)
            complete = at > self._at and depth == 0 and not in_string
            if self._ended and not complete:
                at = len(self._text)
            if at > self._at:
                sink(self.take(at - self._at))
            if complete or self._ended:
                return complete
            yield


def _json_end(text: str, at: int, depth: int, in_string: bool) -> tuple[int, int, bool]:
    """Follow a JSON value to its end, or as far as `text` goes without half an escape."""
    while found := (_IN_STRING if in_string else _OUTSIDE).search(text, at):
        char = found[0]
        at = found.end()
        if char == "\\":
            if at == len(text):
                return at - 1, depth, in_string
            at += 1
        elif char == '"':
            in_string = not in_string
        else:
            depth += 1 if char in "{[" else -1
        if depth == 0 and not in_string:
            return at, depth, in_string
    return len(text), depth, in_string
