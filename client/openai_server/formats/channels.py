"""The messages of gpt-oss: a header names the channel, and the function that is called."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from gllm_client.openai_server.formats.answer import Answer
from gllm_client.openai_server.formats.reader import Malformed, Marks, Reader, Sink, Steps, marks

START = "<|start|>"
CHANNEL = "<|channel|>"
MESSAGE = "<|message|>"
CONSTRAIN = "<|constrain|>"
END = "<|end|>"
CALL = "<|call|>"
RETURN = "<|return|>"
MARKS = (START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN)

# For grammars: how messages begin, and what follows a message.
THOUGHTS_HEADER = f"{CHANNEL}analysis{MESSAGE}"
FINAL_HEADER = f"{CHANNEL}final{MESSAGE}"
CALL_HEADERS = (
    f"{CHANNEL}commentary to=functions.%s {CONSTRAIN}json{MESSAGE}",
    f" to=functions.%s{CHANNEL}commentary json{MESSAGE}",
)
NEXT = f"{END}{START}assistant"

_ENDS = (END, CALL, RETURN, START)
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_MAX_HEADER = 400  # characters
THOUGHTS = "analysis"


def read(
    reader: Reader, answer: Answer, tools: Collection[str], special_tokens: Sequence[str]
) -> Steps[None]:
    stops = marks(*MARKS, *special_tokens)
    header: str | None = f"{CHANNEL}{THOUGHTS}" if answer.thinking else None
    answer.mark()
    while (yield from reader.peek()):
        try:
            if header is None:
                header = yield from _read_header(reader, stops)
            yield from _read_message(reader, answer, header, tools, stops)
        except Malformed:
            answer.malform(reader.held())
            yield from _read_body(reader, stops, answer.text)
        answer.thinking = False
        answer.mark("\n")
        header = None


def _read_header(reader: Reader, stops: Marks) -> Steps[str]:
    """All up to the message's text; the header of a message that has no text is empty."""
    reader.hold()
    header: list[str] = []

    def limited(text: str) -> None:
        header.append(text)
        if sum(map(len, header)) > _MAX_HEADER:
            raise Malformed

    while (mark := (yield from reader.upto(stops, limited))) != MESSAGE:
        if not mark and header and not {START, CHANNEL} & set(header):
            raise Malformed
        if not mark:
            return ""
        if mark in _ENDS:
            header.clear()
        if mark in MARKS:
            header.append(mark)
    reader.held()
    return "".join(header)


def _read_message(
    reader: Reader, answer: Answer, header: str, tools: Collection[str], stops: Marks
) -> Steps[None]:
    channel = _CHANNEL.search(header)
    recipient = _RECIPIENT.search(header)
    name = recipient[1].removeprefix("functions.") if recipient else ""
    if name and tools and (f"to=functions.{name}" in header or name in tools):
        reader.hold()
        yield from reader.space()
        if (yield from reader.peek()) != "{":
            raise Malformed
        reader.held()
        yield from answer.read_arguments(reader, answer.begin(name))
        yield from _read_body(reader, stops, answer.text)
        return
    answer.thinking = channel is not None and channel[1] == THOUGHTS
    if name:  # a tool that nobody has: what is written to it is no call
        answer.malformed += 1
    yield from _read_body(reader, stops, answer.thought if answer.thinking else answer.text)


def _read_body(reader: Reader, stops: Marks, sink: Sink) -> Steps[None]:
    while (mark := (yield from reader.upto(stops, sink))) and mark not in _ENDS:
        pass
