"""Whatever a body holds: an answer, or an OpenAI error of status 4xx that names the field."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted_triton import Asked, FakeModel, Refused
from serving import Served

from gllm_client.openai_server.chat import ChatRequest
from gllm_client.openai_server.completions import CompletionRequest
from gllm_client.openai_server.messages_request import MessagesRequest
from gllm_client.openai_server.responses_request import ResponsesRequest
from gllm_engine import InvalidField, decode_json, parse_sampling
from gllm_engine.text.chat_template import check_messages

USER = [{"role": "user", "content": "Hello"}]
PATHS: dict[str, tuple[Any, dict[str, Any]]] = {
    "/v1/chat/completions": (ChatRequest, {"messages": USER}),
    "/v1/completions": (CompletionRequest, {"prompt": "Hello"}),
    "/v1/responses": (ResponsesRequest, {"input": "Hello"}),
    "/v1/messages": (MessagesRequest, {"model": "m", "messages": USER, "max_tokens": 5}),
}


def nested(begin: str, end: str, depth: int) -> str:
    return begin * depth + "1" + end * depth


def tools(count: int, schema: str = "{}") -> str:
    each = '{"type": "function", "function": {"name": "f%d", "strict": true, "parameters": %s}}'
    return "[" + ",".join(each % (n, schema) for n in range(count)) + "]"


def schema_form(schema: str) -> str:
    return f'{{"type": "json_schema", "json_schema": {{"name": "a", "schema": {schema}}}}}'


DEEP = [nested("[", "]", depth) for depth in (300, 900, 10_000)]
DEEP += [nested('{"properties": {"a": ', "}}", depth) for depth in (200, 450, 10_000)]
DEEP += [nested('{"items": ', "}", depth) for depth in (300, 900)]
# The JSON of a value, or what stands in its place.
VALUES = [
    *("NaN", "-Infinity", "1e400", "-1", "0", "1", "1.5", "1e9", "-0.0", "true", "false", "null"),
    *("9" * 30, "9" * 400, "9" * 5000, "-" + "9" * 30, '""', '"x"', '"\\ud800"', '"\\u0000"'),
    *('"\udcff"', '"' + "x" * 100_000 + '"', "[]", "{}", "[null]", "[{}]", "[1]", '["a", 1]'),
    *('{"a": 1, "a": 2}', '{"type": "x"}', '{"type": "function"}', '{"type": []}', "[[]]"),
    *("[" + ",".join(["1"] * 100_000) + "]", "[" + ",".join(['"a"'] * 10_000) + "]", *DEEP),
    *(f'[{{"role": "{role}", "content": "a"}}]' for role in ("robot", "tool", "assistant")),
    '[{"role": "tool", "content": "a", "tool_call_id": "x"}, {"role": "system", "content": "b"}]',
    '[{"role": "assistant", "content": null, "tool_calls": [{"function": {"name": 5}}]}]',
    '[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[["}}]}]',
    f'[{{"role": "user", "content": [{{"type": "text", "text": {DEEP[1]}}}]}}]',
    "[" + ",".join(['{"role": "user", "content": "a"}'] * 10_000) + "]",
    *(f'[{{"type": "{kind}"}}]' for kind in ("custom", "message", "reasoning", "function_call")),
    '[{"type": "custom", "name": "a", "format": {"type": "grammar", "syntax": "lark"}}]',
    *(tools(1000), tools(2000), *(tools(1, schema) for schema in DEEP)),
    *(tools(1, schema) for schema in ("true", '{"x-guidance": 1}', '{"$ref": "#"}', '{"type": 1}')),
    *(schema_form(schema) for schema in (*DEEP, "{}", '{"x-guidance": 1}', '{"properties": []}')),
    *(f'{{"format": {form}}}' for form in ('{"type": "json_schema", "schema": 1}', *DEEP[3:5])),
    *('{"regex": "("}', '{"grammar": "start: \\"a"}', '{"choice": [1]}', '{"choice": []}'),
    *('{"json": "["}', f'{{"json": {DEEP[4]}}}', '{"regex": 5}', '{"structural_tag": 5}'),
]


IN_JSON = {"sampling_parameters", "messages", "tools", "chat_template_kwargs"}


class Checking(FakeModel):
    """Checks what the backend checks."""

    def respond(self, asked: Asked) -> Iterator[dict[str, list[Any]]]:
        try:
            for name in {
                "sampling_parameters",
                "messages",
                "tools",
                "chat_template_kwargs",
            } & asked.inputs.keys():
                decode_json(name, asked.inputs[name])
            if "messages" in asked.inputs:
                for message in check_messages(json.loads(asked.inputs["messages"])):
                    message["content"] = message.get("content") or ""
            if "sampling_parameters" in asked.inputs:
                parse_sampling(
                    decode_json("sampling_parameters", asked.inputs["sampling_parameters"])
                )
        except InvalidField as error:
            raise Refused(str(error)) from None
        yield from super().respond(asked)


def body_of(fields: dict[str, str]) -> bytes:
    text = ", ".join(f"{json.dumps(name)}: {value}" for name, value in fields.items())
    return b"{" + text.encode("utf-8", "surrogateescape") + b"}"


@given(data=st.data())
@settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@pytest.mark.parametrize("path", PATHS)
def test_a_hostile_body_is_answered_or_refused_by_name(
    served: Served, path: str, data: st.DataObject
) -> None:
    served.triton.models["m"] = Checking(chat_template="<tool_call> </think> enable_thinking")
    kind, base = PATHS[path]
    names = st.sampled_from(kind.__struct_fields__) | st.sampled_from(["frobnicate", "tools"])
    hostile = data.draw(st.dictionaries(names, st.sampled_from(VALUES), min_size=1, max_size=2))
    body = {name: json.dumps(value) for name, value in base.items()} | hostile
    check(served, path, body)


def test_a_tools_schema_is_refused_as_tools(served: Served) -> None:
    served.triton.models["m"] = Checking(chat_template="<tool_call>")
    tool = {"name": "f", "strict": True, "parameters": {"x-guidance": 1}}
    body = {
        "messages": [{"role": "user", "content": "Hello"}],
        "tools": [{"type": "function", "function": tool}],
    }
    status, field, message = served.refused("/v1/chat/completions", **body)
    assert (status, field) == (400, "tools") and "x-guidance" in message


def check(served: Served, path: str, body: dict[str, str]) -> None:
    headers = {"content-type": "application/json"}
    answer = served.http.post(path, content=body_of(body), headers=headers)
    if answer.status_code == 200:
        return
    assert 400 <= answer.status_code < 500, (body, answer.text)
    error = answer.json()["error"]
    assert error["type"] in ("invalid_request_error", "not_found_error") and error["message"]
    assert len(error["message"]) < 500
    if path == "/v1/messages":
        return
    if error["code"] != "context_length_exceeded":
        assert error["message"].startswith(f"{error['param']}: "), error
        assert re.split(r"[.\[]", error["param"])[0] in {*body, *PATHS[path][0].__struct_fields__}


def test_a_long_value_makes_no_long_message(served: Served) -> None:
    body = {"input": '"Hello"', "truncation": json.dumps("x" * 100_000)}
    check(served, "/v1/responses", body)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ('"temperature": NaN', "temperature"),
        ('"seed": 1e400', "seed"),
        ('"user": "\\ud800"', "user"),
        ('"user": "\udcff"', "user"),
        (f'"tools": {tools(1, DEEP[2])}', "tools"),
        ('"temperature": 0, "temperature": 1', "temperature"),
        ('"metadata": {"a": "1", "a": "2"}', "metadata"),
    ],
)
def test_what_is_no_json_is_named(served: Served, fields: str, param: str) -> None:
    body = f'{{"messages": {json.dumps(USER)}, {fields}, "n": 1}}'
    content = body.encode("utf-8", "surrogateescape")
    headers = {"content-type": "application/json"}
    answer = served.http.post("/v1/chat/completions", content=content, headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
