"""Every bad input is refused with a sentence that names the field; every good one is understood."""

from __future__ import annotations

import json
import time
from typing import get_args, get_origin, get_type_hints

import numpy as np
import pytest
from front import request, text

from gllm_backend.gllm.request import OUTPUTS, parse_request
from gllm_engine import InvalidField, SamplingParams

STREAM_SENTENCE = (
    "Error generating stream: When streaming, `exclude_input_in_output` = False is not allowed."
)


def refused(given) -> str:
    with pytest.raises(InvalidField) as caught:
        parse_request(given)
    return str(caught.value)


def ids(*values: int, dtype: type = np.int32) -> np.ndarray:
    return np.array(values, dtype)


BAD_INPUTS = [
    (request(None), "text_input", "no prompt"),
    (request(None, text_input=text("a", "b")), "text_input", "[2]"),
    (request(None, text_input=text()), "text_input", "[0]"),
    (request(None, text_input=text("a").reshape(1, 1)), "text_input", "[1, 1]"),
    (request(""), "text_input", "empty"),
    (request(None, text_input=text(b"ab\xffcd")), "text_input", "0xff at offset 2"),
    (request(None, text_input=ids(1)), "text_input", "BYTES"),
    (request("a", input_ids=ids(1)), "input_ids", "exactly one prompt"),
    (request("a", messages=text("[]")), "messages", "exactly one prompt"),
    (request(None, input_ids=ids()), "input_ids", "empty"),
    (request(None, input_ids=ids(1, dtype=np.int64)), "input_ids", "INT32"),
    (request(None, input_ids=ids(1, 2).reshape(1, 2)), "input_ids", "[1, 2]"),
    (request(None, messages=text("{")), "messages", "not valid JSON"),
    (request(None, messages=text(b"\xc3")), "messages", "UTF-8"),
    (request(None, messages=text("[1]"), tools=text("{")), "tools", "not valid JSON"),
    (request("a", tools=text("[]")), "tools", "goes with messages and not with text_input"),
    (
        request(None, input_ids=ids(1), chat_template_kwargs=text("{}")),
        "chat_template_kwargs",
        "goes with messages and not with input_ids",
    ),
    (
        request("a", operation=text("embed")),
        "operation",
        "'embed' is unknown; known are generate, ",
    ),
    (request(None, operation=text("tokenize")), "text_input", "no prompt"),
    (request(None, operation=text("detokenize")), "input_ids", "missing"),
    (
        request("a", operation=text("detokenize")),
        "text_input",
        "does not go with detokenize, which takes input_ids",
    ),
    (request("a", operation=text("describe")), "text_input", "describe, which takes no other"),
    (request("a", stream=True, operation=text("tokenize")), "stream", "go with tokenize"),
    (
        request("a", operation=text("tokenize"), sampling={"temperature": 1}),
        "sampling_parameters",
        "does not go with tokenize",
    ),
    (
        request("a", operation=text("tokenize"), parameters={"temperature": 1}),
        "temperature",
        "tokenize takes no sampling parameters",
    ),
    (
        request(None, input_ids=ids(1), add_special_tokens=True),
        "add_special_tokens",
        "not for input_ids",
    ),
    (request(stream=True, image=text("aGk=")), "image", "takes no images"),
    (request(exclude_input_in_output=ids(1)), "exclude_input_in_output", "BOOL"),
    (request(return_logprobs=np.array([True, False])), "return_logprobs", "[2]"),
    (request(surprise=text("x")), "surprise", "unknown input"),
    (request(sampling="{"), "sampling_parameters", "not valid JSON"),
    (request(sampling="[" * 100_000), "sampling_parameters", "too deeply"),
    (request(sampling="[1]"), "sampling_parameters", "JSON object"),
    (request(sampling="null"), "sampling_parameters", "JSON object"),
    (request(sampling='{"stop": "\\ud800"}'), "sampling_parameters", "surrogate"),
    (request(sampling='{"seed": 1, "seed": 2}'), "sampling_parameters", "'seed' is given twice"),
    (request(sampling='{"stop": "' + "a" * 2**20 + '"}'), "sampling_parameters", "at most 1048576"),
    (request(parameters={"stop": "a" * 2**20}), "parameters", "at most 1048576"),
    (request(sampling={"structured_outputs": '{"regex": "\\ud800"}'}), "structured", "surrogate"),
    (request(sampling={"structured_outputs": "[" * 100_000}), "structured_outputs", "too deeply"),
    (request(sampling={"structured_outputs": {"choice": ["a"] * 1025}}), "structured", "most 1024"),
    (request(sampling={"stop_token_ids": [1] * 1025}), "stop_token_ids", "at most 1024"),
    (request(sampling={"k" * 1000: 1}), "kkk", "...: unknown"),
    (request(sampling={"top_q": 1}), "top_q", "unknown"),
    (request(parameters={"sequence_id": 7}), "sequence_id", "unknown"),
    (request(parameters={"timeout": -1}), "timeout", "-1"),
    (request(parameters={"timeout": "soon"}), "timeout", "soon"),
    (request(parameters={"timeout": True}), "timeout", "True"),
    (request(parameters={"timeout": float("inf")}), "timeout", "inf"),
    (request(parameters={"timeout": 1.5}), "timeout", "1.5 is not valid (a whole number"),
    (request(parameters={"timeout": 2**63}), "timeout", "to 2**63 - 1"),
    (request(timeout=2**64 - 1), "timeout", "18446744073709551615 is not valid"),
]


