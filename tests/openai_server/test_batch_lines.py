"""A line of a batch is answered as the server answers its body: the same status, the same JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from scripted_triton import FakeModel
from serving import Served

from gllm_client.answers import AnswerSource, RemoteAnswers
from gllm_client.batch import Failed, parse_line
from gllm_client.openai_server.endpoints import CHAT, COMPLETIONS

USER = [{"role": "user", "content": "Hello"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALL = '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
TEMPLATE = "<tool_call> </think> enable_thinking reasoning_effort"


@pytest.fixture
def source(served: Served) -> Iterator[AnswerSource]:
    with closing(RemoteAnswers(served.triton.address, None)) as source:
        yield source


def in_a_batch(source: AnswerSource, url: str, body: Any, **flags: Any) -> tuple[int, Any]:
    line = {"custom_id": "a", "method": "POST", "url": url, "body": body}
    _, item = parse_line(1, json.dumps(line).encode())
    assert not isinstance(item, Failed)
    ((_, answer),) = source.answers([item.with_flags(flags)], 1)
    told = answer.openai if isinstance(answer, Failed) else answer
    assert isinstance(told, dict) and told["error"] is None
    assert isinstance(answer, Failed) == (told["response"]["status_code"] != 200)
    return told["response"]["status_code"], known(told["response"]["body"])


def known(body: dict[str, Any]) -> dict[str, Any]:
    """What does not change from request to request."""
    kept = {key: value for key, value in body.items() if key not in ("id", "created")}
    for choice in kept.get("choices", ()):
        for call in choice.get("message", {}).get("tool_calls", ()):
            del call["id"]
    return json.loads(json.dumps(kept))  # type: ignore[no-any-return]


CHATS: list[dict[str, Any]] = [
    {},
    {"model": "m", "max_tokens": 2, "user": "u", "metadata": {"a": "b"}, "stream": False},
    {"tools": TOOLS, "return_token_ids": True},
    {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False},
    {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}},
    {"tools": TOOLS, "tool_choice": "none", "n": 2},
    {"logprobs": True, "top_logprobs": 2, "prompt_logprobs": 1, "include_reasoning": False},
    {"response_format": {"type": "json_object"}, "reasoning_effort": "low"},
    {"truncate_prompt_tokens": 3, "stop": "t", "prompt_cache_key": "k"},
    {"messages": []},
    {"messages": [{"role": "robot", "content": "x"}]},
    {"model": "gpt"},
    {"model": 5},
    {"temprature": 1},
    {"stream_options": {}},
    {"top_logprobs": 2},
    {"temperature": float("nan")},
    {"seed": 10**400},
    {"user": "\ud800"},
    {"logit_bias": {"a": "b"}},
    {"messages": USER * 3000},
    {"tool_choice": "required"},
]
TEXTS: list[dict[str, Any]] = [
    {"prompt": "Once"},
    {"prompt": ["Once", "twice"], "n": 2, "max_tokens": 3},
    {"prompt": [79, 110], "echo": True, "logprobs": 2, "max_tokens": 0},
    {"prompt": [[79], [110]], "logprobs": 1, "return_tokens_as_token_ids": True},
    {"prompt": []},
    {"prompt": [10**10]},
    {"prompt": "a", "suffix": "b"},
    {"prompt": "a", "best_of": 2},
    {"prompt": "a", "logprobs": True},
    {},
]


@pytest.mark.parametrize(
    ("url", "body"), [(CHAT, body) for body in CHATS] + [(COMPLETIONS, body) for body in TEXTS]
)
def test_a_line_is_answered_as_by_the_server(
    served: Served, source: AnswerSource, url: str, body: dict[str, Any]
) -> None:
    served.model.chat_template = TEMPLATE
    served.model.answer = lambda asked, choice: CALL
    body = ({"messages": USER} if url == CHAT else {}) | body
    headers = {"content-type": "application/json"}
    answer = served.http.post(url, content=json.dumps(body), headers=headers)
    asked = [asked.inputs for asked in served.model.asked if "operation" not in asked.inputs]
    assert in_a_batch(source, url, body) == (answer.status_code, known(answer.json()))
    again = [asked.inputs for asked in served.model.asked if "operation" not in asked.inputs]
    for inputs in again:
        inputs["stream"] = True  # a batch asks for whole answers
        inputs.pop("return_cumulative_logprob", None)
    assert sorted(map(str, again)) == sorted(map(str, asked * 2))  # prompts come in any order


@pytest.mark.parametrize(
    "sentence",
    [
        "temperature: 200.0 is outside [0.0, 100.0]",
        "the queue is full: 4096 requests are waiting (max_waiting)",
        "the engine has ended and another one is being started",
    ],
)
def test_errors_of_triton_are_those_of_the_server(
    served: Served, source: AnswerSource, sentence: str
) -> None:
    served.model.refusal = sentence
    answer = served.post(CHAT, messages=USER)
    found = in_a_batch(source, CHAT, {"messages": USER})
    assert found == (answer.status_code, known(answer.json()))
    assert found[1]["error"]["message"] == sentence


def test_a_stream_is_refused(source: AnswerSource) -> None:
    status, body = in_a_batch(source, CHAT, {"messages": USER, "stream": True})
    assert (status, body["error"]["param"]) == (400, "stream")


def test_a_named_model_answers_all_lines(served: Served) -> None:
    served.triton.models["other"] = FakeModel()
    with closing(RemoteAnswers(served.triton.address, "m")) as source:
        status, body = in_a_batch(source, CHAT, {"messages": USER, "model": "gpt"}, tenant="t")
    assert (status, body["model"]) == (200, "m")
    assert served.model.asked[-1].sampling["tenant"] == "t"


def test_minus_infinity_is_a_number_that_json_has(served: Served, source: AnswerSource) -> None:
    import scripted_triton

    def least(char: str, top: int) -> dict[str, Any]:
        entry = {"logprob": float("-inf"), "rank": 1, "decoded_token": char}
        return {str(ord(char)): entry}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scripted_triton, "scored", least)
        body = {"messages": USER, "logprobs": True, "prompt_logprobs": 0}
        status, told = in_a_batch(source, CHAT, body)
    (choice,) = told["choices"]
    assert {entry["logprob"] for entry in choice["logprobs"]["content"]} == {-9999.0}
    assert [*told["prompt_logprobs"][1].values()][0]["logprob"] == -9999.0
