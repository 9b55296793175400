"""The requests that Triton's own OpenAI front end makes (`--backend vllm`), and what they mean.

It applies the chat template itself and sends text. Its schema fills in defaults, so every request
has sampling parameters. It reads text_output, and two counts as UINT32, of each response.
"""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import fake_triton
import numpy as np
import pytest
from front import flag, front_end, text

from gllm_backend.gllm.model import TritonPythonModel
from gllm_backend.gllm.request import OUTPUTS, parse_request
from gllm_engine import Finish, InvalidField, SamplingParams

PROMPT = "<|user|>Hi<|assistant|>"
# What its schemas fill in for a chat and for a completion.
CHAT = {"frequency_penalty": 0.0, "n": 1, "presence_penalty": 0.0, "temperature": 1.0, "top_p": 1.0}
CHAT |= {"max_tokens": 16}
COMPLETION = CHAT | {"ignore_eos": False}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
# All fields of vLLM's StructuredOutputsParams, as a named or a required tool sets them.
TOOL = {
    "json": json.dumps(SCHEMA), "regex": None, "choice": None, "grammar": None,
    "json_object": None, "disable_any_whitespace": False, "disable_additional_properties": False,
    "whitespace_pattern": None, "structural_tag": None, "_backend": None,
    "_backend_was_auto": False,
}  # fmt: skip


def converted(sampling: dict[str, Any], **flags: bool) -> Any:
    """A request with the inputs that it names; flags are false where a test does not say."""
    given = {"stream": False, "exclude_input_in_output": True, "return_logprobs": False} | flags
    given |= {"return_num_input_tokens": True, "return_num_output_tokens": True}
    tensors = {name: flag(value) for name, value in given.items()}
    tensors |= {"text_input": text(PROMPT), "sampling_parameters": text(json.dumps(sampling))}
    return fake_triton.InferenceRequest(tensors, request_id="", outputs=set(OUTPUTS))


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (CHAT, {}),
        (COMPLETION, {}),
        (CHAT | {"stop": ["a", "b"], "seed": 5}, {"stop": ("a", "b"), "seed": 5}),
        (CHAT | {"stop": "a", "min_tokens": 2}, {"stop": ("a",), "min_tokens": 2}),
        (CHAT | {"max_tokens": 300, "temperature": 0.0}, {"max_tokens": 300, "temperature": 0}),
        (COMPLETION | {"ignore_eos": True}, {"ignore_eos": True}),
        (COMPLETION | {"best_of": 1}, {}),  # releases of 2025 and before
        (CHAT | {"logprobs": False}, {}),  # likewise
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_sampling_parameters(
    sampling: dict[str, Any], expected: dict[str, Any], stream: bool
) -> None:
    parsed = parse_request(converted(sampling, stream=stream))
    assert (parsed.kind, parsed.prompt, parsed.stream) == ("text_input", PROMPT, stream)
    assert parsed.sampling == SamplingParams(**expected) and not parsed.prepend_prompt
    assert parsed.outputs == {"text_output", "num_input_tokens", "num_output_tokens"}


def test_log_probabilities_are_a_number() -> None:
    """A chat with logprobs and no top_logprobs asks for one."""
    parsed = parse_request(converted(CHAT | {"logprobs": 1}, return_logprobs=True))
    assert parsed.sampling.logprobs == 1 and parsed.show_logprobs
    assert "logprobs" in parsed.outputs


def test_a_tool_that_must_be_called_is_a_schema() -> None:
    """JSON in JSON, with every field, those that are not set as null or false."""
    parsed = parse_request(converted(CHAT | {"structured_outputs": json.dumps(TOOL)}))
    asked = parsed.sampling.structured_outputs
    assert asked is not None and json.loads(asked.json or "") == SCHEMA
    assert (asked.regex, asked.choice, asked.grammar, asked.json_object) == (None,) * 3 + (False,)


def test_echo_gives_the_prompt_back_unless_streamed() -> None:
    assert parse_request(converted(COMPLETION, exclude_input_in_output=False)).prepend_prompt
    with pytest.raises(InvalidField, match="When streaming"):
        parse_request(converted(COMPLETION, exclude_input_in_output=False, stream=True))


@pytest.mark.parametrize(
    ("sampling", "problem"),
    [
        (COMPLETION | {"max_tokens": 0}, "max_tokens: 0 is outside"),  # its schema allows it
        (COMPLETION | {"best_of": 2}, "best_of: unknown sampling parameter"),
        (CHAT | {"logprobs": True}, "logprobs: True is not valid"),
        (CHAT | {"lora_name": "doll"}, "LoRA feature is not enabled."),
        (CHAT | {"guided_decoding": "{}"}, "guided_decoding: unknown"),  # tools before 2026
        (CHAT | {"structured_outputs": json.dumps(TOOL | {"regex": "a"})}, "exactly one of"),
    ],
)
def test_what_is_refused(sampling: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidField, match=problem):
        parse_request(converted(sampling))


@pytest.fixture
def front(tmp_path: Any, server: Any) -> Any:
    with front_end(tmp_path) as pair:
        yield pair


def test_it_finds_the_input_that_turns_echo_off() -> None:
    """In the model's configuration; without it a request would have an input without a name."""
    config = mock.Mock()
    TritonPythonModel.auto_complete_config(config)
    declared = {call.args[0]["name"] for call in config.add_input.call_args_list}
    assert "exclude_input_in_output" in declared


def test_usage_is_in_every_response_of_a_stream(front: Any) -> None:
    """The prompt's count in each, of the output what is new; one text in each, the last is FINAL.

    An unstreamed answer is one response: it takes no more than two.
    """
    model, client = front
    for stream in (True, False):
        given = converted(CHAT, stream=stream)
        model.execute([given])
        client.say(client.submitted[-1].id, "there", Finish("stop"))
        record = given.record.wait()
        record.check()
        assert len(record.data) == 1 or stream
        for response in record.data:
            assert response.tensors["text_output"].shape == (1,)
            for name in ("num_input_tokens", "num_output_tokens"):
                assert response.tensors[name].dtype == np.uint32
            assert response.tensors["num_input_tokens"].tolist() == [len(PROMPT)]
        assert sum(int(r.tensors["num_output_tokens"][0]) for r in record.data) == 5