@pytest.mark.parametrize(("given", "field", "words"), BAD_INPUTS)
def test_bad_input_is_named(given, field: str, words: str) -> None:
    sentence = refused(given)
    assert sentence.startswith(field)
    assert words in sentence


def test_a_key_given_twice_is_found_in_time() -> None:
    keys = ",".join(f'"k{i}": 0' for i in range(50_000))
    began = time.process_time()
    assert "'k49999' is given twice" in refused(request(sampling=f'{{{keys}, "k49999": 1}}'))
    assert time.process_time() - began < 5  # minutes when each is compared with every other


OUT_OF_RANGE = [
    ("max_tokens", [0, -1, "NaN", "Infinity", "1.5", '"x"', "true", "[1]"]),
    ("min_tokens", [-1, 17, "NaN"]),
    ("temperature", [-0.1, 100.1, "NaN", "Infinity", "-Infinity", "1e400", '"nan"']),
    ("top_p", [0, -0.1, 1.1, "NaN", "Infinity"]),
    ("top_k", [-2, "NaN", "Infinity", "2.5"]),
    ("min_p", [-0.1, 1.1, "NaN"]),
    ("seed", [2**63, -(2**63) - 1, "NaN"]),
    ("presence_penalty", [-2.1, 2.1, "NaN"]),
    ("frequency_penalty", [-2.1, 2.1, "-Infinity"]),
    ("repetition_penalty", [0, -1, 101, "NaN"]),
    ("logit_bias", ['{"1": 101}', '{"1": NaN}', '{"x": 1}', "[1]"]),
    ("logprobs", [-1, 21, "NaN"]),
    ("prompt_logprobs", [-1, 21]),
    ("n", [0, 65, "NaN", "Infinity"]),
    ("priority", [2**31, "NaN"]),
    ("stop", ['[""]', "[1]", "5"]),
    ("bad_words", ['[""]']),
    ("stop_token_ids", ['["a"]', '"["']),
    ("allowed_token_ids", ["[]", '"[]"', '["a"]', "true", str([1] * 16385)]),
    ("truncate_prompt_tokens", [0, -2, "NaN", "1.5"]),
    ("spaces_between_special_tokens", ["false", '"false"', "2"]),
    ("logprob_token_ids", ["[1]"]),
    ("ignore_eos", ["2", '"maybe"']),
    ("structured_outputs", ["{}", '{"regex": "a", "grammar": "b"}', '{"xml": "a"}']),
]


NUMBERS = {
    name
    for name, hint in get_type_hints(SamplingParams).items()
    # The range of token ids in a list is the vocabulary.
    if {int, float} & {hint, *get_args(hint)} and get_origin(hint) is not tuple
}
EXTREMES = [f"{sign}{number}" for sign in ("", "-") for number in ("9" * 400, "1e400", "9" * 5000)]


@pytest.mark.parametrize("as_text", [False, True], ids=["number", "text"])
@pytest.mark.parametrize("number", EXTREMES, ids=lambda text: f"{text[:5]}:{len(text)}")
@pytest.mark.parametrize("field", sorted(NUMBERS | {"timeout"}))
def test_every_number_has_a_range(field: str, number: str, as_text: bool) -> None:
    """Also one that Python would not turn into a float, or into digits again."""
    json_text = f'{{"{field}": {json.dumps(number) if as_text else number}}}'
    given = request()
    given._parameters = json_text
    for one in (given, request(sampling=json_text))[: 1 if field == "timeout" else 2]:
        sentence = refused(one)
        assert sentence.startswith((f"{field}: ", "parameters: a number", "sampling_parameters: a"))
        assert len(sentence) < 250 and "sys." not in sentence, sentence


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in OUT_OF_RANGE for v in values])
def test_out_of_range_is_named(field: str, value: object) -> None:
    assert refused(request(sampling=f'{{"{field}": {value}}}')).startswith(f"{field}: ")


def test_streaming_with_the_prompt_is_refused_in_the_vllm_backends_words() -> None:
    given = request(stream=True, exclude_input_in_output=False)
    assert refused(given) == STREAM_SENTENCE


