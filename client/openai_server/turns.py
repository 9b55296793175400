"""Conversations in the form that the backend can read, for the APIs that send them otherwise."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from gllm_client.openai_server.body import Json
from gllm_client.openai_server.conversation import Message
from gllm_client.openai_server.errors import invalid
from gllm_client.openai_server.models import ServedModel
from gllm_client.protocol import shown

# Sources of "images" and "videos", if there are any.
Media = dict[str, list[str]]
# A variable that a chat template reads: within braces, and neither an attribute nor a string.
_READS = r"{{[{{%][^}}]*(?<![\w.'\"]){}\b(?!['\"])"


def merge(messages: Iterable[Message]) -> list[Message]:
    """Join neighbours that chat templates expect as one message.

    The system messages at the beginning become one; a later one is given to the user, since many
    templates refuse a system message there. Neighbours of one role become one message, but for
    tool results.
    """
    turns: list[list[Message]] = []
    for message in messages:
        before = turns[-1][0]["role"] if turns else "system"
        if message["role"] == "system" and before != "system":
            message = message | {"role": "user"}
        if turns and before == message["role"] != "tool":
            turns[-1].append(message)
        else:
            turns.append([message])
    return [_join(turn) for turn in turns]


def _join(turn: list[Message]) -> Message:
    joined = dict(turn[0])
    for key in ("content", "reasoning_content"):
        if values := [message[key] for message in turn if message.get(key)]:
            has_parts = any(isinstance(value, list) for value in values)
            joined[key] = _join_parts(values) if has_parts else "\n\n".join(values)
    if calls := [call for message in turn for call in message.get("tool_calls", ())]:
        joined["tool_calls"] = calls
    return joined


def _join_parts(contents: Iterable[str | list[Json]]) -> list[Json]:
    """The parts of several contents; neighbours that are texts become one, as they do alone."""
    joined: list[Json] = []
    for content in contents:
        for part in [text_part(content)] if isinstance(content, str) else content:
            if joined and joined[-1]["type"] == part["type"] == "text":
                joined[-1] = text_part(f"{joined[-1]['text']}\n\n{part['text']}")
            else:
                joined.append(part)
    return joined


def text_part(text: str) -> Json:
    """A content part that is text."""
    return {"type": "text", "text": text}


def media_part(kind: str, source: Any, path: str, model: ServedModel) -> Json:
    """A content part that is an "image" or a "video". `source`: its URL, or the file in base64,
    given in the part at `path`. Raises ApiError."""
    if kind not in model.facts.get("input_modalities", ()):
        raise invalid(path, f"this model takes no {kind}s")
    if not isinstance(source, str) or not source:
        raise invalid(path, f"{shown(source)} is no URL of the {kind}")
    return {"type": kind, kind: source}


def without_media(messages: Iterable[Message]) -> tuple[list[Message], Media]:
    """Messages whose images and videos only have their places, and these, in order."""
    media: Media = {}

    def stripped(content: list[Json]) -> Iterator[Json]:
        for part in content:
            if (kind := part["type"]) != "text":
                media.setdefault(f"{kind}s", []).append(part[kind])
                part = {"type": kind}
            yield part

    return [
        message | {"content": list(stripped(message["content"]))}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ], media


def call_message(id: str, name: str, arguments: dict[str, Any]) -> Message:
    """The assistant's message with one call of a function."""
    function = {"name": name, "arguments": arguments}
    call = {"id": id, "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def read_arguments(text: str) -> dict[str, Any]:
    """The arguments of a call. If the model broke them off, it still sees them."""
    arguments = parse_object(text or "{}")
    return {"arguments": text} if arguments is None else arguments


def parse_object(text: str) -> dict[str, Any] | None:
    """A JSON object; None if the text is anything else."""
    try:
        value = msgspec.json.decode(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def thinking_variables(on: bool | None, effort: str | None, source: str) -> dict[str, Any]:
    """Variables of a chat template that turn thoughts on or off and say how long to think.

    Models call the switch enable_thinking or thinking. A variable that the template's `source` does
    not read is left out, because the backend refuses it.
    """
    given = {"enable_thinking": on, "thinking": on, "reasoning_effort": effort}
    return {
        name: value
        for name, value in given.items()
        if value is not None and re.search(_READS.format(name), source)
    }
