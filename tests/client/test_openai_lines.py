"""OpenAI's batch lines: what is a request, what flags mean, and how a file goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_client.batch import Answer, AnyItem, Failed, OpenAIItem, parse_line, run_batch
from gllm_client.openai_lines import read_body, refusal
from gllm_client.openai_server.endpoints import CHAT, COMPLETIONS
from gllm_client.openai_server.errors import invalid
from gllm_client.protocol import Chunk, Output
from gllm_engine import StructuredOutputs

MESSAGES = [{"role": "user", "content": "Hi"}]


def line(url: str = CHAT, custom_id: object = "a", **body: Any) -> dict[str, Any]:
    body = ({"messages": MESSAGES} if url == CHAT else {"prompt": "Hi"}) | body
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


@pytest.mark.parametrize(
    ("url", "body", "flags", "expected"),
    [
        (CHAT, {}, {"seed": 1, "max_tokens": None}, {"seed": 1, "max_tokens": None}),
        (CHAT, {"seed": 2}, {"seed": 1}, {"seed": 2}),
        (CHAT, {"seed": None}, {"seed": 1}, {"seed": 1}),
        (CHAT, {}, {"logprobs": 3}, {"logprobs": True, "top_logprobs": 3}),
        (CHAT, {"logprobs": False}, {"logprobs": 3}, {"logprobs": False, "top_logprobs": 0}),
        (CHAT, {}, {"logit_bias": {5: 1.0}, "stop": ("a",)}, {"logit_bias": {"5": 1.0}}),
        (COMPLETIONS, {}, {"logprobs": 3}, {"logprobs": 3}),
        (COMPLETIONS, {"logprobs": 0}, {"logprobs": 3}, {"logprobs": 0}),
        (
            CHAT,
            {"response_format": {"type": "json_object"}},
            {"structured_outputs": StructuredOutputs(regex="a")},
            {"structured_outputs": None},
        ),
        (
            CHAT,
            {},
            {"structured_outputs": StructuredOutputs(regex="a")},
            {"structured_outputs": {"regex": "a"}},
        ),
    ],
)
def test_flags_hold_for_what_a_body_does_not_say(
    url: str, body: dict[str, Any], flags: dict[str, Any], expected: dict[str, Any]
) -> None:
    asked = read_body(url, line(url, **body)["body"], flags)
    assert {name: getattr(asked, name) for name in expected} == expected


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


# ---------------------------------------------------------------- files


class Answers:
    """Answers every prompt with its own text; "fail" fails. `asked`: the keys, in order."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def __call__(self, items: Iterable[AnyItem]) -> Iterator[tuple[AnyItem, Answer]]:
        for item in items:
            self.asked.append(item.key)
            if isinstance(item, OpenAIItem):
                assert isinstance(item.body, dict)
                prompt = item.body.get("prompt")
                if prompt == "fail":
                    error = invalid("top_p", "9 is outside [0, 1]")
                    yield item, Failed(str(error), refusal(error))
                else:
                    response = {"status_code": 200, "request_id": "r", "body": {"text": prompt}}
                    yield item, {"id": "x", "response": response, "error": None}
            elif item.prompt == "fail":
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
        *(line("/v1/x", custom_id="refused"), line(custom_id=5), line(custom_id="chat")),
    )
    target = tmp_path / "out"
    tally = run_batch(source, target, Answers())
    assert (tally.answered, tally.failed) == (3, 7)
    found = lines_of(target)
    openai = {answer["custom_id"]: answer for answer in found if answer.get("custom_id")}
    assert openai.keys() == {"a", "bad", "refused", "chat"}
    assert all(answer.keys() == {"id", "custom_id", "response", "error"} for answer in
               openai.values())  # fmt: skip
    assert openai["a"]["response"]["body"] == {"text": "A"} and openai["a"]["error"] is None
    assert openai["bad"]["response"]["status_code"] == 400
    assert openai["bad"]["response"]["body"]["error"]["param"] == "top_p"
    assert openai["refused"]["error"]["message"].startswith("url: '/v1/x' is not supported")
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


@given(
    url=st.sampled_from([CHAT, COMPLETIONS]) | JSON,
    body=JSON,
    rest=st.dictionaries(st.sampled_from(["custom_id", "method", "id", "x"]), JSON),
)
def test_any_line_is_a_request_or_says_why_not(url: Any, body: Any, rest: dict[str, Any]) -> None:
    told = {"custom_id": "a", "method": "POST", "url": url, "body": body} | rest
    key, item = parse_line(1, json.dumps(told).encode())
    if isinstance(item, Failed):
        assert item.openai is not None and item.message
        json.dumps(item.openai)
    else:
        assert isinstance(item, OpenAIItem) and item.url == url
        assert item.key == key == ("custom_id", told["custom_id"])
