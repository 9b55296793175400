"""Bad requests: each gets one sentence that names the field and its limit, and costs nothing else.

The same over gRPC and over HTTP; a good request right after works; at the end of this module the
same processes are there, and idle.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from asking import GrpcStream, ask, generate, posted, sampled
from live import MODEL, Server, wait_for
from tritonclient.utils import InferenceServerException

from gllm_client import GenerateError
from gllm_engine.sampling import SamplingParams

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

GOOD = {"text_input": "ROMEO:"} | sampled(temperature=0, max_tokens=4, ignore_eos=True)
VOCAB, MODEL_LEN = 2048, 1024  # of the shipped model
POOL = 16_384  # tokens, of `narrow`


@pytest.fixture(scope="module", autouse=True)
def unharmed(server: Server) -> Iterator[None]:
    """Whatever these tests send, no process dies or is added, and nothing stays in use."""
    # The process that compiles grammars comes with the first one.
    ask(server, {"text_input": "a"} | sampled(structured_outputs={"choice": ["a"]}))
    before = server.family()
    yield
    server.wait_idle()
    assert server.family() == before


@pytest.fixture
def good(server: Server) -> Iterator[None]:
    """Right after the test, a good request has its usual answer."""
    (usual,) = ask(server, GOOD)
    yield
    (again,) = ask(server, GOOD)
    assert again.text == usual.text


def refused(server: Server, tensors: dict[str, Any], model: str = MODEL, **options: Any) -> str:
    """The error of a request over gRPC, in the way that carries no status."""
    with GrpcStream(server) as stream, pytest.raises(InferenceServerException) as error:
        stream.send(tensors, model, **options)
        stream.take()
    return error.value.message()


def status_of(server: Server, tensors: dict[str, Any], model: str = MODEL) -> tuple[str, str]:
    """gRPC status and message, with metadata triton_grpc_error (see SyncClient.with_status)."""
    stream = GrpcStream(server, with_status=True)
    try:
        stream.send(tensors, model)
        with pytest.raises(InferenceServerException) as error:
            stream.take()
        return error.value.status().removeprefix("StatusCode."), error.value.message()
    finally:
        stream.close(cancel=True)


def check_sentence(message: str, *parts: str) -> None:
    """One line that holds all parts; nothing of our insides."""
    assert "\n" not in message and len(message) < 700, message
    assert not re.search(r"Traceback|Error\(|internal|\.py", message), message
    for part in parts:
        assert part in message, message


# ---------------------------------------------------------------- what a backend is asked with

# Name -> tensors, and what the sentence holds.
BAD_REQUESTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no prompt": ({"stream": True}, ("text_input: no prompt", "input_ids", "messages")),
    "two prompts": ({"text_input": "a", "input_ids": [5]}, ("input_ids: ", "exactly one prompt")),
    "empty text": ({"text_input": ""}, ("text_input: ", "empty", "at least one character")),
    "messages are no JSON": ({"messages": "hello"}, ("messages: not valid JSON",)),
    "messages are no list": ({"messages": "{}"}, ("messages: ", "list of {role, content}")),
    "messages are empty": ({"messages": "[]"}, ("messages: ", "non-empty list")),
    "no role": ({"messages": '[{"content": "a"}]'}, ("messages: ", "role")),
    "no content": ({"messages": '[{"role": "user"}]'}, ("messages: ", "content")),
    "tools for a template without": (
        {"messages": '[{"role": "user", "content": "a"}]', "tools": '[{"type": "function"}]'},
        ("tools: this model's chat template takes no tools",),
    ),
    "a variable that the template lacks": (
        {
            "messages": '[{"role": "user", "content": "a"}]',
            "chat_template_kwargs": '{"enable_thinking": false}',
        },
        ("chat_template_kwargs: 'enable_thinking' means nothing", "add_generation_prompt"),
    ),
    "an image": ({"text_input": "a", "image": "aGk="}, ("image: this model takes no images",)),
    "malformed JSON": (
        {"text_input": "a", "sampling_parameters": "{temperature: 1}"},
        ("sampling_parameters: not valid JSON", "line 1"),
    ),
    "a JSON list": (
        {"text_input": "a", "sampling_parameters": "[1]"},
        ("sampling_parameters: a JSON object is expected",),
    ),
    "a key twice": (
        {"text_input": "a", "sampling_parameters": '{"seed": 1, "seed": 2}'},
        ("sampling_parameters: key 'seed' is given twice",),
    ),
    "unknown key": (
        {"text_input": "a"} | sampled(tempreature=1),
        ("tempreature: unknown sampling parameter", "temperature"),
    ),
    "token too large": (
        {"input_ids": [5, VOCAB]},
        ("input_ids: token 2048 is outside the vocabulary [0, 2048)",),
    ),
    "token negative": (
        {"input_ids": [5, -1]},
        ("input_ids: token -1 is outside the vocabulary [0, 2048)",),
    ),
    "text longer than the model": (
        {"text_input": "word " * MODEL_LEN},
        ("prompt: ", "limited to 1024 tokens"),
    ),
    "ids longer than the model": (
        {"input_ids": [5] * MODEL_LEN},
        ("prompt: its 1024 tokens", "limited to 1024 tokens"),
    ),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request(server: Server, good: None, name: str) -> None:
    tensors, parts = BAD_REQUESTS[name]
    message = refused(server, tensors)
    check_sentence(message, *parts)
    assert generate(server, tensors) == (400, {"error": message})


INF, NAN = float("inf"), float("nan")
# Field, value, what the sentence says of the limit.
OUT_OF_RANGE: list[tuple[str, Any, str]] = [
    ("max_tokens", 0, "[1, 2**62]"),
    ("max_tokens", -1, "[1, 2**62]"),
    ("max_tokens", 1.5, "Expected "),
    ("max_tokens", "many", "int"),
    ("max_tokens", True, "expected a number"),
    ("max_tokens", INF, "int"),
    ("min_tokens", -1, "[0, 2**62]"),
    ("min_tokens", 17, "greater than max_tokens=16"),
    ("temperature", -0.1, "[0.0, 100.0]"),
    ("temperature", 100.1, "[0.0, 100.0]"),
    ("temperature", NAN, "[0.0, 100.0]"),
    ("temperature", INF, "[0.0, 100.0]"),
    ("temperature", -INF, "[0.0, 100.0]"),
    ("temperature", [1], "Expected "),
    ("temperature", "NaN", "[0.0, 100.0]"),
    ("top_p", 0, "greater than 0"),
    ("top_p", 1.01, "[0.0, 1.0]"),
    ("top_p", NAN, "[0.0, 1.0]"),
    ("top_k", -2, "[-1, 2**62]"),
    ("top_k", NAN, "int"),
    ("min_p", -0.01, "[0.0, 1.0]"),
    ("min_p", 1.01, "[0.0, 1.0]"),
    ("min_p", NAN, "[0.0, 1.0]"),
    ("seed", 2**63, "9223372036854775807]"),
    ("seed", 0.5, "Expected "),
    ("presence_penalty", 2.01, "[-2.0, 2.0]"),
    ("presence_penalty", NAN, "[-2.0, 2.0]"),
    ("frequency_penalty", -2.01, "[-2.0, 2.0]"),
    ("frequency_penalty", INF, "[-2.0, 2.0]"),
    ("repetition_penalty", 0, "greater than 0"),
    ("repetition_penalty", -1, "[0.0, 100.0]"),
    ("repetition_penalty", NAN, "[0.0, 100.0]"),
    ("logprobs", 21, "[0, 20]"),
    ("logprobs", -1, "[0, 20]"),
    ("prompt_logprobs", 21, "[0, 20]"),
    ("n", 0, "[1, 64]"),
    ("n", 65, "[1, 64]"),
    ("n", 10**30, "[1, 64]"),
    ("priority", 2**31, "[-2147483648, 2147483647]"),
    ("stop", 5, "Expected "),
    ("stop", [""], "an empty string"),
    ("stop", ["a"] * 65, "at most 64"),
    ("bad_words", ["a"] * 65, "at most 64"),
    ("bad_words", [""], "an empty string"),
    ("allowed_token_ids", [VOCAB], "outside the vocabulary [0, 2048)"),
    ("allowed_token_ids", [5] * 16_385, "at most 16384"),
    ("truncate_prompt_tokens", -2, "[-1, 2**62]"),
    ("tenant", "a" * 129, "at most 128"),
    ("stop_token_ids", [VOCAB], "outside the vocabulary [0, 2048)"),
    ("stop_token_ids", [-1], "outside the vocabulary [0, 2048)"),
    ("stop_token_ids", [2**70], "vocabulary"),
    ("stop_token_ids", [5] * 1025, "at most 1024"),
    ("logit_bias", {"5": 100.5}, "[-100, 100]"),
    ("logit_bias", {"5": NAN}, "[-100, 100]"),
    ("logit_bias", {str(VOCAB): 1}, "outside the vocabulary [0, 2048)"),
    ("logit_bias", {str(i): 1 for i in range(1025)}, "at most 1024"),
    ("logit_bias", {"five": 1}, "int"),
    ("include_stop_str_in_output", "perhaps", "bool"),
    ("ignore_eos", 2, "bool"),
    ("cache_salt", 7, "str"),
    ("structured_outputs", {}, "exactly one of json, regex, choice, grammar"),
    ("structured_outputs", {"regex": "a", "choice": ["a"]}, "exactly one"),
    ("structured_outputs", {"choice": []}, "choice is empty"),
    ("structured_outputs", {"choice": [str(i) for i in range(1025)]}, "at most 1024"),
    ("structured_outputs", {"regex": "("}, "not usable"),
    ("structured_outputs", {"json": "{"}, "json is not JSON"),
    ("structured_outputs", {"json": {"type": "strin"}}, "strin"),
    ("structured_outputs", {"grammar": "start: a"}, "not usable"),
    ("structured_outputs", "yes", "JSON"),
]


def test_every_sampling_field_with_a_range_is_here() -> None:
    # Refused as the other booleans are.
    boolean_or_text = {"skip_special_tokens", "spaces_between_special_tokens"}
    tested = {field for field, *_ in OUT_OF_RANGE} | boolean_or_text
    assert tested == set(SamplingParams.__struct_fields__)


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    OUT_OF_RANGE,
    ids=[f"{field}={json.dumps(value)[:24]}" for field, value, _ in OUT_OF_RANGE],
)
def test_a_value_out_of_range(
    server: Server, good: None, field: str, value: Any, limit: str
) -> None:
    tensors = {"text_input": "ROMEO:"} | sampled(**{field: value})
    message = refused(server, tensors)
    check_sentence(message, f"{field}: ", limit)
    assert generate(server, tensors) == (400, {"error": message})
    streamed = tensors | {"stream": True}
    assert refused(server, streamed) == message
    with posted(server, streamed, "generate_stream") as answer:
        assert answer.status == 400
        assert json.loads(answer.read().removeprefix(b"data: ")) == {"error": message}


def test_request_parameters_are_checked_as_the_tensor_is(server: Server, good: None) -> None:
    for parameters, parts in (
        ({"temperature": "-1"}, ("temperature: ", "[0.0, 100.0]")),
        ({"temperature": "nan"}, ("temperature: ", "[0.0, 100.0]")),
        ({"max_tokens": 0}, ("max_tokens: ", "[1, 2**62]")),
        ({"wide": True}, ("wide: unknown sampling parameter",)),
        ({"stop_token_ids": "[1"}, ("stop_token_ids: not valid JSON",)),
    ):
        message = refused(server, {"text_input": "a"}, parameters=parameters)
        check_sentence(message, *parts)
        assert generate(server, {"text_input": "a"} | parameters) == (400, {"error": message})
    for timeout in (-1, "soon", True, 1.5, 2**63, "9" * 400, 1e300):
        status, answer = generate(server, {"text_input": "a", "timeout": timeout})
        assert status == 400
        check_sentence(answer["error"], "timeout: ", "whole number of microseconds")


def test_json_may_hold_a_bare_nan(server: Server, good: None) -> None:
    status, answer = generate(server, '{"text_input": "a", "temperature": NaN}')
    assert (status, answer) == (400, {"error": "temperature: nan is outside [0.0, 100.0]"})


def test_bytes_that_are_no_text(server: Server, good: None) -> None:
    for name in ("text_input", "messages", "sampling_parameters"):
        tensors = {"text_input": "a"} if name == "sampling_parameters" else {}
        message = refused(server, tensors | {name: b"ab\xff\xfe"})
        check_sentence(message, f"{name}: not valid UTF-8", "0xff", "offset 2")
    with posted(server, b'{"text_input": "ab\xff"}') as answer:
        assert answer.status == 400
        check_sentence(json.loads(answer.read())["error"], "text_input: not valid UTF-8")


def test_an_empty_list_of_token_ids(server: Server, good: None) -> None:
    message = refused(server, {"input_ids": np.array([], np.int32)})
    check_sentence(message, "input_ids: ", "empty", "at least one token")


def test_wrong_types_and_shapes(server: Server, good: None) -> None:
    """Those that Triton itself refuses, from what the model declares, are named by it."""
    text = np.array(["a", "b"], np.object_)
    for tensors, parts in (
        ({"text_input": np.array([1], np.int32)}, ("'text_input'", "'INT32'", "'BYTES'")),
        ({"text_input": "a", "stream": np.array([1], np.int32)}, ("'stream'", "'BOOL'")),
        ({"input_ids": np.array([5], np.int64)}, ("'input_ids'", "'INT64'", "'INT32'")),
        ({"text_input": text}, ("'text_input'", "[1]", "[2]")),
        ({"text_input": text[:1].reshape(1, 1)}, ("'text_input'", "[1]", "[1,1]")),
        ({"text_input": "a", "stream": np.array([True, False])}, ("'stream'", "[1]", "[2]")),
        ({"text_input": "a", "prompt": "b"}, ("unexpected", "'prompt'")),
    ):
        check_sentence(refused(server, tensors).strip(), *parts)


def test_http_bodies_that_triton_cannot_read(server: Server, good: None) -> None:
    """Triton's own sentences and codes; that it answers and lives is what counts."""
    for body in (
        "{nope",
        "[1]",
        '{"text_input": 5}',
        '{"text_input": ["a", "b"]}',
        '{"text_input": "a", "stop": ["b"]}',
        r'{"text_input": "\ud800"}',
        "",
    ):
        with posted(server, body) as answer:
            assert answer.status in (400, 500), body
            assert json.loads(answer.read()).keys() == {"error"}, body


