"""POST /v1/responses: what requests mean, what answers become, and the real SDK."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, get_args

import httpx
import msgspec
import openai
import pytest
from fake_answers import (
    MODEL,
    NUM_CACHED,
    NUM_PROMPT,
    FakeAnswer,
    Scripted,
    event_sequences,
    in_batches,
    logprob,
    scripted,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from patience import SOON_S
from pydantic import BaseModel
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
from gllm_client.openai_server.response_store import ResponseStore, StoredResponse
from gllm_client.openai_server.responses import Run
from gllm_client.openai_server.responses_request import (
    ResponsesRequest,
    read_tools,
    to_conversation,
)

FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}
GRAMMAR = {"type": "grammar", "syntax": "lark", "definition": 'start: "a"'}
CUSTOM = {"type": "custom", "name": "patch", "description": "Patch.", "format": GRAMMAR}
INNER = {"type": "function", "name": "inner"}
NAMESPACE = {"type": "namespace", "name": "box__", "description": "A box.", "tools": [INNER]}
TOOLS = [FUNCTION, CUSTOM, NAMESPACE]
DONE = End("stop")


def meaning(earlier: Any = (), **body: Any) -> Conversation:
    request = convert({"input": "Hi"} | body, ResponsesRequest)
    return to_conversation(request, MODEL, list(earlier))[0]


def messages(*items: dict[str, Any], **body: Any) -> list[dict[str, Any]]:
    return meaning(input=list(items), **body).messages


# ------------------------------------------------------------ what a request means


def test_a_text_is_the_users() -> None:
    asked = meaning(instructions="Be brief.", max_output_tokens=5, truncation="auto")
    assert asked.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]
    assert (asked.max_tokens, asked.truncate_prompt_tokens) == (5, -1)


def test_items_of_one_turn_become_one_message() -> None:
    thoughts = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]}
    said = [{"type": "output_text", "text": "a"}, {"type": "refusal", "refusal": "b"}]
    result = [{"type": "input_text", "text": "1"}, {"type": "input_text", "text": "2"}]
    assert messages(
        {"role": "user", "content": "Hi"},
        {"role": "user", "content": "there"},
        thoughts,
        {"type": "message", "role": "assistant", "content": said},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"x": 1}'},
        {"type": "custom_tool_call", "call_id": "c2", "name": "patch", "input": "+a"},
        {"type": "function_call_output", "call_id": "c1", "output": result},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": "ok"},
    ) == [
        {"role": "user", "content": "Hi\n\nthere"},
        {
            "role": "assistant",
            "content": "a\nb",
            "reasoning_content": "Hm.",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
                {
                    "id": "c2",
                    "type": "function",
                    "function": {"name": "patch", "arguments": {"input": "+a"}},
                },
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "name": "f", "content": "1\n2"},
        {"role": "tool", "tool_call_id": "c2", "name": "patch", "content": "ok"},
    ]


def test_system_messages_stand_at_the_beginning_alone() -> None:
    told = messages(
        {"role": "developer", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
        {"role": "developer", "content": "e"},
        instructions="a",
    )
    assert told == [
        {"role": "system", "content": "a\n\nb"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"},
    ]


@pytest.mark.parametrize("text", ["[1]", "{", "no", "7"])
def test_arguments_that_are_no_object_are_still_shown(text: str) -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": text}
    function = messages(call)[0]["tool_calls"][0]["function"]
    assert function["arguments"] == {"arguments": text}


def test_tools() -> None:
    function, custom, inner = meaning(tools=TOOLS).tools
    assert function.name == "f" and not function.strict and not function.takes_text
    assert custom.takes_text and custom.grammar == 'start: "a"'
    assert 'start: "a"' in custom.description
    assert custom.parameters["required"] == ["input"]
    assert inner.name == "box__inner"


def test_a_regular_expression_is_part_of_the_schema() -> None:
    pattern = {"type": "grammar", "syntax": "regex", "definition": "a|b"}
    (tool,) = meaning(tools=[CUSTOM | {"format": pattern}]).tools
    assert tool.parameters["properties"]["input"]["pattern"] == "^(?:a|b)$"
    assert tool.strict and tool.is_regex and tool.grammar == "start: /a|b/"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("none", ToolChoice("none")),
        ("required", ToolChoice("required")),
        ({"type": "function", "name": "f"}, ToolChoice("named", "f")),
        ({"type": "custom", "name": "patch"}, ToolChoice("named", "patch")),
        (
            {"type": "function", "name": "inner", "namespace": "box__"},
            ToolChoice("named", "box__inner"),
        ),
    ],
)
def test_tool_choice(choice: Any, expected: ToolChoice) -> None:
    asked = meaning(tools=TOOLS, tool_choice=choice)
    assert asked.tool_choice == expected
    assert asked.parallel_tool_calls == (expected.kind != "named")  # it is called once


def test_sampling_and_form() -> None:
    schema = {"type": "object"}
    asked = meaning(
        temperature=0.5,
        top_k=3,
        stop=["x"],
        top_logprobs=2,
        text={"format": {"type": "json_schema", "name": "n", "schema": schema}, "verbosity": "low"},
        reasoning={"effort": "none"},
        chat_template_kwargs={"a": 1},
    )
    expected = {"temperature": 0.5, "top_k": 3, "stop": ["x"], "logprobs": 2}
    assert expected.items() <= asked.sampling.items()
    assert asked.form == {"json": schema}
    assert asked.template["enable_thinking"] is False and asked.template["a"] == 1
    assert meaning(text={"format": {"type": "json_object"}}).form == {"json_object": True}
    assert meaning(text={"format": {"type": "text"}}).form is None
    with_one = meaning(include=["message.output_text.logprobs"])
    assert with_one.sampling["logprobs"] == 0


WRONG = [
    ({"input": 7}, "input"),
    ({"input": []}, "input"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input[0].content[0]",
    ),
    ({"input": [{"role": "user", "content": [{"type": "x"}]}]}, "input[0].content[0].type"),
    ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments"),
    (
        {"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]},
        "input[0].call_id",
    ),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools[0].type"),
    ({"tools": [{"type": "code_interpreter", "container": "x"}]}, "tools[0].type"),
    ({"tools": [{"type": "file_search", "vector_store_ids": []}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [FUNCTION, FUNCTION]}, "tools[1].name"),
    ({"tools": [NAMESPACE | {"tools": [NAMESPACE]}]}, "tools[0].tools[0].type"),
    ({"tools": [FUNCTION] * 1 + [FUNCTION | {"name": f"f{i}"} for i in range(1024)]}, "tools"),
    ({"tools": [CUSTOM | {"format": {"type": "grammar"}}]}, "tools[0].format"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "name": "g"}, "tools": TOOLS}, "tool_choice.name"),
    ({"tool_choice": {"type": "web_search_preview"}}, "tool_choice.type"),
    ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_object"}}, "structured_outputs": {}}, "structured_outputs"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"temperature": "hot"}, "temperature"),
    ({"metadata": 1}, "metadata"),
    ({"background": True}, "background"),
    ({"conversation": "c"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"response_format": {"type": "text"}}, "response_format"),
    ({"n": 2}, "n"),
    ({"return_token_ids": True}, "return_token_ids"),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"nonsense": 1}, "nonsense"),
]


@pytest.mark.parametrize(("body", "param"), WRONG, ids=[param for _, param in WRONG])
def test_wrong_fields_are_named(body: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        meaning(**body)
    assert caught.value.status == 400
    assert caught.value.param == param
    assert param in caught.value.message


def test_an_effort_that_the_model_does_not_know() -> None:
    request = convert({"input": "Hi", "reasoning": {"effort": "low"}}, ResponsesRequest)
    plain: Any = SimpleNamespace(facts={"chat_template": "{{ messages }}"})
    with pytest.raises(ApiError) as caught:
        to_conversation(request, plain, [])
    assert caught.value.param == "reasoning.effort"


# ------------------------------------------------------------ what an answer becomes

EVENT_KINDS = {
    get_args(kind.model_fields["type"].annotation)[0]: kind
    for kind in get_args(get_args(ResponseStreamEvent)[0])
}


def run(events: list[Event], **body: Any) -> Run:
    request = convert({"input": "Hi", "tools": TOOLS} | body, ResponsesRequest)
    return Run(request, "m", FakeAnswer([events]), read_tools(TOOLS))  # type: ignore[arg-type]


def frames(body: bytes) -> list[dict[str, Any]]:
    events = []
    for frame in body.decode().split("\n\n")[:-1]:
        name, data = frame.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


async def stream(made: Run, batches: list[list[Event]]) -> list[dict[str, Any]]:
    made._answer = FakeAnswer(batches)  # type: ignore[assignment]
    body = b"".join([piece async for piece in made.stream(lambda response: None)])
    return frames(body)


def without_ids(value: Any) -> str:
    text = re.sub(r'"(resp|msg|rs|fc|ctc)_[0-9a-f]{32}"', r'"\1"', json.dumps(value))
    return re.sub(r'"(created|completed)_at": \d+', "", text)


def run_async(coroutine: Any) -> Any:
    return asyncio.run(coroutine)


@settings(max_examples=25)
@given(st.data(), event_sequences(), st.booleans())
def test_a_stream_says_what_the_whole_answer_says(
    data: st.DataObject, events: list[Event], summarize: bool
) -> None:
    body = {"reasoning": {"summary": "auto"}} if summarize else {}
    whole = json.loads(msgspec.json.encode(run_async(run(events, **body).whole())))
    told = run_async(stream(run([], **body), data.draw(in_batches(events))))
    Response.model_validate(whole)
    assert without_ids(told[-1]["response"]) == without_ids(whole)
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    reader: ResponseStreamState[None] = ResponseStreamState(
        input_tools=openai.omit, text_format=openai.omit
    )
    texts: dict[str, str] = {}
    items = []
    for event in told:
        reader.handle_event(EVENT_KINDS[event["type"]].model_validate(event))
        if event["type"].endswith(".delta"):
            texts[event["item_id"]] = texts.get(event["item_id"], "") + event["delta"]
        elif event["type"] == "response.output_item.done":
            items.append(event["item"])
    assert items == told[-1]["response"]["output"]
    for item in items:
        holders = item.get("content") or item.get("summary") or [{"text": ""}]
        text = item.get("arguments", item.get("input", holders[0]["text"]))
        assert texts.get(item["id"], "") == text


def test_each_kind_of_item() -> None:
    events: list[Event] = [
        Reasoning("Hm."),
        Text("Hello"),
        CallBegin(0, "c0", "f"),
        CallArguments(0, "{}"),
        CallBegin(1, "c1", "patch"),
        CallArguments(1, '{"input"'),
        CallArguments(1, ': "+a\\n"}'),
        CallBegin(2, "c2", "box__inner"),
        DONE,
    ]
    thoughts, said, call, custom, inner = run_async(run(events).whole())["output"]
    assert thoughts["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert said["content"][0]["text"] == "Hello" and said["status"] == "completed"
    assert (call["type"], call["call_id"], call["arguments"]) == ("function_call", "c0", "{}")
    assert (custom["type"], custom["name"]) == ("custom_tool_call", "patch")
    assert custom["input"] == "+a\n"
    assert (inner["name"], inner["namespace"], inner["arguments"]) == ("inner", "box__", "")


def test_log_probabilities_belong_to_the_visible_text() -> None:
    events: list[Event] = [
        Tokens((1, 2), [logprob(1, "Hm"), logprob(2, "</think>")], 2),
        Reasoning("Hm"),
        Tokens((3,), [logprob(3, "Hé")]),
        Text("Hé"),
        Tokens((4,), [logprob(4, "<call>")]),
        CallBegin(0, "c", "f"),
        Text("!"),
        DONE,
    ]
    items = run_async(run(events, top_logprobs=1).whole())["output"]
    (entry,) = items[1]["content"][0]["logprobs"]
    assert (entry["token"], entry["bytes"]) == ("Hé", list("Hé".encode()))
    assert [top["token"] for top in entry["top_logprobs"]] == ["Hé"]
    assert items[3]["content"][0]["logprobs"] == []


def test_an_answer_that_is_cut_is_incomplete() -> None:
    response = run_async(run([Text("a"), End("length")]).whole())
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][0]["status"] == "incomplete"


# ------------------------------------------------------------ the store


def stored(size: int) -> StoredResponse:
    return StoredResponse(b"r" * (size - 1), b"i")


ONE, OTHER = "one", "other"


def test_the_store_forgets_what_was_used_least_recently() -> None:
    store = ResponseStore(max_responses=2, max_bytes=100)
    for id in "ab":
        store.put((ONE, id), stored(10))
    assert store.get((ONE, "a"))
    store.put((ONE, "c"), stored(10))
    assert store.get((ONE, "a")) and store.get((ONE, "c")) and store.get((ONE, "b")) is None
    store.put((ONE, "big"), stored(85))
    assert store.get((ONE, "c")) and store.get((ONE, "big")) and store.get((ONE, "a")) is None
    store.put((ONE, "too big"), stored(101))
    assert store.get((ONE, "too big")) is None and store.get((ONE, "big"))
    assert store.get((OTHER, "big")) is None and not store.delete((OTHER, "big"))
    assert store.delete((ONE, "big")) and not store.delete((ONE, "big"))
    store.put((ONE, "d"), stored(90))
    assert store.get((ONE, "c")) and store.get((ONE, "d"))


@pytest.mark.parametrize(("most", "size"), [(10, 1), (1000, 10)])
def test_an_owner_pushes_out_none_of_those_who_have_less(most: int, size: int) -> None:
    store = ResponseStore(max_responses=most, max_bytes=100)
    for number in range(20):
        store.put((ONE, str(number)), stored(size))
    for number in range(5):
        store.put((OTHER, str(number)), stored(size))  # half of what there is room for
    for number in range(20, 40):
        store.put((ONE, str(number)), stored(size))
    assert all(store.get((OTHER, str(number))) for number in range(5))
    assert [number for number in range(40) if store.get((ONE, str(number)))] == [*range(35, 40)]
    store.put((OTHER, "more"), stored(size))  # now it is the one who has more
    assert store.get((OTHER, "0")) is None and store.get((OTHER, "more"))
    assert store.get((ONE, "35"))


def test_a_store_of_no_responses_keeps_none() -> None:
    store = ResponseStore(max_responses=0, max_bytes=100)
    store.put((ONE, "a"), stored(10))
    assert store.get((ONE, "a")) is None


# ------------------------------------------------------------ the real SDK


@pytest.fixture(scope="module")
def server() -> Iterator[Scripted]:
    with scripted() as script:
        yield script


@pytest.fixture
def script(server: Scripted, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    server.app.state.response_store = ResponseStore(10, 1 << 20)
    return server.begin(monkeypatch)


@pytest.fixture
def sdk(script: Scripted) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{script.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_create(sdk: openai.OpenAI) -> None:
    response = sdk.responses.create(model="m", input="Hi", metadata={"a": "b"})
    assert (response.output_text, response.status, response.model) == ("Hello", "completed", "m")
    assert response.metadata == {"a": "b"}
    usage = response.usage
    assert usage and (usage.input_tokens, usage.output_tokens) == (NUM_PROMPT, 2)
    assert usage.input_tokens_details.cached_tokens == NUM_CACHED


class Point(BaseModel):
    x: int


def test_parse_and_stream(sdk: openai.OpenAI, script: Scripted) -> None:
    script.batches = [[Text('{"x"')], [Text(": 3}"), DONE]]
    parsed = sdk.responses.parse(model="m", input="Hi", text_format=Point)
    assert parsed.output_parsed == Point(x=3)
    form = script.asked[0].form
    assert form and form["json"]["properties"].keys() == {"x"}
    with sdk.responses.stream(model="m", input="Hi", text_format=Point) as events:
        kinds = [event.type for event in events]
        assert events.get_final_response().output_parsed == Point(x=3)
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]


def test_tools_by_a_stored_answer(sdk: openai.OpenAI, script: Scripted) -> None:
    script.batches = [[CallBegin(0, "c0", "f"), CallArguments(0, '{"a": 1}'), DONE]]
    first = sdk.responses.create(model="m", input="Hi", tools=[FUNCTION])  # type: ignore[list-item]
    script.batches = [[Text("Done"), DONE]]
    second = sdk.responses.create(
        model="m",
        previous_response_id=first.id,
        input=[{"type": "function_call_output", "call_id": "c0", "output": "7"}],
    )
    third = sdk.responses.create(model="m", previous_response_id=second.id, input="More")
    assert [message["role"] for message in script.asked[2].messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
        "user",
    ]
    assert third.previous_response_id == second.id
    assert sdk.responses.retrieve(second.id).output_text == "Done"
    with pytest.raises(openai.BadRequestError, match="background"):
        sdk.responses.cancel(second.id)
    sdk.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        sdk.responses.retrieve(second.id)
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.responses.create(model="m", previous_response_id=second.id, input="More")
    assert caught.value.code == "previous_response_not_found"
    assert caught.value.param == "previous_response_id"


def test_the_input_of_a_stored_answer(sdk: openai.OpenAI) -> None:
    """All that came before its output, with ids that stay, newest first; in pages."""
    first = sdk.responses.create(model="m", input="Hi")
    given = [{"role": "assistant", "content": "So"}, {"role": "user", "content": "More"}]
    second = sdk.responses.create(model="m", previous_response_id=first.id, input=given)  # type: ignore[arg-type]
    listed = sdk.responses.input_items.list(second.id)
    items: list[Any] = [*listed]
    assert [(item.role, item.content[0].text) for item in items] == [
        ("user", "More"),
        ("assistant", "So"),
        ("assistant", "Hello"),
        ("user", "Hi"),
    ]
    kinds = [item.content[0].type for item in items]
    assert kinds == ["input_text", "output_text", "output_text", "input_text"]
    ids = [item.id for item in items]
    assert len({*ids}) == 4 and items[2].id == first.output[0].id
    assert (listed.first_id, listed.last_id, listed.has_more) == (ids[0], ids[-1], False)  # type: ignore[attr-defined]
    forward = [item.id for item in sdk.responses.input_items.list(second.id, order="asc", limit=1)]
    assert forward == ids[::-1]  # the SDK asks for page after page
    page: Any = sdk.responses.input_items.list(second.id, after=ids[1], limit=1)
    assert [item.id for item in page.data] == [page.first_id] == [page.last_id] == [ids[2]]
    assert page.has_more
    end: Any = sdk.responses.input_items.list(second.id, after=ids[3])
    assert (end.data, end.first_id, end.has_more) == ([], None, False)


@pytest.mark.parametrize(
    ("query", "param"),
    [({"limit": 0}, "limit"), ({"limit": 101}, "limit"), ({"limit": "x"}, "limit")]
    + [({"order": "up"}, "order"), ({"after": "y"}, "after"), ({"befor": "y"}, "befor")],
)
def test_a_wrong_query_of_input_items(
    sdk: openai.OpenAI, query: dict[str, Any], param: str
) -> None:
    stored = sdk.responses.create(model="m", input="Hi")
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.responses.input_items.list(stored.id, extra_query=query)
    assert caught.value.param == param
    with pytest.raises(openai.NotFoundError):
        sdk.responses.input_items.list("resp_x")


def test_what_is_not_stored(sdk: openai.OpenAI, script: Scripted) -> None:
    response = sdk.responses.create(model="m", input="Hi", store=False)
    with pytest.raises(openai.NotFoundError):
        sdk.responses.retrieve(response.id)
    script.app.state.response_store = ResponseStore(0, 1 << 20)
    assert sdk.responses.create(model="m", input="Hi").model_extra == {"store": False}


def test_errors(sdk: openai.OpenAI, script: Scripted) -> None:
    with pytest.raises(openai.NotFoundError):
        sdk.responses.create(model="other", input="Hi")
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.responses.create(model="m", input="Hi", tools=[{"type": "web_search"}])
    assert caught.value.param == "tools[0].type"
    assert "web_search" in caught.value.message
    for stream in (False, True):
        script.batches = [ApiError(429, "the queue is full")]
        with pytest.raises(openai.RateLimitError, match="the queue is full"):
            sdk.responses.create(model="m", input="Hi", stream=stream)


@pytest.mark.parametrize("body", [b"{", b"[1]", b'{"input": "\xff"}', b'{"input": ' + b"[" * 9999])
def test_bodies_that_are_none(script: Scripted, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    url = f"{script.url}/v1/responses"
    answer = httpx.post(url, content=body, headers=headers, trust_env=False)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_an_answer_that_fails_half_way(sdk: openai.OpenAI, script: Scripted) -> None:
    script.batches = [[Text("Hel")], ApiError(503, "the engine has ended")]
    events = list(sdk.responses.create(model="m", input="Hi", stream=True))
    assert events[-1].type == "response.failed"
    assert events[-1].response.error and "engine has ended" in events[-1].response.error.message
    with pytest.raises(openai.NotFoundError):
        sdk.responses.retrieve(events[-1].response.id)


def test_a_client_that_leaves_ends_the_answer(sdk: openai.OpenAI, script: Scripted) -> None:
    script.batches = [[Text("Hel")]]
    script.forever = True
    events = sdk.responses.create(model="m", input="Hi", stream=True)
    assert next(iter(events)).type == "response.created"
    events.close()
    assert script.answers[0].closed.wait(SOON_S)


def test_the_codex_cli(script: Scripted) -> None:
    """A request in the form of the Codex CLI, and what it reads of the stream."""
    script.batches = [
        [Reasoning("Hm."), CallBegin(0, "c0", "box__inner"), CallArguments(0, "{}")],
        [CallBegin(1, "c1", "patch"), CallArguments(1, '{"input": "+a"}'), DONE],
    ]
    body = {
        "model": "m",
        "instructions": "You are a coding agent.",
        "input": [
            {
                "type": "message",
                "role": "developer",
                "content": [{"type": "input_text", "text": "Rules."}],
            },
            {
                "type": "message",
                "role": "user",
                "content": [{"type": "input_text", "text": "Fix it."}],
            },
            {
                "type": "reasoning",
                "id": "rs_1",
                "summary": [],
                "content": [{"type": "reasoning_text", "text": "Look."}],
                "encrypted_content": None,
            },
            {
                "type": "function_call",
                "name": "inner",
                "namespace": "box__",
                "arguments": "{}",
                "call_id": "c",
            },
            {"type": "function_call_output", "call_id": "c", "output": "ok"},
        ],
        "tools": [*TOOLS, {"type": "web_search", "external_web_access": False}],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "7c9b8f2e-0000-4c00-8000-000000000002",
        "text": {"verbosity": "medium"},
        "service_tier": "auto",
        "client_metadata": {"x-codex-installation-id": "9c1a2b3c"},
    }
    answer = script.post("/v1/responses", body, originator="codex_cli_rs")
    assert answer.status_code == 200
    asked = script.asked[0]
    roles = [message["role"] for message in asked.messages]
    assert roles == ["system", "user", "assistant", "tool"]
    assert asked.messages[2]["reasoning_content"] == "Look."
    assert [tool.name for tool in asked.tools] == ["f", "patch", "box__inner"]
    assert asked.template["reasoning_effort"] == "medium"
    events = frames(answer.content)
    deltas = [event for event in events if event["type"] == "response.reasoning_summary_text.delta"]
    assert [(event["delta"], event["summary_index"]) for event in deltas] == [("Hm.", 0)]
    items = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert [item["type"] for item in items] == ["reasoning", "function_call", "custom_tool_call"]
    assert (items[1]["namespace"], items[1]["name"]) == ("box__", "inner")
    assert items[2]["input"] == "+a"
    last = events[-1]
    assert last["type"] == "response.completed"
    assert last["response"]["usage"]["total_tokens"] == NUM_PROMPT
    assert [tool["type"] for tool in last["response"]["tools"]] == [
        "function",
        "custom",
        "namespace",
    ]


def test_through_a_models_own_text(served: Served) -> None:
    """From a fake tritonserver to the SDK and back."""
    served.model.chat_template += " <think> </think> <tool_call>"
    served.triton.models["m"].answer = lambda asked, choice: (
        "<think>\nHm.\n</think>\n\nLook:\n<tool_call>\n"
        '{"name": "patch", "arguments": {"input": "+a"}}\n</tool_call>'
    )
    events = list(
        served.sdk.responses.create(
            model="m",
            input="Hi",
            tools=[CUSTOM],  # type: ignore[list-item]
            stream=True,
        )
    )
    response = events[-1].response  # type: ignore[union-attr]
    thoughts, said, call = response.output
    assert thoughts.content[0].text == "Hm."
    assert said.content[0].text == "Look:"
    assert (call.type, call.input) == ("custom_tool_call", "+a")
    served.triton.models["m"].answer = lambda asked, choice: "Done"
    result = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "ok"}
    again = served.sdk.responses.create(
        model="m",
        previous_response_id=response.id,
        input=[result],  # type: ignore[list-item]
    )
    assert again.output_text == "Done"
    assert "<|tool|>\nok" in served.model.asked[-1].prompt
