"""POST /v1/messages: what requests mean, what answers become, and the real SDK."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from fake_answers import (
    MODEL,
    NUM_CACHED,
    NUM_PROMPT,
    FakeAnswer,
    Scripted,
    event_sequences,
    in_batches,
    scripted,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from serving import Served

from gllm_client.openai_server.body import convert
from gllm_client.openai_server.conversation import Conversation, ToolChoice
from gllm_client.openai_server.errors import ApiError
from gllm_client.openai_server.events import (
    CallArguments,
    CallBegin,
    End,
    Event,
    Reasoning,
    Text,
    Tokens,
)
from gllm_client.openai_server.messages import Run
from gllm_client.openai_server.messages_request import MessagesRequest, to_conversation
from gllm_client.openai_server.turns import thinking_variables

anthropic = pytest.importorskip("anthropic", reason="the anthropic SDK is not installed")

EVENTS: TypeAdapter[Any] = TypeAdapter(anthropic.types.RawMessageStreamEvent)
HI = [{"role": "user", "content": "Hi"}]
TOOL = {"name": "f", "description": "F.", "input_schema": {"type": "object"}, "strict": True}
BODY: dict[str, Any] = {"model": "m", "messages": HI, "max_tokens": 50}
CALL = {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}}
DONE = End("stop")


def request(**body: Any) -> MessagesRequest:
    return convert(BODY | body, MessagesRequest)


def meaning(**body: Any) -> Conversation:
    return to_conversation(request(**body), MODEL)


def messages(*given: tuple[str, Any], **body: Any) -> list[dict[str, Any]]:
    return meaning(messages=[{"role": r, "content": c} for r, c in given], **body).messages


def text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}


# ------------------------------------------------------------ what a request means


def test_blocks_of_one_turn_become_one_message() -> None:
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [text("1"), text("2")]}
    assert messages(
        ("user", [text("a"), text("b")]),
        ("user", "c"),
        ("assistant", [{"type": "thinking", "thinking": "Hm.", "signature": "s"}, text("d")]),
        ("assistant", [CALL, {"type": "redacted_thinking", "data": "x"}]),
        ("user", [text("e"), result]),
        ("system", "f"),
        system=[text("s"), text("t")],
    ) == [
        {"role": "system", "content": "s\n\nt"},
        {"role": "user", "content": "a\n\nb\n\nc"},
        {
            "role": "assistant",
            "content": "d",
            "reasoning_content": "Hm.",
            "tool_calls": [
                {"id": "t1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
            ],
        },
        {"role": "tool", "tool_call_id": "t1", "name": "f", "content": "1\n2"},
        {"role": "user", "content": "e\n\nf"},
    ]


def test_a_failed_tool_says_so() -> None:
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "no", "is_error": True}
    told = messages(("user", "a"), ("assistant", [CALL]), ("user", [result]))
    assert told[-1]["content"] == "Error: no"


def test_a_line_that_changes_in_every_request_is_dropped() -> None:
    line = "x-anthropic-billing-header: cc_version=2.1; cch=fa690;"
    assert messages(("user", "a"), system=[text(line), text("s")])[0]["content"] == "s"


def test_the_answer_goes_on_from_the_assistants_last_message() -> None:
    asked = meaning(messages=[*HI, {"role": "assistant", "content": "It is"}])
    assert asked.template["continue_final_message"] is True
    assert asked.template["add_generation_prompt"] is False
    assert "continue_final_message" not in meaning().template


def test_sampling_and_form() -> None:
    schema = {"type": "object"}
    asked = meaning(
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        stop_sequences=["x"],
        output_config={"format": {"type": "json_schema", "schema": schema}},
        metadata={"user_id": "u"},
        context_management={"edits": []},
    )
    assert asked.sampling == {"temperature": 0.5, "top_p": 0.9, "top_k": 4, "stop": ["x"]}
    assert (asked.max_tokens, asked.form) == (50, {"json": schema})


@pytest.mark.parametrize(
    ("thinking", "is_on", "is_shown"),
    [
        ({"type": "enabled", "budget_tokens": 1024}, True, True),
        ({"type": "adaptive"}, True, True),
        ({"type": "adaptive", "display": "omitted"}, True, False),
        ({"type": "disabled"}, False, False),
        (None, False, False),
    ],
)
def test_thinking(thinking: Any, is_on: bool, is_shown: bool) -> None:
    asked = meaning(thinking=thinking) if thinking else meaning()
    assert asked.template["enable_thinking"] is is_on
    assert asked.include_reasoning is is_shown
    if is_on:
        with_effort = meaning(thinking=thinking, output_config={"effort": "low"})
        assert with_effort.template["reasoning_effort"] == "low"


@pytest.mark.parametrize(
    ("source", "read"),
    [
        ("{{ messages }}", set()),
        ("Thinking is fine: thinking {{ message.thinking }} {{ m['thinking'] }}", set()),
        ("{%- if enable_thinking is defined %}{% endif %}", {"enable_thinking"}),
        ("{% if not thinking %}</think>{% endif %}", {"thinking"}),
        (
            "{% if a and thinking %}{{ reasoning_effort }}{% endif %}",
            {"thinking", "reasoning_effort"},
        ),
    ],
)
def test_a_template_gets_no_variable_that_it_does_not_read(source: str, read: set[str]) -> None:
    """The backend refuses those."""
    assert thinking_variables(True, "low", source).keys() == read


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, ToolChoice()),
        ({"type": "any"}, ToolChoice("required")),
        ({"type": "tool", "name": "f"}, ToolChoice("named", "f")),
        ({"type": "none"}, ToolChoice("none")),
    ],
)
def test_tools(choice: dict[str, Any], expected: ToolChoice) -> None:
    asked = meaning(tools=[TOOL], tool_choice=choice | {"disable_parallel_tool_use": True})
    assert asked.tool_choice == expected
    assert not asked.parallel_tool_calls
    (tool,) = asked.tools
    assert (tool.name, tool.description, tool.parameters) == ("f", "F.", {"type": "object"})
    assert tool.strict


def user(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://x"}}
WRONG = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    (user(IMAGE), "messages[0].content[0]"),
    (user({"type": "image"}), "messages[0].content[0].source"),
    (user({"type": "image", "source": {"type": "file"}}), "messages[0].content[0].source.type"),
    (user({"type": "document"}), "messages[0].content[0].type"),
    (user({"type": "text"}), "messages[0].content[0].text"),
    (user(CALL), "messages[0].content[0].type"),
    (user({"type": "tool_result", "tool_use_id": "t"}), "messages[0].content[0].tool_use_id"),
    (
        {
            "messages": [
                {"role": "assistant", "content": [CALL]},
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "t1", "content": [IMAGE]}],
                },
            ]
        },
        "messages[1].content[0].content[0]",
    ),
    ({"system": [IMAGE]}, "system[0].type"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
    ({"tools": [TOOL, TOOL]}, "tools[1].name"),
    ({"tools": [TOOL | {"name": f"f{i}"} for i in range(1025)]}, "tools"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tool_choice": {"type": "tool", "name": "g"}, "tools": [TOOL]}, "tool_choice.name"),
    ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
    ({"thinking": {"type": "always"}}, "thinking.type"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"top_k": "a"}, "top_k"),
    ({"mcp_servers": [{"name": "s"}]}, "mcp_servers"),
    ({"container": "c"}, "container"),
    ({"nonsense": 1}, "nonsense"),
]


@pytest.mark.parametrize(("body", "param"), WRONG, ids=[param for _, param in WRONG])
def test_wrong_fields_are_named(body: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        meaning(**body)
    assert caught.value.status == 400
    assert caught.value.param == param
    assert param in caught.value.message


# ------------------------------------------------------------ what an answer becomes


def run(batches: list[list[Event]], **body: Any) -> Run:
    return Run(request(**body), "m", FakeAnswer(batches))  # type: ignore[arg-type]


def whole(events: list[Event], **body: Any) -> Any:
    message = asyncio.run(run([events], **body).whole())
    return json.loads(msgspec.json.encode(message))


def frames(body: bytes) -> list[dict[str, Any]]:
    events = []
    for frame in body.decode().split("\n\n")[:-1]:
        name, data = frame.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


async def stream(batches: list[list[Event]]) -> list[dict[str, Any]]:
    return frames(b"".join([piece async for piece in run(batches).stream()]))


@settings(max_examples=40)
@given(st.data(), event_sequences())
def test_a_stream_says_what_the_whole_answer_says(data: st.DataObject, events: list[Event]) -> None:
    from anthropic.lib.streaming._messages import accumulate_event

    message = whole(events)
    anthropic.types.Message.model_validate(message)
    told = asyncio.run(stream(data.draw(in_batches(events))))
    assert [event["type"] for event in told[:2]] == ["message_start", "ping"]
    snapshot: Any = None
    buffers: dict[int, bytes] = {}
    for event in told[:1] + told[2:]:
        read = EVENTS.validate_python(event)
        snapshot = accumulate_event(event=read, current_snapshot=snapshot, json_bufs=buffers)
    expected = message | {"id": snapshot.id}
    streamed = snapshot.to_dict()
    if message["stop_reason"] == "max_tokens":  # the SDK shows a call that is cut off in part
        expected["content"] = streamed["content"]
    assert {key: streamed.get(key) for key in expected} == expected


def test_each_kind_of_block() -> None:
    events: list[Event] = [
        Tokens((1, 2, 3), None, 2),
        Reasoning("Hm."),
        Text("Hello"),
        CallBegin(0, "t0", "f"),
        CallArguments(0, '{"a": [1]}'),
        CallBegin(1, "t1", "f"),
        DONE,
    ]
    message = whole(events)
    thoughts, said, call, empty = message["content"]
    assert (thoughts["type"], thoughts["thinking"]) == ("thinking", "Hm.")
    assert thoughts["signature"]
    assert said == {"type": "text", "text": "Hello"}
    assert call == {"type": "tool_use", "id": "t0", "name": "f", "input": {"a": [1]}}
    assert empty["input"] == {}
    assert message["usage"] == {
        "input_tokens": NUM_PROMPT - NUM_CACHED,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": NUM_CACHED,
        "output_tokens": 3,
        "output_tokens_details": {"thinking_tokens": 2},
    }


@pytest.mark.parametrize(
    ("events", "reason", "sequence"),
    [
        ([Text("a"), DONE], "end_turn", None),
        ([Text("a"), End("stop", 7)], "end_turn", None),
        ([Text("a"), End("stop", "x")], "stop_sequence", "x"),
        ([CallBegin(0, "t", "f"), DONE], "tool_use", None),
        ([Tokens(tuple(range(50))), Text("a"), End("length")], "max_tokens", None),
        ([Tokens((1,)), Text("a"), End("length")], "model_context_window_exceeded", None),
    ],
)
def test_stop_reasons(events: list[Event], reason: str, sequence: str | None) -> None:
    message = whole(events)
    assert (message["stop_reason"], message["stop_sequence"]) == (reason, sequence)


# ------------------------------------------------------------ the real SDK


@pytest.fixture(scope="module")
def server() -> Iterator[Scripted]:
    with scripted() as script:
        yield script


@pytest.fixture
def script(server: Scripted, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    return server.begin(monkeypatch)


@pytest.fixture
def sdk(script: Scripted) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=script.url, api_key="none", max_retries=0) as client:
        yield client


def test_create_and_count(sdk: Any, script: Scripted) -> None:
    message = sdk.messages.create(**BODY)
    assert (message.content[0].text, message.stop_reason, message.model) == (
        "Hello",
        "end_turn",
        "m",
    )
    count = sdk.messages.count_tokens(model="m", messages=HI, system="Be brief.", tools=[TOOL])
    assert count.input_tokens == NUM_PROMPT
    assert [message["role"] for message in script.asked[1].messages] == ["system", "user"]
    assert script.asked[1].tools[0].name == "f"


def test_a_stream_with_thoughts_and_calls(sdk: Any, script: Scripted) -> None:
    script.batches = [
        [Reasoning("H"), Reasoning("m.")],
        [Text("Hello"), CallBegin(0, "t0", "f"), CallArguments(0, '{"a"')],
        [CallArguments(0, ": 1}"), DONE],
    ]
    with sdk.messages.stream(**BODY, thinking={"type": "adaptive"}, tools=[TOOL]) as events:
        kinds = [event.type for event in events if not event.type.startswith("content_block")]
        message = events.get_final_message()
    assert {"thinking", "signature", "text", "input_json"} < set(kinds)
    assert [part.type for part in message.content] == ["thinking", "text", "tool_use"]
    assert message.content[2].input == {"a": 1}
    assert message.stop_reason == "tool_use"
    again = [*HI, {"role": "assistant", "content": [part.to_dict() for part in message.content]}]
    result = {"type": "tool_result", "tool_use_id": "t0", "content": "7"}
    sdk.messages.create(**BODY | {"messages": [*again, {"role": "user", "content": [result]}]})
    roles = [message["role"] for message in script.asked[1].messages]
    assert roles == ["user", "assistant", "tool"]
    assert script.asked[1].messages[1]["reasoning_content"] == "Hm."


def test_errors(sdk: Any, script: Scripted) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        sdk.messages.create(**BODY | {"model": "other"})
    assert missing.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="max_tokens") as caught:
        sdk.post("/v1/messages", body={"model": "m", "messages": HI}, cast_to=object)
    assert caught.value.body["type"] == "error"
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    for path in ("/v1/messages", "/v1/messages/count_tokens", "/v1/messages/nothing"):
        answer = script.post(path, [1])
        assert answer.status_code in (400, 404)
        assert answer.json()["type"] == "error"
    for is_stream in (False, True):
        script.batches = [ApiError(429, "the queue is full")]
        with pytest.raises(anthropic.RateLimitError, match="the queue is full"):
            sdk.messages.create(**BODY, stream=is_stream)


def test_an_answer_that_fails_half_way(sdk: Any, script: Scripted) -> None:
    script.batches = [[Text("Hel")], ApiError(503, "the engine has ended")]
    with pytest.raises(anthropic.APIStatusError, match="the engine has ended") as caught:
        list(sdk.messages.create(**BODY, stream=True))
    assert caught.value.body["error"]["type"] == "overloaded_error"


def test_claude_code(script: Scripted) -> None:
    """A request in the form of Claude Code."""
    tool = TOOL | {"eager_input_streaming": True, "cache_control": {"type": "ephemeral"}}
    body = {
        "model": "m",
        "max_tokens": 32000,
        "stream": True,
        "temperature": 1,
        "system": [text("x-anthropic-billing-header: cch=1;"), text("You are an agent.")],
        "messages": [{"role": "user", "content": [text("<system-reminder>"), text("Fix it.")]}],
        "tools": [tool],
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "metadata": {"user_id": "u"},
    }
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "claude-code-20250219"}
    answer = script.post("/v1/messages?beta=true", body, **headers, **{"x-api-key": "k"})
    assert answer.status_code == 200
    assert frames(answer.content)[-1] == {"type": "message_stop"}
    system, asked = script.asked[0].messages
    assert system["content"] == "You are an agent."
    assert re.fullmatch(r"<system-reminder>\s+Fix it\.", asked["content"])


def test_through_a_models_own_text(served: Served) -> None:
    """From a fake tritonserver to the SDK."""
    served.model.chat_template += " <think> </think> <tool_call>"
    served.model.answer = lambda asked, choice: (
        "<think>\nHm.\n</think>\n\nLook:\n<tool_call>\n"
        '{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    )
    body = BODY | {"tools": [TOOL], "thinking": {"type": "adaptive"}, "max_tokens": 1000}
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0) as sdk:
        with sdk.messages.stream(**body) as events:
            message = events.get_final_message()
        thoughts, said, call = message.content
        assert (thoughts.thinking, said.text, call.input) == ("Hm.", "Look:", {"x": 1})
        assert message.stop_reason == "tool_use"
        count = sdk.messages.count_tokens(model="m", messages=HI)
        assert count.input_tokens == len("<|user|>\nHi\n<|assistant|>")
