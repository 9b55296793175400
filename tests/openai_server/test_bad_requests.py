"""Requests that are refused: every one gets an OpenAI error that names its field, and the server
goes on."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from patience import SOON_S
from scripted_triton import FakeModel
from serving import Served

USER = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"


def schema(value: dict[str, Any]) -> dict[str, Any]:
    """A response_format."""
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}


TEXT_FORMAT = {"format": {"type": "json_schema", "name": "x", "schema": {}}}
TOOL = {"type": "function", "function": {"name": "f", "strict": True}}
REQUIRED: dict[str, Any] = {"tools": [TOOL], "tool_choice": "required"}
REQUIRED_OF_RESPONSES = REQUIRED | {
    "tools": [{"type": "function", "name": "f"}],
    "text": TEXT_FORMAT,
}


@pytest.fixture(autouse=True)
def canary(served: Served) -> Iterator[None]:
    yield
    assert served.post(CHAT, messages=USER).json()["choices"][0]["message"]["content"] == "Hello!"


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "messages", "required"),
        ({"messages": []}, "messages", "empty"),
        ({"messages": "hi"}, "messages", "expected array"),
        ({"messages": [1]}, "messages[0]", "expected object"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role", "robot"),
        ({"messages": [{"content": "a"}]}, "messages[0].role", "system"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "text"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content", "1"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
            "this model takes no images",
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
            "messages[0].tool_calls[0].function",
            "required",
        ),
        ({"messages": USER, "temperature": "hot"}, "temperature", "'hot'"),
        ({"messages": USER, "n": 1.5}, "n", "1.5"),
        ({"messages": USER, "n": 0}, "n", "[1, 64]"),
        ({"messages": USER, "n": 10**9}, "n", "[1, 64]"),
        ({"messages": USER, "stream": 1}, "stream", "bool"),
        ({"messages": USER, "stop": [1]}, "stop[0]", "1"),
        ({"messages": USER, "logit_bias": {"a": "b"}}, "logit_bias[...]", "float"),
        ({"messages": USER, "frobnicate": 1}, "frobnicate", "unknown"),
        ({"messages": USER, "functions": []}, "functions", "unknown"),
        ({"messages": USER, "audio": {}}, "audio", "unknown"),
        ({"messages": USER, "use_beam_search": True}, "use_beam_search", "True"),
        ({"messages": USER, "modalities": ["audio"]}, "modalities[0]", "audio"),
        ({"messages": USER, "top_logprobs": 3}, "top_logprobs", "logprobs: true"),
        ({"messages": USER, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"messages": USER, "stream_options": {}}, "stream_options", "stream: true"),
        (
            {"messages": USER, "stream": True, "stream_options": {"x": 1}},
            "stream_options.x",
            "unknown",
        ),
        ({"messages": USER, "tool_choice": "required"}, "tool_choice", "tools"),
        ({"messages": USER, "tool_choice": "maybe"}, "tool_choice", "maybe"),
        ({"messages": USER, "tools": [{"type": "function"}]}, "tools[0].function", "required"),
        ({"messages": USER, "tools": [{"type": "custom"}]}, "tools[0].type", "custom"),
        (
            {
                "messages": USER,
                "tools": [{"type": "function", "function": {"name": "f"}}],
                "structured_outputs": {"json": {"x-guidance": 1}},
            },
            "structured_outputs.json",
            "x-guidance",
        ),
        (
            {"messages": USER, "tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools[0].function.name",
            "letters",
        ),
        (
            {"messages": USER, "tools": [{"type": "function", "function": {"name": "a"}}] * 2},
            "tools[1].function.name",
            "earlier",
        ),
        (
            {
                "messages": USER,
                "tools": [{"type": "function", "function": {"name": "a"}}],
                "tool_choice": {"type": "function", "function": {"name": "b"}},
            },
            "tool_choice.function.name",
            "'b'",
        ),
        (
            {"messages": USER, "response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "required",
        ),
        ({"messages": USER, "response_format": {"type": "xml"}}, "response_format.type", "xml"),
        (
            {
                "messages": USER,
                "response_format": {"type": "json_object"},
                "structured_outputs": {"regex": "a"},
            },
            "response_format",
            "structured_outputs",
        ),
        (
            {"messages": USER, "response_format": {"type": "json_object", "schema": {}}},
            "response_format.schema",
            "unknown",
        ),
        (
            {"messages": USER, "response_format": schema({}) | {"type": "json_object"}},
            "response_format.json_schema",
            "it goes with type json_schema",
        ),
        (
            {"messages": USER, "response_format": schema({"x-guidance": 1})},
            "response_format",
            "x-guidance",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}
                ]
            },
            "messages[0].tool_calls[0].function.name",
            "None is not text",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "reasoning": ["b"]}]},
            "messages[0].reasoning",
            "['b'] is not text",
        ),
        (
            {"messages": USER, "logit_bias": {"5": "x"}},
            "logit_bias[...]",
            "Expected float, got str",
        ),
        ({"messages": USER, "reasoning_effort": "much"}, "reasoning_effort", "'much'"),
        ({"messages": USER, "documents": [{}]}, "documents", "template takes none"),
        (
            {"messages": USER, "add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
            "add_generation_prompt",
        ),
        ({"messages": USER, "length_penalty": 1.5}, "length_penalty", "1.5"),
        ({"messages": USER, "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "-1"),
    ],
)
def test_a_wrong_field_is_named(
    served: Served, body: dict[str, Any], param: str, words: str
) -> None:
    status, field, message = served.refused(CHAT, **body)
    assert (status, field) == (400, param)
    assert message.startswith(f"{param}: ") and words in message


@pytest.mark.parametrize(
    ("path", "body", "parameter", "field"),
    [
        (CHAT, {"response_format": schema({})}, "structured_outputs", "response_format"),
        (CHAT, {"structured_outputs": {"json": {}}}, "structured_outputs", "structured_outputs"),
        (CHAT, {"tools": [TOOL]}, "structured_outputs", "tools"),
        (
            CHAT,
            {"tools": [TOOL], "response_format": {"type": "text"}},
            "structured_outputs",
            "tools",
        ),
        (CHAT, REQUIRED | {"response_format": schema({})}, "structured_outputs", "tools"),
        (
            CHAT,  # either may be answered, and nobody knows which is wrong
            {"tools": [TOOL], "response_format": schema({})},
            "structured_outputs",
            "response_format or tools",
        ),
        ("/v1/responses", REQUIRED_OF_RESPONSES, "structured_outputs", "tools"),
        (CHAT, {"max_completion_tokens": 7}, "max_tokens", "max_completion_tokens"),
        (CHAT, {"max_tokens": 7}, "max_tokens", "max_tokens"),
        (
            "/v1/completions",
            {"response_format": schema({})},
            "structured_outputs",
            "response_format",
        ),
        ("/v1/responses", {"text": TEXT_FORMAT}, "structured_outputs", "text"),
        (MESSAGES, {"stop_sequences": ["a"]}, "stop", "stop_sequences"),
        (
            MESSAGES,
            {"output_format": {"type": "json_schema", "schema": {}}},
            "structured_outputs",
            "output_format",
        ),
    ],
)
def test_the_client_reads_the_name_that_it_has_given(
    served: Served, path: str, body: dict[str, Any], parameter: str, field: str
) -> None:
    served.triton.models["m"] = FakeModel(chat_template="<tool_call>")
    served.model.refusal = f"{parameter}: it is wrong"
    prompt: dict[str, Any] = {"messages": USER}
    if path == "/v1/completions":
        prompt = {"prompt": "a"}
    if path == "/v1/responses":
        prompt = {"input": "a"}
    if path == MESSAGES:
        prompt |= {"max_tokens": 5, "model": "m"}
    answer = served.post(path, **prompt, **body)
    served.model.refusal = None
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["message"] == f"{field}: it is wrong"
    assert path == MESSAGES or error["param"] == field


def test_null_means_not_given(served: Served) -> None:
    fields = ("n", "stop", "tools", "tool_choice", "logprobs", "stream", "frobnicate", "metadata")
    assert served.post(CHAT, messages=USER, **dict.fromkeys(fields)).status_code == 200


def test_an_effort_that_the_model_does_not_know_is_refused(served: Served) -> None:
    served.triton.models["m"] = FakeModel(chat_template="<|role|>")
    status, field, _ = served.refused(CHAT, messages=USER, reasoning_effort="high")
    assert (status, field) == (400, "reasoning_effort")
    assert served.post(CHAT, messages=USER, reasoning_effort="none").status_code == 200


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"{", 400, "JSON"),
        (b"[]", 400, "object"),
        (b"", 400, "JSON"),
        (b'{"messages": "\xff"}', 400, "JSON"),
        (b'{"messages": ' + b"[" * 100_000, 400, "nested"),
        (b'{"tools": ' + b'{"a":' * 100_000, 400, "nested"),
        (b'{"seed": ' + b"9" * 10_000 + b"}", 400, ""),
        (
            b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
            400,
            "messages: not valid JSON",
        ),
        (b'{"messages": [], "metadata": {"a": "\\uD83D"}}', 400, "metadata: not valid JSON"),
        (b'{"messages": [], "metadata": {"\\udc00": ""}}', 400, "metadata: not valid JSON"),
        (b'{"messages": [], "seed": Infinity}', 400, "seed: not valid JSON"),
        (b'{"messages": [], "top_p": 1e999}', 400, "top_p: not valid JSON"),
        (b'{"messages": [{"content": "a", "content": "b"}]}', 400, "key 'content' comes twice"),
        ('{"messages": []}'.encode("utf-16"), 400, "JSON"),
    ],
)
def test_a_body_that_is_no_request(served: Served, content: bytes, status: int, words: str) -> None:
    headers = {"content-type": "application/json"}
    answer = served.http.post(CHAT, content=content, headers=headers)
    assert answer.status_code == status and words in answer.json()["error"]["message"]


def test_another_content_type_is_refused(served: Served) -> None:
    answer = served.http.post(CHAT, content=json.dumps({"messages": USER}))
    assert answer.status_code == 415 and "application/json" in answer.json()["error"]["message"]


def test_a_body_of_100_mb_is_refused_before_it_is_read(served: Served) -> None:
    address = ("127.0.0.1", int(served.url.rpartition(":")[2]))
    with socket.create_connection(address, SOON_S) as client:
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
            b"content-type: application/json\r\ncontent-length: 100000000\r\n\r\n{"
        )
        answer = b""
        while b"--max-body-size" not in answer:
            answer += client.recv(4096) or b"--max-body-size at the end"
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_many_messages_and_tools(served: Served) -> None:
    served.triton.models["m"] = FakeModel(max_model_len=1_000_000)
    assert served.post(CHAT, messages=USER * 10_000).status_code == 200
    tools = [{"type": "function", "function": {"name": f"f{i}"}} for i in range(1000)]
    assert served.post(CHAT, messages=USER, tools=tools).status_code == 200
    status, field, _ = served.refused(CHAT, messages=USER, tools=tools * 2)
    assert (status, field) == (400, "tools")


def test_a_prompt_that_is_too_long(served: Served) -> None:
    with pytest.raises(
        openai.BadRequestError, match=r"prompt is too long: 50\d\d tokens > 4095"
    ) as failed:
        served.sdk.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "x" * 5000}],
        )
    assert failed.value.code == "context_length_exceeded"


def test_a_prompt_that_the_backend_finds_too_long(served: Served) -> None:
    served.model.refusal = "prompt: its 15050 characters are more than 14336"
    answer = served.post(CHAT, messages=USER).json()["error"]
    served.model.refusal = None
    assert answer["message"] == "prompt is too long: its 15050 characters are more than 14336"
    assert (answer["code"], answer["param"]) == ("context_length_exceeded", "prompt")


def test_an_unknown_model_and_an_unknown_route(served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as failed:
        served.sdk.chat.completions.create(model="x", messages=USER)  # type: ignore[arg-type]
    assert failed.value.code == "model_not_found" and failed.value.param == "model"
    answer = served.http.get("/v1/nothing")
    assert answer.status_code == 404 and answer.json()["error"]["type"] == "not_found_error"
    assert served.http.get(CHAT).status_code == 405
    assert served.http.get(CHAT).json()["error"]["message"].startswith(f"GET {CHAT}: ")


@pytest.mark.parametrize(
    "path", ["/v1/embeddings", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"]
)
def test_routes_that_are_refused_by_name(served: Served, path: str) -> None:
    status, _, message = served.refused(path, input="a")
    assert status == 501 and message.startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("sentence", "status", "param"),
    [
        ("temperature: 200.0 is outside [0.0, 100.0]", 400, "temperature"),
        ("chat_template_kwargs: thinking is never read", 400, "chat_template_kwargs"),
        ("the queue is full: 4096 requests are waiting (max_waiting)", 429, None),
        ("the engine has ended and another one is being started", 503, None),
        ("an internal error, see the server's log", 500, None),
        ("The KV cache holds 100 tokens, too few", 400, None),
    ],
)
def test_errors_of_triton(served: Served, sentence: str, status: int, param: str | None) -> None:
    served.model.refusal = sentence
    for stream in (False, True):  # a stream that fails before it begins has a status too
        answer = served.post(CHAT, messages=USER, stream=stream)
        assert answer.status_code == status
        assert answer.json()["error"]["message"] == sentence
        assert answer.json()["error"]["param"] == param
        assert ("retry-after" in answer.headers) == (status in (429, 503))
    served.model.refusal = None


def test_the_switches_of_the_template_are_fields(served: Served) -> None:
    served.model.refusal = "chat_template_kwargs: continue_final_message: it has no content"
    status, field, message = served.refused(CHAT, messages=USER, continue_final_message=True)
    served.model.refusal = None
    assert (status, field) == (400, "continue_final_message")
    assert message == "continue_final_message: it has no content"


def test_a_stream_that_fails_half_way(served: Served) -> None:
    served.model.refusal = "the engine has ended"
    served.model.refuse_after = 1
    with pytest.raises(openai.APIError, match="the engine has ended"):
        list(served.sdk.chat.completions.create(model="m", messages=USER, stream=True))  # type: ignore[arg-type]
    answer = served.post(CHAT, messages=USER, stream=True)
    events = answer.text.strip().split("\n\n")
    assert json.loads(events[-2].removeprefix("data: "))["error"]["type"] == "server_error"
    assert events[-1] == "data: [DONE]" and answer.status_code == 200
    assert answer.text.count("error") == 2  # "error" and its type: one event
    served.model.refusal = None


def test_a_fault_of_ours_is_an_internal_error(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gllm_client.openai_server import chat

    def fail(*args: Any) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(chat, "to_conversation", fail)
        status, _, message = served.refused(CHAT, messages=USER)
    assert status == 500 and "a bug" not in message
