"""Completion requests by the real SDK: prompts of all kinds, echoes, log probabilities."""

from __future__ import annotations

from typing import Any

import pytest
from scripted_triton import FakeModel
from serving import Served


def ids(text: str) -> list[int]:
    return [ord(char) for char in text]


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["ab!"]),
        (["ab", "c"], ["ab!", "c!"]),
        (ids("ab"), ["ab!"]),
        ([ids("ab"), ids("c")], ["ab!", "c!"]),
    ],
)
def test_prompts_of_all_kinds(served: Served, prompt: Any, texts: list[str]) -> None:
    answer = served.sdk.completions.create(model="m", prompt=prompt, n=2)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    assert [choice.text for choice in answer.choices] == [text for text in texts for _ in "12"]
    assert [choice.index for choice in answer.choices] == list(range(2 * len(texts)))
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(text) - 1 for text in texts)
    assert answer.usage.completion_tokens == sum(2 * len(text) for text in texts)


@pytest.mark.parametrize("tokens_per_chunk", [1, 2, 100])
@pytest.mark.parametrize("options", [{}, {"echo": True}, {"echo": True, "logprobs": 2, "n": 2}])
def test_a_stream_equals_the_whole_answer(
    served: Served, options: dict[str, Any], tokens_per_chunk: int
) -> None:
    served.model.tokens_per_chunk = tokens_per_chunk
    body: dict[str, Any] = {"model": "m", "prompt": ["abc", "defg", "h"]} | options
    answer = served.sdk.completions.create(**body)
    found: dict[int, dict[str, Any]] = {}
    usage = None
    for chunk in served.sdk.completions.create(
        **body, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for part in chunk.choices:
            choice = found.setdefault(part.index, {"text": "", "tokens": [], "offsets": []})
            choice["text"] += part.text
            choice["finish_reason"] = part.finish_reason
            if part.logprobs is not None:
                choice["tokens"] += part.logprobs.tokens
                choice["offsets"] += part.logprobs.text_offset
    assert usage == answer.usage
    for choice in answer.choices:
        logprobs = choice.logprobs
        assert found[choice.index] == {
            "text": choice.text,
            "finish_reason": choice.finish_reason,
            "tokens": logprobs.tokens if logprobs else [],
            "offsets": logprobs.text_offset if logprobs else [],
        }


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_what_lm_eval_needs(served: Served, max_tokens: int) -> None:
    """Prompts as token ids, echoed with log probabilities, as its local-completions asks."""
    context = "one two"
    continuation = " three"
    answer = served.sdk.completions.create(
        model="m",
        prompt=[ids(context + continuation)],  # type: ignore[list-item]
        echo=True,
        logprobs=1,
        max_tokens=max_tokens,
        temperature=0,
        seed=1234,
    )
    (choice,) = answer.choices
    whole = context + continuation
    assert choice.text == whole + "one two three"[:max_tokens]
    logprobs = choice.logprobs
    assert logprobs is not None and logprobs.token_logprobs and logprobs.top_logprobs
    assert logprobs.tokens == list(choice.text)
    assert logprobs.text_offset == list(range(len(choice.text)))
    assert logprobs.token_logprobs == [None, *[-2.0] * (len(choice.text) - 1)]
    assert logprobs.top_logprobs[0] is None
    for token, top in zip(logprobs.tokens[1:], logprobs.top_logprobs[1:], strict=True):
        assert top == {"ā": -1.0, token: -2.0}
    assert answer.usage and answer.usage.completion_tokens == max_tokens
    assert choice.finish_reason == "length"


def test_the_default_length_is_16(served: Served) -> None:
    served.triton.models["m"] = FakeModel(answer=lambda asked, choice: "x" * 100)
    answer = served.sdk.completions.create(model="m", prompt="a")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("x" * 16, "length")


def test_a_truncated_prompt_is_echoed_truncated(served: Served) -> None:
    answer = served.post("/v1/completions", prompt="abcdef", echo=True, truncate_prompt_tokens=2)
    assert answer.json()["choices"][0]["text"] == "efef!"


def test_token_ids_are_returned_if_asked_for(served: Served) -> None:
    answer = served.post("/v1/completions", prompt="ab", return_token_ids=True, prompt_logprobs=0)
    (choice,) = answer.json()["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (ids("ab"), ids("ab!"))
    assert choice["prompt_logprobs"][0] is None and len(choice["prompt_logprobs"]) == 2


def test_every_prompt_has_an_id_of_its_own(served: Served) -> None:
    served.http.post(
        "/v1/completions", json={"prompt": ["a", "b"]}, headers={"x-request-id": "mine"}
    )
    names = {asked.id for asked in served.model.asked if "operation" not in asked.inputs}
    assert names == {"mine-0", "mine-1"}


def test_one_failed_prompt_fails_the_request(served: Served) -> None:
    def answer(asked: Any, choice: int) -> str:
        served.model.refusal = (
            "the queue is full: 4 requests are waiting" if asked.prompt == "b" else None
        )
        return "x"

    served.model.answer = answer
    status, _, message = served.refused("/v1/completions", prompt=["a", "b", "c"])
    assert status == 429 and "queue is full" in message


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [[1, "a"]]}, "prompt[0][1]"),
        ({"prompt": ["a"] * 1025}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "tools": []}, "tools"),
        ({"prompt": "a", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ],
)
def test_what_is_refused(served: Served, body: dict[str, Any], param: str) -> None:
    status, field, message = served.refused("/v1/completions", **body)
    assert (status, field) == (400, param) and message.startswith(f"{param}: ")