def test_a_megabyte_of_text(server: Server, good: None) -> None:
    began = time.monotonic()
    tensors = {"text_input": "word " * 210_000}
    message = refused(server, tensors)
    check_sentence(message, "prompt: its", "1024 tokens")
    assert generate(server, tensors) == (400, {"error": message})
    assert time.monotonic() - began < 60


def test_unknown_model(server: Server, good: None) -> None:
    with server.client("hamlet", with_status=False) as client:
        with pytest.raises(GenerateError, match="hamlet"):
            client.complete("a")
    with posted(server, {"text_input": "a"}, model="hamlet") as answer:
        assert answer.status in (400, 404) and b"hamlet" in answer.read()


# ---------------------------------------------------------------- the status, and what is counted


def test_statuses_over_grpc(server: Server, good: None) -> None:
    """Few, and one after another: tritonserver 2.51 can crash when such errors coincide."""
    for tensors, parts in (
        BAD_REQUESTS["no prompt"],
        BAD_REQUESTS["token negative"],
        BAD_REQUESTS["ids longer than the model"],
        ({"text_input": "a"} | sampled(n=0), ("n: 0 is outside [1, 64]",)),
        ({"text_input": "a"} | sampled(structured_outputs={"regex": "("}), ("not usable",)),
    ):
        status, message = status_of(server, tensors)
        assert status == "INVALID_ARGUMENT"
        check_sentence(message, *parts)
    with server.client(with_status=True) as client:
        with pytest.raises(GenerateError, match=r"n: 0 is outside \[1, 64\]") as error:
            client.complete("a", n=0)
    assert error.value.status == "INVALID_ARGUMENT"


