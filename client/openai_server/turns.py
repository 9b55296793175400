"""Conversations in the form that chat templates can read, for the APIs that send them otherwise."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import msgspec

from gllm_client.openai_server.conversation import Message

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
        if texts := [message[key] for message in turn if message.get(key)]:
            joined[key] = "\n\n".join(texts)
    if calls := [call for message in turn for call in message.get("tool_calls", ())]:
        joined["tool_calls"] = calls
    return joined


def call_message(id: str, name: str, arguments: dict[str, Any]) -> Message:
    """The assistant's message with one call of a function."""
    function = {"name": name, "arguments": arguments}
    call = {"id": id, "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


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
