"""OpenAI's batch lines: what each field means, what is refused, and what an answer looks like."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion

from gllm_client.batch import Failed, Item, parse_line, run_batch
from gllm_client.openai_lines import CHAT, COMPLETIONS, answered, failure
from gllm_client.protocol import Chunk, Output

MESSAGES = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
SCHEMA = {"type": "object"}


def line(url: str = CHAT, custom_id: object = "a", **body: Any) -> dict[str, Any]:
    body = ({"messages": MESSAGES} if url == CHAT else {"prompt": "Hi"}) | body
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def item_of(url: str = CHAT, **body: Any) -> Item:
    key, item = parse_line(1, json.dumps(line(url, **body)).encode())
    assert isinstance(item, Item), item
    assert key == item.key == ("custom_id", "a")
    return item


@pytest.mark.parametrize(
    ("body", "sampling"),
    [
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_tokens": 5, "max_completion_tokens": 7}, {"max_tokens": 7}),
        ({"temperature": 0, "top_p": 0.5, "n": 2}, {"temperature": 0, "top_p": 0.5, "n": 2}),
        ({"stop": "x", "seed": 3}, {"stop": "x", "seed": 3}),
        ({"logit_bias": {"5": 1}, "top_k": 4}, {"logit_bias": {"5": 1}, "top_k": 4}),
        ({"presence_penalty": 1, "min_p": 0.1}, {"presence_penalty": 1, "min_p": 0.1}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 3}, {"logprobs": 3}),
        ({"logprobs": False, "top_logprobs": 0}, {}),
        ({"prompt_logprobs": 1, "ignore_eos": True}, {"prompt_logprobs": 1, "ignore_eos": True}),
        ({"response_format": {"type": "text"}}, {}),
        (
            {"response_format": {"type": "json_object"}},
            {"structured_outputs": {"json_object": True}},
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            {"structured_outputs": {"json": SCHEMA}},
        ),
        (
            {"response_format": {"type": "structural_tag", "structures": [], "triggers": []}},
            {"structured_outputs": {"structural_tag": {"structures": [], "triggers": []}}},
        ),
        ({"structured_outputs": {"regex": "a"}}, {"structured_outputs": {"regex": "a"}}),
        ({"prompt_cache_key": "k"}, {"cache_salt": "k"}),
        ({"cache_salt": "s", "prompt_cache_key": "k"}, {"cache_salt": "s"}),
        ({"user": "u", "metadata": {"a": "b"}, "stream": False, "store": None}, {}),
        ({"service_tier": "auto", "parallel_tool_calls": True, "temperature": None}, {}),
    ],
)
def test_the_sampling_parameters_of_a_chat(body: dict[str, Any], sampling: dict[str, Any]) -> None:
    item = item_of(model="m", **body)
    assert (item.prompt, item.sampling, item.template) == (MESSAGES, sampling, {})
    assert (item.url, item.model) == (CHAT, "m")


@pytest.mark.parametrize(
    ("body", "template"),
    [
        ({"tools": TOOLS}, {"tools": TOOLS}),
        ({"tools": TOOLS, "tool_choice": "auto"}, {"tools": TOOLS}),
        ({"tools": TOOLS, "tool_choice": "none"}, {}),
        ({"tools": []}, {}),
        ({"chat_template_kwargs": {"x": 1}}, {"chat_template_kwargs": {"x": 1}}),
        ({"reasoning_effort": "low"}, {"chat_template_kwargs": {"reasoning_effort": "low"}}),
        (
            {"chat_template_kwargs": {"x": 1}, "continue_final_message": True},
            {"chat_template_kwargs": {"x": 1, "continue_final_message": True}},
        ),
    ],
)
def test_what_is_for_the_chat_template(body: dict[str, Any], template: dict[str, Any]) -> None:
    assert item_of(**body).template == template


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("Hi", "Hi"), (["Hi"], "Hi"), ([5, 6], (5, 6)), ([[5, 6]], (5, 6))],
)
def test_the_prompt_of_a_completion(prompt: Any, expected: Any) -> None:
    item = item_of(COMPLETIONS, prompt=prompt, logprobs=2, echo=False, best_of=1)
    assert (item.prompt, item.sampling) == (expected, {"logprobs": 2})


def test_only_a_chat_goes_on_to_the_end_of_the_models_length_by_default() -> None:
    assert item_of().with_flags({"seed": 1}).sampling == {"max_tokens": None, "seed": 1}
    assert item_of().with_flags({"max_tokens": 9}).sampling == {"max_tokens": 9}
    assert item_of(max_tokens=5).with_flags({"max_tokens": 9}).sampling == {"max_tokens": 5}
    assert item_of(COMPLETIONS).with_flags({}).sampling == {}


@pytest.mark.parametrize(
    ("url", "body", "param"),
    [
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "x"}, "messages"),
        (CHAT, {"messages": None}, "messages"),
        (CHAT, {"prompt": "x"}, "prompt"),
        (CHAT, {"stream": True}, "stream"),
        (CHAT, {"stream_options": {}}, "stream_options"),
        (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
        (CHAT, {"max_completion_tokens": "5"}, "max_completion_tokens"),
        (CHAT, {"logprobs": 1}, "logprobs"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": True}, "top_logprobs"),
        (CHAT, {"tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
        (CHAT, {"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        (CHAT, {"tools": {}}, "tools"),
        (CHAT, {"parallel_tool_calls": False}, "parallel_tool_calls"),
        (CHAT, {"functions": []}, "functions"),
        (CHAT, {"response_format": {"type": "xml"}}, "response_format.type"),
        (CHAT, {"response_format": {}}, "response_format.type"),
        (
            CHAT,
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format.json_schema.schema",
        ),
        (
            CHAT,
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "structured_outputs",
        ),
        (
            CHAT,
            {"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}},
            "reasoning_effort",
        ),
        (CHAT, {"model": 5}, "model"),
        (CHAT, {"temprature": 1}, "temprature"),
        (CHAT, {"k" * 99: 1}, "k" * 57 + "..."),
        (COMPLETIONS, {"prompt": None}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", "b"]}, "prompt"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"prompt": [True]}, "prompt"),
        (COMPLETIONS, {"prompt": ""}, "prompt"),
        (COMPLETIONS, {"messages": MESSAGES}, "messages"),
        (COMPLETIONS, {"logprobs": True}, "logprobs"),
        (COMPLETIONS, {"max_completion_tokens": 5}, "max_completion_tokens"),
        (COMPLETIONS, {"suffix": "x"}, "suffix"),
        (COMPLETIONS, {"echo": True}, "echo"),
        (COMPLETIONS, {"best_of": 2}, "best_of"),
    ],
)
def test_a_refused_field_is_named_in_the_response(
    url: str, body: dict[str, Any], param: str
) -> None:
    key, failed = parse_line(3, json.dumps(line(url, **body)).encode())
    assert isinstance(failed, Failed) and failed.openai is not None and key == ("custom_id", "a")
    assert failed.openai["error"] is None
    assert failed.openai["response"]["status_code"] == 400
    error = failed.openai["response"]["body"]["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert error["message"].startswith(f"{param}: ") and len(error["message"]) < 200


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"method": "GET"}, "method: 'GET' is not POST"),
        ({"method": None}, "method: None is not POST"),
        ({"url": "/v1/embeddings"}, "url: '/v1/embeddings' is not supported; /v1/chat/compl"),
        ({"url": ["x"]}, "url: ['x'] is not supported"),
        ({"body": "x"}, "body: a JSON object is needed"),
        ({"id": 7}, "id: unknown key; known are custom_id, method, url, body"),
        ({"custom_id": None}, "custom_id: a string is needed"),
        ({"custom_id": 7}, "custom_id: a string is needed"),
    ],
)
def test_a_line_that_is_no_request_has_an_error_of_its_own(
    change: dict[str, Any], problem: str
) -> None:
    key, failed = parse_line(3, json.dumps(line() | change).encode())
    assert isinstance(failed, Failed) and failed.openai is not None
    assert failed.openai["response"] is None
    assert failed.openai["error"]["code"] == "invalid_line"
    assert failed.openai["error"]["message"].startswith(problem)
    assert key == (("line", 3) if "custom_id" in change else ("custom_id", "a"))


@pytest.mark.parametrize(
    ("message", "status", "param"),
    [
        ("top_p: 9.0 is outside [0, 1]", 400, "top_p"),
        ("text_input: the prompt is empty", 400, "prompt"),
        ("input_ids: token 9 is outside the vocabulary", 400, "prompt"),
        ("model: 'x' is not here", 404, "model"),
        ("the engine process died; it is being restarted", 500, None),
        ("timeout: 5 microseconds are over", 500, None),
    ],
)
def test_the_field_of_a_failure_is_found(message: str, status: int, param: str | None) -> None:
    response = failure(message)["response"]
    error = response["body"]["error"]
    assert (response["status_code"], error["param"]) == (status, param)
    assert error["message"].endswith(message.partition(": ")[2] or message)


def entry(*tokens: tuple[int, str, float]) -> dict[str, Any]:
    return {
        str(id): {"logprob": logprob, "rank": rank, "decoded_token": text}
        for rank, (id, text, logprob) in enumerate(tokens, 1)
    }


def chunk(num: int = 1, with_logprobs: bool = False) -> Chunk:
    """ "b" was chosen although "a" is likelier; then "é", which is the likeliest."""
    logprobs = [
        entry((5, "a", -0.5), (6, "b", -1.0)),
        entry((7, "é", 0.0), (5, "a", float("-inf"))),
    ]
    output = Output("bé", "length", (6, 7), logprobs if with_logprobs else None, num_tokens=2)
    return Chunk((output,) * num, 4)


def body_of(answer: dict[str, Any]) -> dict[str, Any]:
    response = json.loads(json.dumps(answer, allow_nan=False))["response"]
    assert response["status_code"] == 200 and response["request_id"]
    body: dict[str, Any] = response["body"]
    return body


def test_a_chat_answer_is_openais_object() -> None:
    body = body_of(answered(CHAT, "m", {"logprobs": 1}, chunk(2, with_logprobs=True)))
    told = ChatCompletion.model_validate(body, strict=True)
    assert (told.model, told.object, [c.index for c in told.choices]) == (
        "m", "chat.completion", [0, 1]
    )  # fmt: skip
    choice = told.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", "bé")
    assert choice.finish_reason == "length"
    assert told.usage is not None
    assert told.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8
    }  # fmt: skip
    assert choice.logprobs is not None and choice.logprobs.content is not None
    first, second = choice.logprobs.content
    assert (first.token, first.logprob, first.top_logprobs[0].token) == ("b", -1.0, "a")
    assert (second.token, second.bytes) == ("é", [0xC3, 0xA9])
    assert len(first.top_logprobs) == len(second.top_logprobs) == 1


def test_a_completion_is_openais_object() -> None:
    body = body_of(answered(COMPLETIONS, "m", {"logprobs": 2}, chunk(with_logprobs=True)))
    (choice,) = Completion.model_validate(body, strict=True).choices
    assert (choice.text, choice.finish_reason) == ("bé", "length")
    assert choice.logprobs is not None
    assert choice.logprobs.model_dump() == {
        "tokens": ["b", "é"],
        "token_logprobs": [-1.0, 0.0],
        "text_offset": [0, 1],
        "top_logprobs": [{"a": -0.5, "b": -1.0}, {"é": 0.0, "a": -9999.0}],
    }


def test_without_logprobs_there_are_none() -> None:
    for url, kind in ((CHAT, ChatCompletion), (COMPLETIONS, Completion)):
        told = kind.model_validate(body_of(answered(url, "m", {}, chunk())), strict=True)
        assert told.choices[0].logprobs is None and "prompt_logprobs" not in told.model_dump()


def test_prompt_logprobs_stand_where_vllm_has_them() -> None:
    asked = Chunk(chunk().outputs, 1, prompt_logprobs=[None, entry((5, "a", float("-inf")))])
    chat = body_of(answered(CHAT, "m", {}, asked))
    plain = body_of(answered(COMPLETIONS, "m", {}, asked))
    expected = [None, entry((5, "a", -9999.0))]
    assert chat["prompt_logprobs"] == plain["choices"][0]["prompt_logprobs"] == expected


# ---------------------------------------------------------------- files


class Answers:
    """Answers every prompt with its own text; "fail" fails. `asked`: the keys, in order."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def __call__(self, items: Iterable[Item]) -> Iterator[tuple[Item, Chunk | Failed]]:
        for item in items:
            self.asked.append(item.key)
            if item.prompt == "fail":
                yield item, Failed("top_p: 9 is outside [0, 1]")
            else:
                yield item, Chunk((Output(str(item.prompt), "stop", (1,), num_tokens=1),), 2)


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_a_file_may_hold_lines_of_both_forms(tmp_path: Path) -> None:
    """An id of one form is not that of the other; every bad line costs itself alone."""
    source = write(
        tmp_path / "in",
        *(line(COMPLETIONS, "a", prompt="A"), {"id": "a", "prompt": "own"}),
        *(line(COMPLETIONS, "bad", prompt="fail"), {"id": "bad", "prompt": "fail"}),
        *(line(COMPLETIONS, "a", prompt="twice"), '{"custom_id": "cut", "meth', "not JSON"),
        *(line(custom_id="refused", stream=True), line(custom_id=5), line(custom_id="chat")),
    )
    target = tmp_path / "out"
    tally = run_batch(source, target, Answers(), model="m")
    assert (tally.answered, tally.failed) == (3, 7)
    found = lines_of(target)
    openai = {answer["custom_id"]: answer for answer in found if answer.get("custom_id")}
    assert openai.keys() == {"a", "bad", "refused", "chat"}
    assert all(answer.keys() == {"id", "custom_id", "response", "error"} for answer in
               openai.values())  # fmt: skip
    assert openai["a"]["response"]["body"]["choices"][0]["text"] == "A"
    assert openai["a"]["response"]["body"]["model"] == "m" and openai["a"]["error"] is None
    assert openai["bad"]["response"]["status_code"] == 400
    assert openai["bad"]["response"]["body"]["error"]["param"] == "top_p"
    assert openai["refused"]["response"]["body"]["error"]["param"] == "stream"
    lost = {answer["line"]: answer for answer in found if answer.get("custom_id", "") is None}
    assert lost.keys() == {5, 6, 9}
    assert lost[5]["error"]["message"] == "custom_id: 'a' is the custom_id of line 1 already"
    assert lost[6]["error"]["message"].startswith("line 6: not valid JSON")
    own = {answer["id"]: answer for answer in found if "custom_id" not in answer}
    assert own["a"]["text"] == "own" and own["bad"] == {
        "id": "bad", "error": "top_p: 9 is outside [0, 1]"
    }  # fmt: skip
    assert own[7]["line"] == 7 and own.keys() == {"a", "bad", 7}
    again = Answers()
    assert run_batch(source, target, again).skipped == 10 and not again.asked
    assert lines_of(target) == found
    tally = run_batch(source, target, again, retry_errors=True)
    assert again.asked == [("custom_id", "bad"), "bad"]  # the others are refused when read
    assert (tally.skipped, tally.answered, tally.failed) == (3, 0, 7)
    assert len(lines_of(target)) == 10