def test_errors_are_counted(server: Server) -> None:
    server.settle()
    before = server.metric("request_errors_total", status="invalid")
    prompts = server.metric("prompt_tokens_total")
    for _ in range(3):
        refused(server, {"text_input": "a"} | sampled(n=0))
    wait_for(
        lambda: server.metric("request_errors_total", status="invalid") == before + 3, "3 errors"
    )
    assert server.metric("prompt_tokens_total") == prompts


def test_a_prompt_that_does_not_fit_the_kv_pool(narrow: Server) -> None:
    tensors = {"input_ids": [5] * POOL} | sampled(max_tokens=2)
    message = refused(narrow, tensors, "narrow")
    check_sentence(message, f"prompt: its {POOL} tokens", f"holds {POOL} tokens")
    assert generate(narrow, tensors, "narrow") == (400, {"error": message})
    assert status_of(narrow, tensors, "narrow") == ("INVALID_ARGUMENT", message)
    narrow.wait_idle("narrow")


def test_more_answers_than_the_queue_takes(narrow: Server) -> None:
    """n sequences come or go together: those already queued are taken back."""
    tensors = {"text_input": "abc"} | sampled(n=64, max_tokens=50)
    check_sentence(refused(narrow, tensors, "narrow"), "queue is full", "2 requests are waiting")
    narrow.wait_idle("narrow")


def test_a_full_queue(narrow: Server) -> None:
    """One runs, two wait, the next is refused as UNAVAILABLE; then all others are served."""
    short = {"text_input": "abc", "return_num_output_tokens": True}
    short |= sampled(max_tokens=5, ignore_eos=True)
    with narrow.client("narrow") as client, GrpcStream(narrow) as stream:
        running = client.generate("abc", max_tokens=16_000, ignore_eos=True)
        next(running)
        for _ in range(2):
            stream.send(short, "narrow")
        wait_for(lambda: narrow.metric("num_requests_waiting", "narrow") == 2, "two wait")
        status, message = status_of(narrow, short, "narrow")
        assert status == "UNAVAILABLE"
        check_sentence(message, "queue is full", "2 requests are waiting")
        assert generate(narrow, short, "narrow") == (400, {"error": message})
        next(running)
        running.close()
        answers = [stream.take() for _ in range(2)]
    assert [answer.outputs["num_output_tokens"] for answer in answers] == [[5], [5]]
    narrow.wait_idle("narrow")
    (after,) = ask(narrow, short, "narrow")
    assert after.outputs["num_output_tokens"] == [5]
