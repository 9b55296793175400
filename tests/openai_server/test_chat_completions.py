"""Chat requests by the real SDK, against a fake Triton: answers, streams, what Triton is sent."""

from __future__ import annotations

import json
from typing import Any

import pytest
from scripted_triton import Asked, FakeModel
from serving import Served

USER = [{"role": "user", "content": "Hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
THINKING = "<|role|> <tool_call> </think> enable_thinking"


def generated(served: Served) -> Asked:
    """The last generation that Triton was asked for."""
    return [asked for asked in served.model.asked if "operation" not in asked.inputs][-1]


def thinker(text: str, **options: Any) -> FakeModel:
    """A model of Hermes' and Qwen's format whose answers begin inside thoughts."""
    return FakeModel(
        answer=lambda asked, choice: text,
        chat_template=THINKING,
        generation_prompt="<|assistant|>\n<think>\n",
        **options,
    )


def joined(chunks: list[Any]) -> list[dict[str, Any]]:
    """The choices of a whole answer, put together from the chunks of a stream."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for part in chunk.choices:
            choice = choices.setdefault(
                part.index,
                {
                    "content": "",
                    "reasoning": "",
                    "calls": [],
                    "finish_reason": None,
                    "logprobs": [],
                },
            )
            delta = part.delta
            assert choice["finish_reason"] is None, "something comes after the end"
            choice["content"] += delta.content or ""
            choice["reasoning"] += getattr(delta, "reasoning", None) or ""
            for call in delta.tool_calls or []:
                if call.id is not None:
                    choice["calls"].append([call.function.name, ""])
                choice["calls"][call.index][1] += call.function.arguments
            choice["finish_reason"] = part.finish_reason
            if part.logprobs is not None:
                choice["logprobs"] += part.logprobs.content
    return [choices[index] for index in sorted(choices)]


def whole(answer: Any) -> list[dict[str, Any]]:
    """The choices of a whole answer in the same form."""
    return [
        {
            "content": choice.message.content or "",
            "reasoning": getattr(choice.message, "reasoning", None) or "",
            "calls": [
                [call.function.name, call.function.arguments]
                for call in choice.message.tool_calls or []
            ],
            "finish_reason": choice.finish_reason,
            "logprobs": choice.logprobs.content if choice.logprobs else [],
        }
        for choice in answer.choices
    ]


def test_an_answer_and_its_usage(served: Served) -> None:
    served.model.num_cached_tokens = 5
    answer = served.sdk.chat.completions.create(model="m", messages=USER)
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion"
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello!")
    assert choice.finish_reason == "stop" and choice.logprobs is None
    usage = answer.usage
    prompt = "<|user|>\nHello\n<|assistant|>"
    assert usage is not None and usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), 6)
    assert usage.total_tokens == len(prompt) + 6
    assert usage.prompt_tokens_details.cached_tokens == 5
    assert generated(served).prompt == prompt


def test_a_stream_has_a_role_the_text_a_reason_and_the_usage(served: Served) -> None:
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(served.sdk.chat.completions.create(model="m", messages=USER, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].delta.content for c in chunks[:-1]] == ["", "Hel", "lo!", None]
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None, None, None, "stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 6
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_continuous_usage_counts_up(served: Served) -> None:
    options: dict[str, Any] = {"stream": True, "stream_options": {"continuous_usage_stats": True}}
    chunks = list(served.sdk.chat.completions.create(model="m", messages=USER, **options))
    assert [chunk.usage.completion_tokens for chunk in chunks] == [0, 3, 6, 6]


@pytest.mark.parametrize("tokens_per_chunk", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    "text",
    [
        "I think.\n</think>\n\nHi.",
        f"Weather?</think>{CALL}",
        f"Weather?</think>\n\nI look. {CALL}\n{CALL}",
        "never ends",
        "Weather?</think><tool_call>\nnot a call\n</tool_call>",
        "",
    ],
)
def test_a_stream_equals_the_whole_answer(served: Served, text: str, tokens_per_chunk: int) -> None:
    served.triton.models["m"] = thinker(text, tokens_per_chunk=tokens_per_chunk)
    body: dict[str, Any] = {"model": "m", "messages": USER, "tools": [WEATHER]}
    body |= {"n": 2, "logprobs": True, "top_logprobs": 2}
    answer = served.sdk.chat.completions.create(**body)
    chunks = list(served.sdk.chat.completions.create(**body, stream=True))
    assert joined(chunks) == whole(answer)
    (first, second) = whole(answer)
    assert first == second
    assert len(first["logprobs"]) == len(text)
    assert "</think>" not in first["content"] + first["reasoning"]
    calls = [["weather", '{"city": "Köln"}']] * text.count('"arguments"')
    assert [[name, arguments] for name, arguments in first["calls"]] == calls
    assert first["finish_reason"] == ("tool_calls" if calls else "stop")


def test_thoughts_are_told_apart_and_counted(served: Served) -> None:
    served.triton.models["m"] = thinker("Why?</think>Because", tokens_per_chunk=1)
    answer = served.sdk.chat.completions.create(model="m", messages=USER)
    message: Any = answer.choices[0].message
    assert (message.reasoning, message.reasoning_content) == ("Why?", "Why?")
    assert message.content == "Because"
    details = answer.usage and answer.usage.completion_tokens_details
    assert details is not None and details.reasoning_tokens == len("Why?</think>")
    silent = served.post(
        "/v1/chat/completions", model="m", messages=USER, include_reasoning=False
    ).json()
    assert "reasoning" not in silent["choices"][0]["message"]
    assert silent["choices"][0]["message"]["content"] == "Because"
    assert silent["usage"] == json.loads(answer.usage.model_dump_json(exclude_unset=True))


def test_a_named_tool_is_called_once_and_ends_with_stop(served: Served) -> None:
    served.triton.models["m"] = thinker(f"x</think>{CALL}{CALL}")
    answer = served.sdk.chat.completions.create(
        model="m",
        messages=USER,
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "weather"}},
    )
    (choice,) = whole(answer)
    assert [name for name, _ in choice["calls"]] == ["weather"]
    assert choice["finish_reason"] == "stop"
    assert "grammar" in generated(served).sampling["structured_outputs"]


def test_tool_choice_none_hides_the_tools(served: Served) -> None:
    served.triton.models["m"] = thinker(f"x</think>{CALL}")
    body: dict[str, Any] = {"model": "m", "messages": USER, "tools": [WEATHER]}
    assert "<|tools|>weather" not in generated_prompt(served, body | {"tool_choice": "none"})
    assert "<|tools|>weather" in generated_prompt(served, body)


def generated_prompt(served: Served, body: dict[str, Any]) -> str:
    assert served.post("/v1/chat/completions", **body).status_code == 200
    return generated(served).prompt


def test_logprobs_in_openais_form(served: Served) -> None:
    answer = served.sdk.chat.completions.create(
        model="m", messages=USER, logprobs=True, top_logprobs=2, max_tokens=1
    )
    (entry,) = answer.choices[0].logprobs.content  # type: ignore[union-attr,misc]
    assert (entry.token, entry.logprob, entry.bytes) == ("H", -2.0, [72])
    assert [(top.token, top.logprob) for top in entry.top_logprobs] == [("ā", -1.0), ("H", -2.0)]
    assert answer.choices[0].finish_reason == "length"


def test_every_sampling_field_reaches_triton(served: Served) -> None:
    given: dict[str, Any] = {
        "n": 2, "stop": ["x", "y"], "seed": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 5,
        "min_p": 0.1, "presence_penalty": 0.2, "frequency_penalty": 0.3, "repetition_penalty": 1.1,
        "logit_bias": {"42": -100}, "min_tokens": 1, "stop_token_ids": [3],
        "include_stop_str_in_output": True, "skip_special_tokens": False, "ignore_eos": True,
        "bad_words": ["z"], "priority": -1, "prompt_logprobs": 0, "cache_salt": "s",
    }  # fmt: skip
    answer = served.post("/v1/chat/completions", model="m", messages=USER, max_tokens=9, **given)
    assert answer.status_code == 200, answer.text
    assert generated(served).sampling == given | {"max_tokens": 9}
    assert len(answer.json()["prompt_logprobs"]) == answer.json()["usage"]["prompt_tokens"]


def test_defaults_are_the_checkpoints(served: Served) -> None:
    config = {"temperature": 0.6, "top_k": 20, "max_new_tokens": 4}
    served.triton.models["m"] = FakeModel(generation_config=config)
    served.post("/v1/chat/completions", model="m", messages=USER, top_k=3)
    assert generated(served).sampling == {"n": 1, "temperature": 0.6, "top_k": 3, "max_tokens": 4}
    served.model.generation_config = {}
    served.forget()
    served.post("/v1/chat/completions", model="m", messages=USER)
    asked = generated(served)
    assert asked.sampling["max_tokens"] == served.model.max_model_len - len(asked.prompt)


def test_the_salt_is_of_both_fields(served: Served) -> None:
    for given, salt in [
        ({"cache_salt": "a"}, "a"),
        ({"prompt_cache_key": "a"}, '[null, "a"]'),
        ({"cache_salt": "a", "prompt_cache_key": "b"}, '["a", "b"]'),
        ({"cache_salt": "a\nb"}, "a\nb"),
    ]:
        assert served.post("/v1/chat/completions", messages=USER, **given).status_code == 200
        assert generated(served).sampling["cache_salt"] == salt


@pytest.mark.parametrize(
    ("given", "form"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": {"type": "object"}},
                }
            },
            {"json": {"type": "object"}},
        ),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ["a", "b"]}),
    ],
)
def test_forms(served: Served, given: dict[str, Any], form: Any) -> None:
    answer = served.post("/v1/chat/completions", messages=USER, **given)
    assert answer.status_code == 200, answer.text
    assert generated(served).sampling.get("structured_outputs") == form


def test_template_variables(served: Served) -> None:
    template = "enable_thinking reasoning_effort documents"
    served.triton.models["m"] = FakeModel(chat_template=template)
    given = {
        "reasoning_effort": "none",
        "documents": [{"text": "x"}],
        "add_generation_prompt": False,
        "continue_final_message": True,
        "chat_template_kwargs": {"custom": 1},
    }
    assert served.post("/v1/chat/completions", messages=USER, **given).status_code == 200
    rendering = [a for a in served.model.asked if a.inputs.get("operation") == "tokenize"][-1]
    assert json.loads(rendering.inputs["chat_template_kwargs"]) == {
        "documents": [{"text": "x"}],
        "add_generation_prompt": False,
        "continue_final_message": True,
        "reasoning_effort": "none",
        "enable_thinking": False,
        "custom": 1,
    }


def test_an_answer_of_the_sdk_may_be_sent_back(served: Served) -> None:
    served.triton.models["m"] = thinker(f"Weather?</think>{CALL}")
    answer = served.sdk.chat.completions.create(model="m", messages=USER, tools=[WEATHER])
    message = answer.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}  # type: ignore[index]
    history = [*USER, message.model_dump(), result, {"role": "developer", "content": "Be kind"}]
    assert served.post("/v1/chat/completions", messages=history).status_code == 200
    rendering = [a for a in served.model.asked if a.inputs.get("operation") == "tokenize"][-1]
    sent = json.loads(rendering.inputs["messages"])
    assert [entry["role"] for entry in sent] == ["user", "assistant", "tool", "system"]
    assert sent[1]["tool_calls"][0]["function"]["name"] == "weather"
    assert sent[1]["reasoning_content"] == "Weather?"
    assert not sent[1].keys() & {"refusal", "annotations", "audio", "function_call"}


@pytest.mark.parametrize("arguments", ['{"a": 1, "b', "[1]", "text"])
def test_a_call_that_was_broken_off_may_be_sent_back(served: Served, arguments: str) -> None:
    """As the SDK's users and agents do, so that the model may correct it."""
    function = {"name": "f", "arguments": arguments}
    calls = [{"id": "c", "type": "function", "function": function}]
    said = {"role": "assistant", "content": None, "tool_calls": calls}
    result = {"role": "tool", "tool_call_id": "c", "content": "no JSON"}
    answer = served.post("/v1/chat/completions", messages=[*USER, said, result])
    assert answer.status_code == 200, answer.text
    rendering = [a for a in served.model.asked if a.inputs.get("operation") == "tokenize"][-1]
    (call,) = json.loads(rendering.inputs["messages"])[1]["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": {"arguments": arguments}}


def test_parts_of_text(served: Served) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answer = served.sdk.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": parts}],  # type: ignore[list-item,misc,typeddict-item]
    )
    assert answer.choices[0].message.content == "b!"


def test_the_sdk_parses_a_schema(served: Served) -> None:
    from pydantic import BaseModel

    class City(BaseModel):
        name: str

    served.model.answer = lambda asked, choice: '{"name": "Köln"}'
    answer = served.sdk.chat.completions.parse(model="m", messages=USER, response_format=City)
    assert answer.choices[0].message.parsed == City(name="Köln")


def test_truncation_keeps_the_end(served: Served) -> None:
    body = {"messages": [{"role": "user", "content": "x" * 5000}], "max_tokens": 10}
    served.post("/v1/chat/completions", **body, truncate_prompt_tokens=20)
    assert generated(served).prompt == "xxxxxx\n<|assistant|>"
    served.post("/v1/chat/completions", **body, truncate_prompt_tokens=-1)
    assert len(generated(served).prompt) == served.model.max_model_len - 10


def test_token_ids_are_returned_if_asked_for(served: Served) -> None:
    body = {"messages": USER, "return_token_ids": True, "logprobs": True}
    answer = served.post("/v1/chat/completions", **body, return_tokens_as_token_ids=True).json()
    assert answer["choices"][0]["token_ids"] == [ord(char) for char in "Hello!"]
    assert answer["prompt_token_ids"] == [ord(char) for char in generated(served).prompt]
    tokens = [entry["token"] for entry in answer["choices"][0]["logprobs"]["content"]]
    assert tokens[0] == f"token_id:{ord('H')}"


def test_a_stop_string_is_told(served: Served) -> None:
    answer = served.post("/v1/chat/completions", messages=USER, stop="o").json()
    assert answer["choices"][0]["message"]["content"] == "Hell"
    assert answer["choices"][0]["stop_reason"] == "o"


def test_fields_that_change_nothing(served: Served) -> None:
    """Clients send them habitually."""
    answer = served.sdk.chat.completions.create(
        model="m",
        messages=USER,
        user="u",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        verbosity="low",
        safety_identifier="s",
    )
    assert answer.choices[0].message.content == "Hello!"
