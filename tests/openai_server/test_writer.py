"""Pure tests of the writer: a stream is the whole answer in pieces, one for each response."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from fake_answers import MODEL, FakeAnswer, event_sequences, in_batches
from hypothesis import given, settings
from hypothesis import strategies as st

from gllm_client.openai_server.chat import ChatRequest, ChatWriter
from gllm_client.openai_server.errors import ApiError
from gllm_client.openai_server.events import End, Event, Reasoning, Text, Tokens
from gllm_client.openai_server.fields import StreamOptions
from gllm_client.openai_server.routing import EventStream

BATCHES: list[list[Event]] = [
    [Tokens((1, 2, 3)), Reasoning("so"), Text("Hel")],
    [Tokens((4, 5)), Text("lo")],
    [Tokens((6,)), Text("!"), End("stop")],
]


def writer(batches: Sequence[Any], **options: Any) -> ChatWriter:
    answer: Any = FakeAnswer(batches)
    return ChatWriter(ChatRequest(messages=[], **options), MODEL, answer, "id")


async def pieces(one: ChatWriter) -> list[bytes]:
    return [piece async for piece in one.stream()]


def events(stream: bytes) -> list[Any]:
    *found, end = stream.removesuffix(b"\n\n").split(b"\n\n")
    assert end == b"data: [DONE]"
    return [json.loads(event.removeprefix(b"data: ")) for event in found]


def test_each_response_of_triton_is_written_at_once() -> None:
    """One message to the web server, however many events a response brings."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(
        EventStream(writer(BATCHES).stream())({"type": "http", "state": {"send": send}}, None, send)
    )  # type: ignore[arg-type]
    bodies = [message["body"] for message in sent[1:]]
    assert len(bodies) == len(BATCHES) + 2  # [DONE], and the end of the body
    assert [body.count(b"data:") for body in bodies] == [3, 1, 2, 1, 0]


def test_a_failure_half_way_is_an_event() -> None:
    stream = b"".join(asyncio.run(pieces(writer([BATCHES[0], ApiError(503, "gone")]))))
    assert events(stream)[-1]["error"]["message"] == "gone"


@settings(max_examples=25)
@given(st.data())
def test_a_stream_equals_the_whole_answer(data: st.DataObject) -> None:
    batches = data.draw(in_batches(data.draw(event_sequences())))
    options = {"logprobs": True, "top_logprobs": 1, "return_token_ids": True}
    usage = StreamOptions(include_usage=True)
    made = asyncio.run(pieces(writer(batches, stream=True, stream_options=usage, **options)))
    assert len(made) <= len(batches) + 2
    answer: Any = FakeAnswer(batches)
    answer.prompt_ids = []
    one = ChatWriter(ChatRequest(messages=[], **options), MODEL, answer, "id")  # type: ignore[arg-type]
    whole = asyncio.run(one.whole())
    *parts, last = events(b"".join(made))
    assert last["usage"] == whole["usage"]
    (choice,) = whole["choices"]
    message = choice["message"]
    entries = [part["choices"][0] for part in parts]
    deltas = [entry["delta"] for entry in entries]
    for key in ("content", "reasoning"):
        assert "".join(delta.get(key) or "" for delta in deltas) == (message.get(key) or "")
    assert (
        sum((entry["logprobs"]["content"] for entry in entries), [])
        == (choice["logprobs"]["content"])
    )
    assert sum((entry["token_ids"] for entry in entries), []) == choice["token_ids"]
    calls: dict[int, list[str]] = {}
    for delta in deltas:
        for call in delta.get("tool_calls", []):
            calls.setdefault(call["index"], []).append(call["function"]["arguments"])
    told = [call["function"]["arguments"] for call in message.get("tool_calls", [])]
    assert ["".join(texts) for texts in calls.values()] == told
    assert entries[-1]["finish_reason"] == choice["finish_reason"]