def test_parameters_are_the_sampling_parameters_without_the_tensor() -> None:
    parameters = {
        "temperature": "0",
        "max_tokens": 7,
        "triton_enable_empty_final_response": True,
        "timeout": 1000,
    }
    parsed = parse_request(request(parameters=parameters))
    assert (parsed.sampling.temperature, parsed.sampling.max_tokens) == (0.0, 7)
    assert parsed.timeout_us == 1000


def test_lists_of_token_ids_may_be_one_id_or_json_text() -> None:
    for value in (5, "5", [5], "[5]", ["5"]):
        sampling = parse_request(request(sampling={"allowed_token_ids": value})).sampling
        assert sampling.allowed_token_ids == (5,)


def test_null_is_no_limit_where_there_is_one_and_else_the_default() -> None:
    sampling = parse_request(request(sampling='{"max_tokens": null, "top_p": null}')).sampling
    assert (sampling.max_tokens, sampling.top_p) == (None, 1.0)


def test_the_id_of_a_generate_body_is_no_sampling_parameter() -> None:
    assert parse_request(request("a", request_id="r7", parameters={"id": "r7"})).prompt == "a"
    assert refused(request("a", request_id="r7", parameters={"id": "r8"})).startswith("id: unknown")


def test_parameters_are_merged_with_the_tensor_which_counts_where_both_have_a_key() -> None:
    parameters = {"seed": 3, "max_tokens": "many", "top_p": 0.5}
    parsed = parse_request(
        request(sampling={"max_tokens": 5, "top_p": None}, parameters=parameters)
    )
    assert (parsed.sampling.max_tokens, parsed.sampling.seed) == (5, 3)
    assert parsed.sampling.top_p == 1.0  # null in the tensor is a value too


@pytest.mark.parametrize("where", ["sampling", "parameters"])
def test_an_adapter_is_refused_in_the_vllm_backends_words(where: str) -> None:
    assert refused(request(**{where: {"lora_name": "doll"}})) == "LoRA feature is not enabled."
    assert parse_request(request(**{where: {"lora_name": None}})).sampling == SamplingParams()


@pytest.mark.parametrize(
    ("parameter", "grpc", "expected"),
    [(None, 0, None), (0, 0, None), (5, 0, 5), (0, 9, 9), (5, 9, 5), ("12", 9, 9)],
)
def test_the_stricter_timeout_counts(parameter, grpc: int, expected: int | None) -> None:
    parameters = {} if parameter is None else {"timeout": parameter}
    assert parse_request(request(parameters=parameters, timeout=grpc)).timeout_us == expected


@pytest.mark.parametrize(
    ("stream", "exclude", "prepend"),
    [(False, None, True), (False, True, False), (False, False, True)]
    + [(True, None, False), (True, True, False)],
)
def test_when_the_prompt_is_prepended(stream: bool, exclude: bool | None, prepend: bool) -> None:
    tensors = {} if exclude is None else {"exclude_input_in_output": exclude}
    assert parse_request(request(stream=stream, **tensors)).prepend_prompt is prepend


def test_token_prompts_are_given_back_only_when_asked() -> None:
    assert not parse_request(request(None, input_ids=ids(1, 2))).prepend_prompt
    asked = request(None, input_ids=ids(1, 2), exclude_input_in_output=False)
    assert parse_request(asked).prepend_prompt


def test_outputs_come_by_flag_or_by_name() -> None:
    def outputs(**kwargs) -> set[str]:
        return set(parse_request(request(**kwargs)).outputs)

    assert outputs() == {"text_output"}
    assert outputs(return_finish_reason=True) == {"text_output", "finish_reason"}
    assert outputs(outputs={"text_output", "token_ids"}) == {"text_output", "token_ids"}
    assert outputs(outputs={"text_output", "token_ids"}, return_token_ids=False) == {"text_output"}
    assert outputs(outputs={"token_ids"}, return_finish_reason=True) == {"token_ids"}
    assert outputs(sampling={"prompt_logprobs": 1}) == {"text_output", "prompt_logprobs"}
    assert outputs(outputs={"prompt_logprobs"}) == {"prompt_logprobs"}
    flags = {f"return_{name}": True for name in OUTPUTS if name not in ("text_output",)}
    del flags["return_prompt_logprobs"]
    assert outputs(**flags) == set(OUTPUTS) - {"prompt_logprobs"}


def test_cumulative_logprob_makes_the_engine_compute_logprobs_without_showing_them() -> None:
    parsed = parse_request(request(return_cumulative_logprob=True))
    assert parsed.sampling.logprobs == 0
    assert not parsed.show_logprobs
    parsed = parse_request(request(return_cumulative_logprob=True, sampling={"logprobs": 2}))
    assert parsed.sampling.logprobs == 2
    assert parsed.show_logprobs