@pytest.mark.parametrize(
    "text",
    [
        '{"id": "x", "custom_id": 5, "response": null, "error": null}',
        '{"id": "x", "custom_id": "a", "response": "?", "error": null}',
        '{"custom_id": "a", "response": null, "error": null}',
    ],
)
def test_what_is_no_answer_of_a_batch_is_not_continued(tmp_path: Path, text: str) -> None:
    target = write(tmp_path / "out", text)
    with pytest.raises(RuntimeError, match="line 1 is not an answer"):
        run_batch(write(tmp_path / "in"), target, Answers())


def test_answers_that_openai_or_vllm_gave_are_continued(tmp_path: Path) -> None:
    source = write(tmp_path / "in", line(custom_id="a"), line(custom_id="b"), line(custom_id="c"))
    good: dict[str, Any] = {"id": "batch_req_1", "custom_id": "a", "error": None}
    good["response"] = {"status_code": 200, "request_id": "r", "body": {}}
    bad = good | {"custom_id": "b", "response": {"status_code": 500}, "error": {"message": "no"}}
    target = write(tmp_path / "out", good, bad)
    answers = Answers()
    run_batch(source, target, answers, retry_errors=True)
    assert answers.asked == [("custom_id", "b"), ("custom_id", "c")]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
FIELDS = [
    *("model", "messages", "prompt", "max_completion_tokens", "logprobs", "top_logprobs"),
    *("tools", "tool_choice", "response_format", "chat_template_kwargs", "reasoning_effort"),
    *("stream", "echo", "best_of", "modalities", "structured_outputs", "prompt_cache_key"),
]


@given(
    url=st.sampled_from([CHAT, COMPLETIONS]) | JSON,
    body=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), JSON) | JSON,
    rest=st.dictionaries(st.sampled_from(["custom_id", "method", "id", "x"]), JSON),
)
def test_any_line_is_a_request_or_says_why_not(url: Any, body: Any, rest: dict[str, Any]) -> None:
    told = {"custom_id": "a", "method": "POST", "url": url, "body": body} | rest
    key, item = parse_line(1, json.dumps(told).encode())
    if isinstance(item, Failed):
        assert item.openai is not None and item.message
        json.dumps(item.openai)
    else:
        assert item.key == key == ("custom_id", "a") and item.prompt and item.url == url
