"""Requests and answers, whichever transport carries them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_client.protocol import (
    Chunk,
    GenerateError,
    Output,
    check_timeout,
    detokenize_inputs,
    merge,
    request_inputs,
    to_chunk,
    tokenize_inputs,
)
from gllm_engine import SamplingParams

NAN, INF = float("nan"), float("inf")
DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]


def test_a_prompt_becomes_tensors() -> None:
    inputs = request_inputs("Hi", max_tokens=3, stop=("a", "b"), images=[b"\x00\xff", "QQ=="])
    assert inputs["text_input"] == "Hi"
    assert inputs["stream"] is True
    assert inputs["exclude_input_in_output"] is True
    assert inputs["return_finish_reason"] is True
    assert inputs["image"] == ["AP8=", "QQ=="]
    assert json.loads(str(inputs["sampling_parameters"])) == {"max_tokens": 3, "stop": ["a", "b"]}
    assert "return_logprobs" not in inputs
    assert not any(name.startswith("triton_") for name in inputs)


def test_images_become_texts(tmp_path: Path) -> None:
    """Files as base64; base64 and URLs, which the server reads, as they are."""
    path = tmp_path / "a.png"
    path.write_bytes(b"\x00\xff")
    images = [path, b"\x00\xff", "AP8=", "https://a/b.png", "data:image/png;base64,AP8="]
    inputs = tokenize_inputs("Hi", images=images)
    assert inputs["image"] == ["AP8=", "AP8=", *images[2:]]
    assert "image" not in request_inputs("Hi")


def test_a_prompt_to_tokenize_becomes_tensors() -> None:
    assert tokenize_inputs("Hi", add_special_tokens=False) == {
        "operation": "tokenize",
        "text_input": "Hi",
        "add_special_tokens": False,
    }
    chat = tokenize_inputs(messages=[{"role": "user"}], tools=[], chat_template_kwargs={"a": 1})
    assert chat == {
        "operation": "tokenize",
        "messages": '[{"role": "user"}]',
        "tools": "[]",
        "chat_template_kwargs": '{"a": 1}',
    }
    assert detokenize_inputs((1, 2)) == {"operation": "detokenize", "input_ids": [1, 2]}
    with pytest.raises(ValueError, match="^exactly one of prompt, messages and input_ids"):
        tokenize_inputs()
    with pytest.raises(ValueError, match="^input_ids: whole numbers"):
        detokenize_inputs(["a"])


def test_sampling_may_be_an_object_a_mapping_or_keywords() -> None:
    wanted = {"max_tokens": 4, "logit_bias": {"7": 1.5}}
    for options in (
        {"sampling": SamplingParams(max_tokens=4, logit_bias={7: 1.5})},
        {"sampling": {"max_tokens": 4, "logit_bias": {7: 1.5}}},
        {"max_tokens": 4, "logit_bias": {7: 1.5}},
        {"sampling": {"max_tokens": 4}, "logit_bias": {7: 1.5}},
    ):
        text = request_inputs("x", **options)["sampling_parameters"]
        assert json.loads(str(text)) == wanted


def test_flags_can_be_turned_off_and_logprobs_turn_theirs_on() -> None:
    inputs = request_inputs("x", return_finish_reason=False, return_token_ids=False, logprobs=0)
    assert "return_finish_reason" not in inputs and "return_token_ids" not in inputs
    assert inputs["return_logprobs"] is True
    assert "return_logprobs" not in request_inputs("x", logprobs=0, return_logprobs=False)


def test_a_prompt_prepended_is_asked_for_by_leaving_the_flag_out() -> None:
    inputs = request_inputs("x", stream=False, exclude_input_in_output=False)
    assert "exclude_input_in_output" not in inputs
    # streamed it cannot be; the server says so
    assert request_inputs("x", exclude_input_in_output=False)["exclude_input_in_output"] is False


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "got none"),
        ({"prompt": "a", "input_ids": [1]}, "text_input and input_ids"),
        ({"prompt": "a", "sampling": {"seed": 1}, "seed": 2}, "seed: given both"),
        ({"prompt": "a", "n": 2, "return_num_output_tokens": False}, "n > 1"),
        ({"prompt": "a", "n": "abc", "return_num_output_tokens": False}, "n > 1"),
        ({"prompt": "a", "sampling": 3}, "a mapping is expected"),
        ({"prompt": "a", "return_logprobs": True}, "return_logprobs: logprobs, how many"),
        ({"prompt": 5}, "prompt: text is expected, got int"),
        ({"prompt": b"a"}, "prompt: text is expected, got bytes"),
        ({"messages": 5}, "messages: a list is expected, got int"),
        ({"messages": "hello"}, "messages: a list is expected, got str"),
        ({"messages": [object()]}, "messages: cannot be said in JSON"),
        ({"input_ids": [1, 2.5]}, "input_ids: whole numbers are expected"),
        ({"input_ids": ["a"]}, "input_ids: whole numbers are expected"),
        ({"input_ids": 5}, "input_ids: whole numbers are expected"),
        ({"input_ids": [5, 2**31]}, "input_ids: 2147483648 does not fit INT32"),
        ({"input_ids": [-(10**5000)]}, "input_ids: this int does not fit INT32"),
        ({"prompt": "a", "stop": object()}, "stop: cannot be said in JSON"),
        ({"prompt": "a", "seed": 10**5000}, "sampling_parameters: cannot be said in JSON"),
        ({"prompt": "a", "stop": DEEP}, "stop: nested too deeply"),
        ({"prompt": "a", "sampling": {"stop": DEEP}}, "sampling: nested too deeply"),
        ({"messages": [DEEP]}, "messages: nested too deeply"),
    ],
)
def test_what_cannot_be_sent_is_an_error(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        request_inputs(**options)


@pytest.mark.parametrize("n", [None, 1, "1", 2, "abc", 10**400, [1], float("nan")])
def test_values_are_the_servers_to_judge(n: Any) -> None:
    inputs = request_inputs("a", n=n, temperature=float("nan"), input_ids=None)
    assert json.loads(str(inputs["sampling_parameters"])).keys() == {"n", "temperature"}


def test_a_timeout_is_seconds_that_can_be_waited() -> None:
    wrong = [0, -1, NAN, INF, -INF, 1e400, 1e7, 10**400, 10**5000, True, "3", [3], 2 + 1j]
    for timeout in wrong:
        with pytest.raises(ValueError, match="^timeout: .{1,60} is not a number of seconds above"):
            check_timeout(timeout)
    assert [check_timeout(t) for t in (None, 3, 0.5, 1e6)] == [None, 3.0, 0.5, 1e6]


def test_outputs_of_several_answers_are_told_apart() -> None:
    chunk = to_chunk(
        {
            "text_output": ["a", "", "ccc"],
            "finish_reason": ["None", "stop", "length"],
            "token_ids": [1, 2, 3, 4],
            "num_output_tokens": [1, 0, 3],
            "num_input_tokens": [9],
            "cumulative_logprob": [-1.0, -2.0, -3.0],
            "logprobs": ['[{"1": {"logprob": -1.0}}]', "null", "[]"],
            "prompt_logprobs": ["[null]"],
            "stop_reason": ["None", "##", "7"],
            "num_cached_tokens": [8],
            "request_times": [0.5, 1.5, 2.5],
        },
        "id",
    )
    assert [o.token_ids for o in chunk.outputs] == [(1,), (), (2, 3, 4)]
    assert [o.finish_reason for o in chunk.outputs] == [None, "stop", "length"]
    assert [o.logprobs for o in chunk.outputs] == [[{"1": {"logprob": -1.0}}], None, []]
    assert (chunk.text, chunk.finish_reason, chunk.token_ids) == ("a", None, (1,))
    assert (chunk.num_output_tokens, chunk.num_input_tokens) == (4, 9)
    assert (chunk.prompt_logprobs, chunk.request_id) == ([None], "id")
    assert [o.stop_reason for o in chunk.outputs] == [None, "##", "7"]
    assert (chunk.stop_reason, chunk.num_cached_tokens) == (None, 8)
    assert chunk.request_times == (0.5, 1.5, 2.5)


def test_outputs_that_were_not_asked_for_are_absent() -> None:
    chunk = to_chunk({"text_output": ["a"], "token_ids": [5, 6]})
    assert chunk == Chunk((Output("a", token_ids=(5, 6)),))
    assert chunk.num_input_tokens is None and chunk.cumulative_logprob is None


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.integers(1, 3))
def test_a_merged_stream_is_the_whole_answer(sizes: list[int], n: int) -> None:
    """Tokens 0, 1, ... of each answer, cut into chunks of any size."""
    chunks, start = [], 0
    for i, size in enumerate(sizes):
        ids = tuple(range(start, start + size))
        start += size
        last = i == len(sizes) - 1
        outputs = [
            Output(
                text="".join(f"{k}.{t} " for t in ids),
                finish_reason="length" if last else None,
                token_ids=ids,
                logprobs=[{str(t): {}} for t in ids],
                cumulative_logprob=-float(start),
                num_tokens=size,
                stop_reason="##" if last else None,
            )
            for k in range(n)
        ]
        cached = 3 if i == 0 else None  # told once
        times = (1.0, 2.0, 3.0) if last else None
        chunks.append(Chunk(tuple(outputs), 7, None, "r", cached, times))
    whole = merge(chunks)
    assert len(whole.outputs) == n
    for k, output in enumerate(whole.outputs):
        assert output.text == "".join(f"{k}.{t} " for t in range(start))
        assert output.token_ids == tuple(range(start))
        assert output.logprobs == [{str(t): {}} for t in range(start)]
        assert (output.finish_reason, output.stop_reason) == ("length", "##")
        assert (output.cumulative_logprob, output.num_tokens) == (-float(start), start)
    assert (whole.num_input_tokens, whole.num_cached_tokens, whole.request_id) == (7, 3, "r")
    assert whole.request_times == (1.0, 2.0, 3.0)


def test_no_answer_at_all_is_an_error() -> None:
    with pytest.raises(GenerateError, match="ended before it began"):
        merge([])
