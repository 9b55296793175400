"""Requests through the whole front end, the test playing Triton and the engine."""

from __future__ import annotations

import gc
import json
import threading
import time
import weakref
from unittest import mock

import fake_triton
import numpy as np
import pytest
from fake_triton import TritonError
from front import front_end, request, text

from gllm_backend.gllm.model import TritonPythonModel
from gllm_backend.gllm.request import INPUTS, OUTPUTS
from gllm_engine import (
    ConfigError,
    Finish,
    Outputs,
    Stats,
    TenantStats,
    TokenLogprobs,
    __version__,
)

STOP, LENGTH = Finish("stop"), Finish("length")


@pytest.fixture
def front(tmp_path, server):
    with front_end(tmp_path) as pair:
        yield pair


def decode(array: np.ndarray) -> list[str]:
    return [value.decode() for value in array]


def wait_for(condition, seconds: float = 5.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.005)


# ---------------------------------------------------------------- answers


def test_whole_answer_is_one_response_with_final_and_the_prompt(front) -> None:
    model, client = front
    given = request("Hi", return_finish_reason=True, return_num_output_tokens=True)
    model.execute([given])
    client.say(client.submitted[0].id, "there", LENGTH)
    record = given.record.wait()
    record.check()
    (response,) = record.data
    assert decode(response.tensors["text_output"]) == ["Hithere"]
    assert decode(response.tensors["finish_reason"]) == ["length"]
    assert response.tensors["num_output_tokens"].tolist() == [5]
    assert set(response.tensors) == {"text_output", "finish_reason", "num_output_tokens"}
    assert client.submitted[0].prompt == [72, 105]


def test_stream_gives_deltas_and_final_rides_on_the_last(front) -> None:
    model, client = front
    flags = {f"return_{name}": True for name in ("finish_reason", "num_output_tokens", "token_ids")}
    given = request(stream=True, return_num_input_tokens=True, **flags)
    model.execute([given])
    client.say(client.submitted[0].id, "añb日", STOP)
    record = given.record.wait()
    record.check()
    assert record.text() == "añb日"
    reasons = [decode(r.tensors["finish_reason"])[0] for r in record.data]
    assert reasons[:-1] == ["None"] * (len(reasons) - 1)
    assert reasons[-1] == "stop"
    tokens = [t for r in record.data for t in r.tensors["token_ids"].tolist()]
    assert bytes(tokens).decode() == "añb日"
    assert sum(r.tensors["num_output_tokens"][0] for r in record.data) == len(tokens)
    assert all(r.tensors["num_input_tokens"].tolist() == [2] for r in record.data)
    kinds = {name: array.dtype for name, array in record.data[0].tensors.items()}
    assert kinds["token_ids"] == np.int32
    assert kinds["num_input_tokens"] == kinds["num_output_tokens"] == np.uint32


def test_logprobs_are_those_of_the_new_tokens(front) -> None:
    model, client = front
    flags = {"return_logprobs": True, "return_cumulative_logprob": True}
    sampling = {"logprobs": 1, "prompt_logprobs": 0, "n": 2}
    given = request(sampling=sampling, **flags)
    model.execute([given])
    one, two = client.submitted
    assert (one.sampling.prompt_logprobs, two.sampling.prompt_logprobs) == (0, None)

    def entry(token: int, logprob: float) -> TokenLogprobs:
        return TokenLogprobs([token, 66], [logprob, float("-inf")], [1, 2])

    client.on_outputs(
        Outputs(
            [one.id, two.id],
            [97, 98],
            logprobs={one.id: entry(97, -0.5), two.id: entry(98, -1.0)},
            prompt_logprobs={one.id: [TokenLogprobs([105], [-2.0], [3])]},
        )
    )
    client.on_outputs(
        Outputs(
            [one.id, two.id],
            [99, 100],
            logprobs={one.id: entry(99, -0.25), two.id: entry(100, -4.0)},
            finished={one.id: LENGTH, two.id: STOP},
        )
    )
    tensors = given.record.wait().data[0].tensors
    assert decode(tensors["text_output"]) == ["Hiac", "Hibd"]
    assert tensors["cumulative_logprob"].tolist() == [-0.75, -5.0]
    first = json.loads(tensors["logprobs"][0])
    assert first[0] == {
        "97": {"logprob": -0.5, "rank": 1, "decoded_token": "a"},
        "66": {"logprob": -9999.0, "rank": 2, "decoded_token": "B"},
    }
    assert [list(e)[0] for e in first] == ["97", "99"]
    prompt = json.loads(tensors["prompt_logprobs"][0])
    assert prompt == [None, {"105": {"logprob": -2.0, "rank": 3, "decoded_token": "i"}}]


def test_logprobs_not_computed_are_null(front) -> None:
    model, client = front
    given = request(return_logprobs=True, return_cumulative_logprob=True)
    model.execute([given])
    sequence = client.submitted[0]
    logprobs = {sequence.id: TokenLogprobs([97], [-0.5], [1])}
    finished = {sequence.id: STOP}
    client.on_outputs(Outputs([sequence.id], [97], logprobs=logprobs, finished=finished))
    tensors = given.record.wait().data[0].tensors
    assert decode(tensors["logprobs"]) == ["null"]
    assert tensors["cumulative_logprob"].tolist() == [-0.5]


def test_prompt_logprobs_wait_for_the_sequence_that_has_them(front) -> None:
    model, client = front
    given = request(stream=True, sampling={"n": 2, "prompt_logprobs": 0})
    model.execute([given])
    one, two = (r.id for r in client.submitted)
    client.say(two, "x")
    wait_for(lambda: len(given.record.data) == 1)
    entries = {one: [TokenLogprobs([105], [-2.0], [3])]}
    client.on_outputs(Outputs([one], [97], prompt_logprobs=entries))
    client.say([one, two], "y", STOP)
    found = [r.tensors.get("prompt_logprobs") for r in given.record.wait().data]
    assert found[0] is None and sum(each is not None for each in found) == 1
    assert json.loads(next(each for each in found if each is not None)[0])[1].keys() == {"105"}


def test_a_named_output_that_was_not_computed_is_null(front) -> None:
    model, client = front
    given = request(outputs={"text_output", "logprobs", "prompt_logprobs"})
    model.execute([given])
    client.say(client.submitted[0].id, "x", STOP)
    tensors = given.record.wait().data[0].tensors
    assert decode(tensors["logprobs"]) == decode(tensors["prompt_logprobs"]) == ["null"]


def test_cached_tokens_are_told_once_and_the_stop_reason_from_the_first_end_on(front) -> None:
    """The cached tokens are those of the first sequence."""
    model, client = front
    flags = {"return_num_cached_tokens": True, "return_stop_reason": True}
    given = request("Hi", stream=True, sampling={"n": 2, "stop": ["!"]}, **flags)
    model.execute([given])
    first, second = (sequence.id for sequence in client.submitted)
    steps = [
        lambda: client.on_outputs(Outputs([second], [97], num_cached_tokens={second: 1})),
        lambda: client.on_outputs(Outputs([first], [97], num_cached_tokens={first: 2})),
        lambda: client.say(first, "!"),
        lambda: client.say(second, "b", Finish("length")),
    ]
    for number, step in enumerate(steps, 1):
        step()
        wait_for(lambda number=number: len(given.record.sent) == number)
    tensors = [response.tensors for response in given.record.wait().data]
    cached = [
        t["num_cached_tokens"].tolist() if "num_cached_tokens" in t else None for t in tensors
    ]
    assert cached == [None, [2], None, None]
    reasons = [decode(t["stop_reason"]) if "stop_reason" in t else None for t in tensors]
    assert reasons == [None, None, ["!", "None"], ["!", "None"]]


def test_the_times_of_a_request_are_those_of_the_engine(front) -> None:
    """Told so far with the first token, and with the last response; the queue ends with the first
    sequence that leaves it.
    """
    model, client = front
    given = request("Hi", stream=True, sampling={"n": 2}, return_request_times=True)
    moments = [time.monotonic()]

    def then(step) -> None:
        step()
        moments.append(time.monotonic())

    then(lambda: model.execute([given]))
    first, second = (sequence.id for sequence in client.submitted)
    admitted = time.monotonic()
    then(lambda: client.on_outputs(Outputs([second], [97], admitted_at={second: admitted})))
    later = {first: time.monotonic() + 50}
    then(lambda: client.on_outputs(Outputs([first], [97], admitted_at=later)))
    wait_for(lambda: any("request_times" in sent.tensors for sent in given.record.data))
    client.on_outputs(Outputs([], [], finished={first: LENGTH}))
    client.on_outputs(Outputs([], [], finished={second: STOP}))
    *others, last = given.record.wait().data
    (early,) = (response for response in others if "request_times" in response.tensors)
    so_far = early.tensors["request_times"].tolist()
    assert so_far[:2] == last.tensors["request_times"].tolist()[:2]
    before, started, began, ended = moments
    # Seconds: at least the time between two moments, at most that between those around them.
    limits = [(admitted - started, admitted - before), (0, began - admitted), (0, ended - started)]
    for seconds, (least, most) in zip(last.tensors["request_times"].tolist(), limits, strict=True):
        assert least - 1e-6 <= seconds <= most + 1e-6


def test_an_answer_in_one_response_has_them_all(front) -> None:
    model, client = front
    named = {"stop_reason", "num_cached_tokens"}
    given = request("Hi", sampling={"stop_token_ids": [98]}, outputs=named)
    model.execute([given])
    (sequence,) = client.submitted
    client.say(sequence.id, "ab", Finish("stop", stop_token=98))
    (response,) = given.record.wait().data
    assert response.tensors.keys() == named
    assert decode(response.tensors["stop_reason"]) == ["98"]
    assert response.tensors["num_cached_tokens"].tolist() == [0]


def test_n_sequences_end_one_by_one(front) -> None:
    model, client = front
    flags = {f"return_{name}": True for name in ("finish_reason", "num_output_tokens", "token_ids")}
    given = request(stream=True, sampling={"n": 3, "seed": 11}, **flags)
    model.execute([given])
    a, b, c = (r.id for r in client.submitted)
    seeds = [r.seed for r in client.submitted]
    assert (seeds[0], len({*seeds})) == (11, 3)
    again = request(sampling={"n": 3, "seed": 11})
    model.execute([again])
    assert [r.seed for r in client.submitted[3:]] == seeds
    client.say([a, b, c], "x")
    client.say(b, "y", STOP)
    client.say([c, a], "z", LENGTH)
    record = given.record.wait()
    record.check()
    texts = zip(*(decode(r.tensors["text_output"]) for r in record.data), strict=True)
    assert ["".join(parts) for parts in texts] == ["xz", "xy", "xz"]
    assert decode(record.data[-1].tensors["finish_reason"]) == ["length", "stop", "length"]
    for response in record.data:
        counts = response.tensors["num_output_tokens"]
        assert counts.shape == (3,)
        assert counts.sum() == response.tensors["token_ids"].size


@pytest.mark.parametrize("stream", [True, False])
def test_stop_string_ends_the_text_and_the_sequence(front, stream: bool) -> None:
    model, client = front
    sampling = {"stop": "END", "max_tokens": 50}
    given = request("", stream=stream, sampling=sampling)
    given = request(stream=stream, sampling=sampling, exclude_input_in_output=True)
    model.execute([given])
    sequence = client.submitted[0].id
    client.say(sequence, "abcENDmore")
    record = given.record.wait()
    wait_for(lambda: client.aborted == [sequence])
    client.say(sequence, "late", LENGTH)
    record.check()
    assert record.text() == "abc"


def test_nothing_follows_a_stop_string_when_each_token_is_sent_alone(tmp_path, server) -> None:
    with front_end(tmp_path, {"coalesce": "false"}) as (model, client):
        given = request(stream=True, sampling={"stop": "b", "max_tokens": 50})
        go_on = threading.Event()
        given.record.before_send = lambda number: go_on.wait(5)
        model.execute([given])
        client.say(client.submitted[0].id, "aaabccc")
        go_on.set()
        record = given.record.wait()
        wait_for(lambda: not model.live)
        record.check()
        assert record.text() == "aaa"
        assert "error" not in [level for level, _ in server.log]


def test_requests_are_spread_over_senders(front) -> None:
    model, client = front
    both = [request(stream=True), request(stream=True)]
    model.execute(both)
    client.say([r.id for r in client.submitted], "abc", STOP)
    threads = [given.record.wait().threads for given in both]
    assert len(threads[0] | threads[1]) == 2


def test_messages_go_through_the_chat_template(front) -> None:
    model, client = front
    messages = [{"role": "user", "content": "é"}]
    given = request(None, messages=text(json.dumps(messages)))
    model.execute([given])
    wait_for(lambda: client.submitted)
    assert bytes(client.submitted[0].prompt).decode() == "<user>é"
    client.say(client.submitted[0].id, "ok", STOP)
    assert given.record.wait().text() == "ok"


def test_tools_and_template_variables_go_with_messages(front) -> None:
    model, client = front
    messages = text(json.dumps([{"role": "user", "content": "a"}]))
    tools, variables = [{"type": "function"}], {"enable_thinking": False}
    given = request(
        None,
        messages=messages,
        tools=text(json.dumps(tools)),
        chat_template_kwargs=text(json.dumps(variables)),
    )
    model.execute([given])
    wait_for(lambda: client.submitted)
    said = '<user>a[{"type": "function"}]{"enable_thinking": false}'
    assert bytes(client.submitted[0].prompt).decode() == said


def test_a_slow_chat_template_holds_up_conversations_only(front) -> None:
    model, client = front
    model.tokenizer.held.clear()
    chats = [text(json.dumps([{"role": "user", "content": c}])) for c in "abc"]
    slow, cancelled, later = (request(None, messages=chat) for chat in chats)
    model.execute([slow, cancelled, later])
    assert model.tokenizer.holding.wait(5)
    plain = request("plain")
    model.execute([plain])
    assert [bytes(r.prompt) for r in client.submitted] == [b"plain"]
    client.say(client.submitted[0].id, "ok", STOP)
    assert plain.record.wait().error is None
    cancelled.record.cancelled = True
    assert cancelled.record.wait().error.code() == TritonError.CANCELLED
    model.tokenizer.held.set()
    wait_for(lambda: len(client.submitted) == 3)
    assert [bytes(r.prompt) for r in client.submitted[1:]] == [b"<user>a", b"<user>c"]


def test_unloading_ends_conversations_that_wait(front) -> None:
    model, client = front
    model.tokenizer.held.clear()
    chat = text(json.dumps([{"role": "user", "content": "a"}]))
    slow, waiting = request(None, messages=chat), request(None, messages=chat)
    model.execute([slow, waiting])
    assert model.tokenizer.holding.wait(5)
    threading.Timer(0.2, model.tokenizer.held.set).start()
    model.finalize()
    for given in (slow, waiting):
        assert given.record.wait().error.message() == "the model is being unloaded"
    assert client.closed


def test_token_ids_in_and_bad_words(front) -> None:
    model, client = front
    ids = np.array([72, 299], np.int32)
    given = request(None, input_ids=ids, sampling={"bad_words": ["no"]})
    model.execute([given])
    assert client.submitted[0].prompt == [72, 299]
    assert client.submitted[0].bad_words == ((110, 111),)


@pytest.mark.parametrize(
    ("given", "most", "kept"),
    [
        ({"prompt": "abc"}, 2, b"bc"),
        ({"prompt": "abc"}, 9, b"abc"),
        ({"prompt": "abc"}, 2**62, b"abc"),
        ({"prompt": "ab" * 1000}, -1, b"ab" * 492),  # max_tokens 16 of 1,000
        ({"prompt": None, "input_ids": np.array([97, 98], np.int32)}, 1, b"b"),
    ],
)
def test_the_end_of_a_prompt_is_kept(front, given, most: int, kept: bytes) -> None:
    model, client = front
    asked = request(
        **given, sampling={"truncate_prompt_tokens": most}, return_num_input_tokens=True
    )
    model.execute([asked])
    (sequence,) = client.submitted
    assert bytes(sequence.prompt) == kept
    client.say(sequence.id, "x", STOP)
    (response,) = asked.record.wait().data
    assert response.tensors["num_input_tokens"].tolist() == [len(kept)]


# ---------------------------------------------------------------- other operations


def operation(front, name: str, prompt: str | None = None, **tensors) -> dict[str, np.ndarray]:
    """The output tensors of the one response to an operation that the engine is not asked for."""
    model, client = front
    given = request(prompt, operation=text(name), **tensors)
    model.execute([given])
    record = given.record.wait()
    record.check()
    assert record.error is None, record.error.message()
    (response,) = record.data
    assert not client.submitted and not model.live
    return response.tensors


MESSAGES = text(json.dumps([{"role": "user", "content": "é"}]))


@pytest.mark.parametrize(
    ("given", "says", "ids"),
    [
        ({"prompt": "Hi"}, "Hi", [257, 72, 105]),
        ({"prompt": "Hi", "add_special_tokens": False}, "Hi", [72, 105]),
        ({"messages": MESSAGES}, "<user>é", list("<user>é".encode())),
        ({"messages": MESSAGES, "add_special_tokens": True}, "<user>é", [257, *"<user>é".encode()]),
        ({"input_ids": np.array([257, 72], np.int32)}, "<s>H", [257, 72]),
    ],
)
def test_a_prompt_is_tokenized_as_it_is_for_an_answer(front, given, says, ids) -> None:
    model, client = front
    model.tokenizer.adds_bos = True
    found = operation(front, "tokenize", **given)
    assert decode(found["text_output"]) == [says]
    assert found["token_ids"].tolist() == ids and found["token_ids"].dtype == np.int32
    assert found["num_input_tokens"].tolist() == [len(ids)]
    assert len(found) == 3
    asked = request(**({"prompt": None} | given))
    model.execute([asked])
    wait_for(lambda: client.submitted)
    assert client.submitted[0].prompt == ids


def test_a_prompt_that_is_too_long_can_be_counted(front) -> None:
    assert operation(front, "tokenize", "a" * 5000)["num_input_tokens"].tolist() == [5000]
    many = np.zeros(5000, np.int32)
    assert len(operation(front, "tokenize", input_ids=many)["token_ids"]) == 5000
    assert decode(operation(front, "detokenize", input_ids=many)["text_output"]) == ["\0" * 5000]


def test_named_outputs_of_an_operation(front) -> None:
    found = operation(front, "tokenize", "Hi", outputs={"token_ids", "finish_reason"})
    assert found.keys() == {"token_ids"}


def test_detokenize_shows_special_tokens(front) -> None:
    ids = np.array([257, *"né".encode()], np.int32)
    found = operation(front, "detokenize", input_ids=ids)
    assert found.keys() == {"text_output"} and decode(found["text_output"]) == ["<s>né"]
    nothing = operation(front, "detokenize", input_ids=np.array([], np.int32))
    assert decode(nothing["text_output"]) == [""]


def test_describe_tells_the_facts(front) -> None:
    (facts,) = decode(operation(front, "describe")["text_output"])
    assert json.loads(facts) == {
        "model": "m",
        "architectures": ["Bytes"],
        "input_modalities": ["text"],
        "max_model_len": 1000,
        "vocab_size": 300,
        "eos_token_ids": [256],
        "chat_template": None,
        "special_tokens": ["<s>"],
        "generation_config": {"temperature": 0.5},
        "software": f"gllm {__version__}",
    }


def test_operations_are_neither_counted_nor_logged(tmp_path, server) -> None:
    with front_end(tmp_path) as front:
        operation(front, "tokenize", "Hi")
    assert not server.observed and not [v for v in server.metrics.values() if v]
    assert not [line for _, line in server.log if "request" in line]


def test_a_conversation_to_tokenize_waits_its_turn(front) -> None:
    model, client = front
    model.tokenizer.held.clear()
    slow, cancelled = (
        request(None, operation=text("tokenize"), messages=MESSAGES) for _ in range(2)
    )
    model.execute([slow, cancelled])
    assert model.tokenizer.holding.wait(5)
    cancelled.record.cancelled = True
    assert cancelled.record.wait().error.code() == TritonError.CANCELLED
    model.tokenizer.held.set()
    assert slow.record.wait().error is None


# ---------------------------------------------------------------- refusals


LONG = [{"role": "user", "content": "a" * 1000}]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (request(sampling={"temperature": -1}), "temperature: -1"),
        (request(None, messages=text("{}")), "messages: "),
        (request("a" * 1000), "prompt: its 1000 tokens leave no room for output"),
        (request(None, input_ids=np.zeros(1000, np.int32)), "limited to 1000 tokens"),
        (request(None, messages=text(json.dumps(LONG))), "prompt: its 1006 tokens leave no room"),
        (request(sampling={"stop_token_ids": [2**70]}), "stop_token_ids: token"),
        (request(sampling={"stop_token_ids": [10**400]}), "... is outside the vocabulary [0, 300)"),
        (
            request(sampling={"logit_bias": {"9" * 400: 1}}),
            "... is outside the vocabulary [0, 300)",
        ),
        (request(sampling={"logit_bias": {"300": 1}}), "logit_bias: token 300"),
        (request(sampling={"allowed_token_ids": [1, 300]}), "allowed_token_ids: token 300"),
        (
            request("a" * 2000, sampling={"truncate_prompt_tokens": 1000}),
            "prompt: its 1000 tokens leave no room",
        ),
        (
            request(None, operation=text("detokenize"), input_ids=np.array([300], np.int32)),
            "input_ids: token 300",
        ),
        (
            request(None, operation=text("tokenize"), input_ids=np.zeros(2**20 + 1, np.int32)),
            "input_ids: 1048577 token ids given, at most 1048576",
        ),
    ],
)
def test_invalid_requests_get_one_error_with_final(front, given, words: str) -> None:
    model, client = front
    good = request(request_id="good")
    model.execute([given, good])
    record = given.record.wait()
    record.check()
    assert record.error.code() == TritonError.INVALID_ARG
    assert words in record.error.message() and len(record.error.message()) < 250
    assert record.data == []
    assert len(client.submitted) == 1
    client.say(client.submitted[0].id, "fine", STOP)
    assert good.record.wait().error is None
    wait_for(lambda: not model.live)


def test_engine_unavailable_at_submit(front, server) -> None:
    model, client = front
    client.unavailable = "the engine is being restarted"
    given = request()
    model.execute([given])
    record = given.record.wait()
    record.check()
    assert record.error.code() == TritonError.UNAVAILABLE
    assert record.error.message() == "the engine is being restarted"
    wait_for(lambda: not model.live and not model._sequences)
    wait_for(lambda: server.value("gllm:request_errors_total") == 1)


@pytest.mark.parametrize(
    ("finish", "code"),
    [
        (Finish("error", status="invalid", message="too long"), TritonError.INVALID_ARG),
        (Finish("error", status="unavailable", message="queue full"), TritonError.UNAVAILABLE),
        (Finish("error", status="internal", message="step failed"), TritonError.INTERNAL),
        (Finish("abort", status="cancelled", message="gone"), TritonError.CANCELLED),
        (Finish("error", message="no status"), TritonError.INTERNAL),
    ],
)
def test_an_error_of_one_sequence_fails_the_request_and_frees_the_others(
    front, finish: Finish, code: int
) -> None:
    model, client = front
    given = request(sampling={"n": 2})
    model.execute([given])
    a, b = (r.id for r in client.submitted)
    client.say(b, "text")
    client.say(a, "", finish)
    record = given.record.wait()
    record.check()
    assert (record.error.code(), record.error.message()) == (code, finish.message)
    wait_for(lambda: b in client.aborted)
    wait_for(lambda: not model._sequences)


def test_a_bug_in_parsing_costs_one_request(front, server, monkeypatch) -> None:
    model, client = front
    monkeypatch.setattr(model.tokenizer, "encode", lambda *_, **options: 1 / 0)
    given = request()
    model.execute([given])
    record = given.record.wait()
    record.check()
    assert record.error.code() == TritonError.INTERNAL
    wait_for(lambda: any("ZeroDivisionError" in line for _, line in server.log))


# ---------------------------------------------------------------- ends before the end


def test_cancel_before_the_first_token(front, server) -> None:
    model, client = front
    given = request(stream=True, request_id="walker")
    model.execute([given])
    given.record.cancelled = True
    record = given.record.wait()
    record.check()
    assert record.error.code() == TritonError.CANCELLED
    assert len(record.sent) == 1
    wait_for(lambda: client.aborted == [client.submitted[0].id])
    wait_for(lambda: server.value("gllm:request_cancellations_total") == 1)
    wait_for(lambda: any("'walker'" in line and "cancelled" in line for _, line in server.log))


def test_cancel_midway_aborts_every_sequence(front) -> None:
    model, client = front
    given = request(stream=True, sampling={"n": 2})
    model.execute([given])
    ids = [r.id for r in client.submitted]
    client.say(ids, "abc")
    given.record.cancelled = True
    record = given.record.wait()
    client.say(ids, "late")
    record.check()
    assert record.error.code() == TritonError.CANCELLED
    wait_for(lambda: sorted(client.aborted) == ids)
    wait_for(lambda: not model.live and not model._sequences)


def test_deadline_gives_the_text_so_far_then_the_error(front) -> None:
    model, client = front
    given = request(stream=True, parameters={"timeout": 150_000})
    model.execute([given])
    client.say(client.submitted[0].id, "abc")
    record = given.record.wait()
    record.check()
    assert record.text() == "abc"
    assert record.error.code() == TritonError.UNAVAILABLE
    assert "timeout" in record.error.message()
    assert "150000" in record.error.message()
    wait_for(lambda: client.aborted == [client.submitted[0].id])


@pytest.mark.parametrize("fail_at", [1, 2])
def test_a_client_that_is_gone_costs_its_request_only(front, server, fail_at: int) -> None:
    model, client = front
    gone, other = request(stream=True), request(stream=True, request_id="other")
    gone.record.fail_at = fail_at
    model.execute([gone, other])
    a, b = (r.id for r in client.submitted)
    for sent in range(1, fail_at + 1):
        client.say([a, b], "x")  # a response each
        wait_for(lambda: gone.record.attempts >= len(other.record.data) == sent)  # noqa: B023
    wait_for(lambda: client.aborted == [a])
    wait_for(lambda: len(model.live) == 1)
    client.say([a, b], "yz", STOP)
    assert other.record.wait().text() == "x" * fail_at + "yz"
    assert not gone.record.violations
    assert any("ClientGone" in line for level, line in server.log if level == "error")


def test_a_send_that_fails_once_ends_the_request_with_an_error(front) -> None:
    model, client = front
    given = request(stream=True)

    def fail_once(number: int) -> None:
        if number == 1:
            raise RuntimeError("no shared memory")

    given.record.before_send = fail_once
    model.execute([given])
    client.say(client.submitted[0].id, "x")
    record = given.record.wait()
    record.check()
    assert record.error.code() == TritonError.INTERNAL
    wait_for(lambda: client.aborted == [client.submitted[0].id])


def test_a_final_that_cannot_be_sent_does_not_leak(front) -> None:
    model, client = front
    given = request()
    given.record.fail_at = 1
    model.execute([given])
    client.say(client.submitted[0].id, "x", STOP)
    wait_for(lambda: not model.live and not model._sequences)
    assert not given.record.violations
    assert given.record.attempts == 1


def test_engine_lost_midway(front, server) -> None:
    model, client = front
    streaming, whole = request(stream=True), request()
    model.execute([streaming, whole])
    ids = [r.id for r in client.submitted]
    client.on_stats(Stats(running=2, kv_usage=0.5, steps=4))
    client.say(ids, "abc")
    client.on_lost("the engine died; it is being restarted")
    for given in (streaming, whole):
        record = given.record.wait()
        record.check()
        assert record.error.code() == TritonError.UNAVAILABLE
        assert record.error.message() == "the engine died; it is being restarted"
    assert streaming.record.text() == "abc"
    assert whole.record.text() == ""
    wait_for(lambda: server.value("gllm:num_requests_running") == 0)
    again = request()
    model.execute([again])
    client.say(client.submitted[-1].id, "ok", STOP)
    assert again.record.wait().text() == "Hiok"


@pytest.mark.parametrize("when", ["while tokenizing", "after submit"])
def test_a_request_that_failed_early_leaves_no_orphan(front, monkeypatch, when: str) -> None:
    model, client = front
    given = request(sampling={"n": 2})

    def lose() -> None:
        client.on_lost("gone")
        given.record.wait()

    def encode(prompt: str, *options: object) -> list[int]:
        lose()
        return [*prompt.encode()]

    if when == "after submit":
        client.on_submit = lose
    else:
        monkeypatch.setattr(model.tokenizer, "encode", encode)
    model.execute([given])
    given.record.check()
    wait_for(lambda: not model._sequences and not model.live)
    assert {r.id for r in client.submitted} <= {*client.aborted}


def test_triton_is_not_asked_for_cancellation_while_final_is_on_its_way(front) -> None:
    model, client = front
    early, late = request(), request()
    late.record.before_send = lambda number: time.sleep(0.2)
    polled = threading.Event()

    def finish_now() -> None:
        if client.submitted and not polled.is_set():  # a request is asked before it is submitted
            polled.set()
            client.say(client.submitted[0].id, "x", STOP)
            time.sleep(0.1)

    early.record.during_poll = finish_now
    model.execute([early, late])
    assert polled.wait(5)
    client.say(client.submitted[1].id, "x", STOP)
    late.record.wait().check()
    wait_for(lambda: not model.live)
    early.record.check()


def test_finalize_with_streams_running(tmp_path, server) -> None:
    with front_end(tmp_path) as (model, client):
        streaming, whole = request(stream=True), request()
        model.execute([streaming, whole])
        client.on_stats(Stats(running=2, waiting=1, kv_usage=0.5, steps=4))
        client.say([r.id for r in client.submitted], "ab")
        model.finalize()
        for given in (streaming, whole):
            given.record.check()
            assert given.record.error.code() == TritonError.UNAVAILABLE
        assert streaming.record.text() == "ab"
        assert client.closed
        assert sorted(client.aborted) == [r.id for r in client.submitted]
        assert server.value("gllm:num_requests_running") == 0
        assert server.value("gllm:num_requests_waiting") == 0
        assert server.value("gllm:kv_cache_usage") == 0
        names = {thread.name for thread in threading.enumerate()}
        assert not names & {"sender-0", "sender-1", "sweep", "metrics"}


def test_finalize_lets_running_requests_end(tmp_path, server) -> None:
    with front_end(tmp_path, drain_timeout_s=20) as (model, client):
        given = request(stream=True)
        model.execute([given])
        sequence = client.submitted[0].id
        ending = threading.Timer(0.1, lambda: client.say(sequence, "done", STOP))
        ending.start()
        model.finalize()
        given.record.check()
        assert given.record.error is None
        assert given.record.text() == "done"
        ending.join()


def test_nothing_keeps_tritons_objects_after_final(front) -> None:
    """A response sender that stays alive keeps its model from being unloaded."""
    model, client = front
    given = request(stream=True)
    senders = []
    make = given.get_response_sender
    given.get_response_sender = lambda: senders.append(weakref.ref(s := make())) or s
    model.execute([given])
    (stream,) = model.live
    client.say(client.submitted[0].id, "x", STOP)
    given.record.wait()
    wait_for(lambda: not model.live)
    assert stream.closed
    wait_for(lambda: gc.collect() is not None and senders[0]() is None)


# ---------------------------------------------------------------- coalescing


@pytest.mark.parametrize(("coalesce", "sizes"), [("true", [1, 9]), ("false", [1] * 10)])
def test_what_arrives_during_a_send_is_one_response(tmp_path, server, coalesce, sizes) -> None:
    with front_end(tmp_path, {"coalesce": coalesce}) as (model, client):
        given = request(stream=True, return_num_output_tokens=True)
        sending, go_on = threading.Event(), threading.Event()

        def hold(number: int) -> None:
            if number == 1:
                sending.set()
                assert go_on.wait(5)

        given.record.before_send = hold
        model.execute([given])
        sequence = client.submitted[0].id
        client.say(sequence, "a")
        assert sending.wait(5)  # the first token left alone, without waiting for more
        client.say(sequence, "bcdefghij", LENGTH)
        go_on.set()
        record = given.record.wait()
        record.check()
        assert [int(r.tensors["num_output_tokens"][0]) for r in record.data] == sizes
        assert record.text() == "abcdefghij"


def test_first_tokens_go_before_later_ones(tmp_path, server) -> None:
    with front_end(tmp_path, {"sender_threads": "1"}) as (model, client):
        order: list[str] = []
        given = {name: request(stream=True, request_id=name) for name in ("busy", "old", "new")}
        sending, go_on = threading.Event(), threading.Event()

        def note(name: str, number: int) -> None:
            order.append(f"{name}{number}")
            if order == ["old1", "busy1"]:
                sending.set()
                assert go_on.wait(5)

        for name, r in given.items():
            r.record.before_send = lambda number, name=name: note(name, number)
        model.execute(list(given.values()))
        busy, old, new = (r.id for r in client.submitted)
        client.say(old, "a")
        wait_for(lambda: order == ["old1"])
        client.say(busy, "a")
        assert sending.wait(5)
        client.say(old, "b")
        client.say(new, "a")
        go_on.set()
        wait_for(lambda: len(order) == 4)
        assert order[2:] == ["new1", "old2"]
        client.say([busy, old, new], "z", STOP)
        for r in given.values():
            r.record.wait().check()


def test_a_flood_of_first_tokens_leaves_running_streams_their_share(tmp_path, server) -> None:
    """A stream that runs has its turn after each first token, however many of these wait."""
    with front_end(tmp_path, {"sender_threads": "1"}) as (model, client):
        order: list[str] = []
        old = [request(stream=True, request_id=f"old{i}") for i in range(3)]
        new = [request(stream=True, request_id=f"new{i}") for i in range(20)]
        sending, go_on = threading.Event(), threading.Event()

        def note(kind: str, number: int) -> None:
            order.append(kind)
            if len(order) == len(old) + 1:
                sending.set()
                assert go_on.wait(5)

        for kind, those in (("old", old), ("new", new)):
            for r in those:
                r.record.before_send = lambda number, kind=kind: note(kind, number)
        model.execute(old + new)
        ids = [r.id for r in client.submitted]
        client.say(ids[:3], "a")
        wait_for(lambda: len(order) == 3)
        client.say(ids[3], "a")
        assert sending.wait(5)  # the sender is held by the first of the new ones
        client.say(ids, "b")
        go_on.set()
        wait_for(lambda: len(order) == 3 + 1 + 3 + 20)
        assert order[4:10] == ["new", "old"] * 3
        client.say(ids, "z", STOP)
        for r in old + new:
            r.record.wait().check()


def test_a_send_from_another_thread_is_refused(front) -> None:
    model, client = front
    given = request(stream=True)
    model.execute([given])
    (stream,) = model.live
    with pytest.raises(RuntimeError, match="pinned"):
        stream._send(fake_triton.InferenceResponse(), False)
    assert given.record.attempts == 0


# ---------------------------------------------------------------- configuration, log, metrics


class Config:
    def __init__(self) -> None:
        self.inputs, self.outputs, self.policy, self.batch = [], [], None, None

    def add_input(self, tensor) -> None:
        self.inputs.append(tensor)

    def add_output(self, tensor) -> None:
        self.outputs.append(tensor)

    def set_model_transaction_policy(self, policy) -> None:
        self.policy = policy

    def set_max_batch_size(self, size) -> None:
        self.batch = size


def test_auto_complete_declares_every_tensor() -> None:
    config = TritonPythonModel.auto_complete_config(Config())
    assert [t["name"] for t in config.inputs] == list(INPUTS)
    assert all(t["optional"] for t in config.inputs)
    assert [t["name"] for t in config.outputs] == list(OUTPUTS)
    assert (config.policy, config.batch) == ({"decoupled": True}, 0)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"sender_threads": "0"}, "sender_threads"),
        ({"sender_threads": "two"}, "sender_threads"),
        ({"coalesce": "yes"}, "coalesce"),
        ({"REPORT_CUSTOM_METRICS": "yes"}, "REPORT_CUSTOM_METRICS: 'yes'"),
        ({"sender_thread": "2"}, "unknown parameter sender_thread"),
    ],
)
def test_bad_parameters_fail_the_load(tmp_path, server, parameters, words: str) -> None:
    with pytest.raises(ValueError, match=words), front_end(tmp_path, parameters):
        raise AssertionError("it loaded")


def test_unknown_key_of_model_json_fails_the_load(tmp_path, server) -> None:
    with pytest.raises(ConfigError, match="no_such_key"), front_end(tmp_path, no_such_key=1):
        raise AssertionError("it loaded")


def test_front_ends_say_who_they_are(front) -> None:
    _, client = front
    assert (client.scope, client.instance) == ("m/1", "m_0_0")


def test_one_log_line_a_request(tmp_path, server) -> None:
    with front_end(tmp_path) as (model, client):
        good, bad = request(request_id="good\nid"), request("", request_id="bad")
        model.execute([good, bad])
        client.say(client.submitted[0].id, "abc", STOP)
        good.record.wait()
        bad.record.wait()
    lines = [line for _, line in server.log]
    assert len(lines) == 2
    assert all("\n" not in line for line in lines)
    assert any("good" in line and "3 tokens (stop)" in line for line in lines)
    assert any("'bad': invalid: text_input" in line for line in lines)


def test_log_requests_false_keeps_the_log_still(tmp_path, server) -> None:
    with front_end(tmp_path, log_requests=False) as (model, client):
        given = request()
        model.execute([given])
        client.say(client.submitted[0].id, "abc", STOP)
        given.record.wait()
    assert server.log == []


def test_metrics_count_exactly(tmp_path, server) -> None:
    with front_end(tmp_path) as (model, client):
        client.on_stats(Stats(running=1, prefix_queries=10, prefix_hits=4, preemptions=1, steps=3))
        one, two = request("abc"), request("de", sampling={"n": 2}, stream=True)
        bad, long = request(""), request("x" * 100)
        model.execute([one, two, bad, long])
        a, b, c, d = (r.id for r in client.submitted)
        client.say(d, "", Finish("error", status="invalid", message="too long"))
        client.say(a, "wxyz", LENGTH)
        client.say([b, c], "12", STOP)
        client.on_stats(
            Stats(
                prefix_queries=30,
                prefix_hits=14,
                preemptions=1,
                images_encoded=4,
                images_waiting=3,
                encoders=2,
                branch_snapshot_hits=2,
                tenants={"gold": TenantStats(2, 1, 70, 30)},
            )
        )
        client.on_lost("gone")
        client.on_stats(
            Stats(
                prefix_queries=5,
                prefix_hits=5,
                prefix_stored=9,
                images_encoded=1,
                image_hits=6,
                answer_snapshot_hits=3,
                tenants={"gold": TenantStats(0, 4, 7, 3), "other": TenantStats(1)},
            )
        )
        for given in (one, two, bad, long):
            given.record.wait()
    model_label = {"model": "m", "version": "1"}
    assert server.value("gllm:prompt_tokens_total", **model_label) == 5
    assert server.value("gllm:generation_tokens_total") == 8
    assert server.value("gllm:request_success_total", finished_reason="length") == 1
    assert server.value("gllm:request_success_total", finished_reason="stop") == 2
    assert server.value("gllm:request_errors_total", status="invalid") == 2
    assert server.value("gllm:prefix_cache_queries_total") == 35
    assert server.value("gllm:prefix_cache_hits_total") == 19
    assert server.value("gllm:prefix_cache_kv_hits_total") == 9
    assert server.value("gllm:prefix_cache_snapshot_hits_total", kind="branch") == 2
    assert server.value("gllm:prefix_cache_snapshot_hits_total", kind="answer") == 3
    assert server.value("gllm:num_preemptions_total") == 1
    assert server.value("gllm:images_encoded_total") == 5
    assert server.value("gllm:image_cache_hits_total") == 6
    assert server.value("gllm:num_images_waiting") == server.value("gllm:num_encoders") == 0
    assert server.value("gllm:tenant_prefill_tokens_total", tenant="gold") == 77
    assert server.value("gllm:tenant_decode_tokens_total", tenant="gold") == 33
    assert server.value("gllm:tenant_requests_waiting") == 0  # set when the front end ended
    observed = {name: len(values) for name, values in server.observed.items()}
    assert observed == {
        "gllm:time_to_first_token_seconds": 2,
        "gllm:time_per_output_token_seconds": 2,
        "gllm:e2e_request_latency_seconds": 2,
        "gllm:request_queue_time_seconds": 2,
        "gllm:request_prefill_time_seconds": 2,
        "gllm:request_decode_time_seconds": 2,
        "gllm:request_prompt_tokens": 2,
        "gllm:request_generation_tokens": 2,
        "gllm:request_params_n": 2,
    }
    assert sorted(server.observed["gllm:request_prompt_tokens"]) == [2, 3]
    assert sorted(server.observed["gllm:request_generation_tokens"]) == [4, 4]
    assert sorted(server.observed["gllm:request_params_n"]) == [1, 2]
    assert server.metric_threads == {"metrics"}


@pytest.mark.parametrize("stream", [False, True])
def test_what_an_answer_tells_is_on_the_page_when_it_arrives(tmp_path, server, stream) -> None:
    """Looked up within the send of FINAL, with a side thread that never wakes by itself."""
    with (
        mock.patch("gllm_backend.gllm.metrics.FLUSH_S", 3600),
        front_end(tmp_path) as (model, client),
    ):
        good, bad = request("abc", stream=stream, request_id="good"), request("")
        seen: dict[str, tuple[float, ...]] = {}
        names = ("prompt_tokens_total", "generation_tokens_total", "request_success_total")

        def look(number: int) -> None:
            seen["good"] = *(server.value(f"gllm:{name}") for name in names), len(server.observed)

        def look_at_errors(number: int) -> None:
            seen["bad"] = (server.value("gllm:request_errors_total", status="invalid"),)

        good.record.before_send, bad.record.before_send = look, look_at_errors
        model.execute([good])
        client.say(client.submitted[0].id, "wxyz", LENGTH)
        good.record.wait().check()
        assert seen["good"] == (3, 4, 1, 9)  # and every histogram
        model.execute([bad])
        bad.record.wait().check()
        assert seen["bad"] == (1,)


class HeldMetrics:
    """Takes the place of a front end's after_flush: answers wait until the test lets them go."""

    def __init__(self, model) -> None:
        self._calls: list = []
        self.asked = threading.Semaphore(0)
        model.metrics.after_flush = self._hold

    def _hold(self, call) -> None:
        self._calls.append(call)
        self.asked.release()

    def let_go(self) -> None:
        for call in self._calls:
            call()


@pytest.mark.parametrize("what", ["cancel", "lost", "more tokens"])
def test_nothing_changes_an_answer_that_has_ended(front, what: str) -> None:
    """While it waits for its metrics no thread waits with it, and other streams go on."""
    model, client = front
    held = HeldMetrics(model)
    given, other = request(stream=True), request(stream=True, request_id="other")
    model.senders = model.senders[:1]
    model.execute([given, other])
    sequence, another = (r.id for r in client.submitted)
    client.say(sequence, "abc", STOP)
    assert held.asked.acquire(timeout=5)
    polled = threading.Event()
    given.record.during_poll = polled.set
    if what == "cancel":
        given.record.cancelled = True
        assert polled.wait(5)
    elif what == "lost":
        (stream,) = [s for s in model.live if s.request_id == "r1"]
        stream.fail("unavailable", "lost")
    else:
        client.say(sequence, "def")
    client.say(another, "x")
    wait_for(lambda: other.record.text() == "x")
    assert not given.record.final.is_set()
    held.let_go()
    record = given.record.wait()
    record.check()
    assert (record.text(), record.error) == ("abc", None)
    client.say(another, "y", STOP)
    assert held.asked.acquire(timeout=5)
    held._calls[-1]()
    other.record.wait().check()


def test_finalize_sends_what_waits_for_its_metrics(tmp_path, server) -> None:
    with front_end(tmp_path) as (model, client):
        held = HeldMetrics(model)
        given = request()
        model.execute([given])
        client.say(client.submitted[0].id, "abc", STOP)
        assert held.asked.acquire(timeout=5)
        ending = threading.Timer(0.1, held.let_go)
        ending.start()
        model.finalize()
        given.record.check()
        assert given.record.text() == "Hiabc"
        ending.join()


@pytest.mark.parametrize("broken", ["metrics", "log", "measuring"])
def test_answers_do_not_depend_on_metrics(tmp_path, server, monkeypatch, broken: str) -> None:
    with front_end(tmp_path) as (model, client):
        monkeypatch.setattr(fake_triton.Metric, "increment", lambda self, amount: 1 / 0)
        if broken == "log":
            monkeypatch.setattr(model.metrics, "_warn", lambda sentence: 1 / 0)
        if broken == "measuring":
            monkeypatch.setattr(model, "_measure", lambda stream: 1 / 0)
        for _ in range(2):
            given = request()
            model.execute([given])
            client.say(client.submitted[-1].id, "abc", STOP)
            record = given.record.wait()
            record.check()
            assert record.text() == "Hiabc"
        wait_for(lambda: not model.live and not model._sequences)


def test_two_front_ends_share_families_and_only_one_sets_gauges(tmp_path, server) -> None:
    with front_end(tmp_path) as (one, client), front_end(tmp_path) as (two, other):
        client.on_stats(
            Stats(running=3, waiting=2, kv_usage=0.25, steps=1, encoders=4, stuck_encoders=1)
        )
        for model, engine in ((one, client), (two, other)):
            given = request("abc")
            model.execute([given])
            engine.say(engine.submitted[0].id, "xy", STOP)
            given.record.wait()
        wait_for(lambda: server.value("gllm:num_requests_running") == 3)
        two.finalize()
        wait_for(lambda: server.value("gllm:prompt_tokens_total") == 6)
        assert server.value("gllm:num_requests_running") == 3
        assert server.value("gllm:kv_cache_usage") == 0.25
        assert server.value("gllm:num_encoders") == 4
        assert server.value("gllm:num_encoders_stuck") == 1
    assert server.value("gllm:num_requests_running") == 0


def test_a_model_without_an_engine_is_not_ready(tmp_path, server) -> None:
    with front_end(tmp_path) as (model, client):
        assert model.is_ready() is True
        client.unavailable = "the engine process died; it is being restarted"
        assert model.is_ready() is False
        given = request()
        model.execute([given])
        assert given.record.wait().error.code() == fake_triton.TritonError.UNAVAILABLE
        assert given.record.error.message() == client.unavailable
        client.failed_starts = 3
        wait_for(lambda: server.value("gllm:engine_failed_starts") == 3)
        client.unavailable, client.failed_starts = None, 0
        assert model.is_ready() is True
        wait_for(lambda: server.value("gllm:engine_failed_starts") == 0)
    assert not server.unloaded


@pytest.mark.parametrize("refused", [False, True])
def test_the_vllm_backends_health_check_unloads_a_model_without_an_engine(
    tmp_path, server, refused
) -> None:
    server.refuses_unload = refused
    with front_end(tmp_path, {"ENABLE_VLLM_HEALTH_CHECK": "true"}) as (model, client):
        client.on_lost("a message was misunderstood")  # by an engine that goes on
        assert model.is_ready() and not server.unloaded
        given = request()
        model.execute([given])
        client.unavailable = "the engine process died"
        client.on_lost(client.unavailable)
        assert given.record.wait().error.message() == "the engine process died"
        assert server.unloaded == ([] if refused else ["m"])
    told = [line for level, line in server.log if level == "error" and "unloaded" in line]
    assert told[0] == "model m is unloaded, it has no engine: the engine process died"
    assert len(told) == 1 + refused


def test_the_vllm_backends_parameters_are_obeyed(tmp_path, server) -> None:
    parameters = {"REPORT_CUSTOM_METRICS": "False", "ENABLE_VLLM_HEALTH_CHECK": "true"}
    with front_end(tmp_path, parameters) as (model, client):
        given = request()
        model.execute([given])
        client.say(client.submitted[0].id, "abc", STOP)
        given.record.wait()
    assert not server.metric_threads and not [line for _, line in server.log if "metrics" in line]


def test_metrics_disabled_is_no_hindrance(tmp_path, server) -> None:
    server.metrics_disabled = True
    with front_end(tmp_path) as (model, client):
        given = request()
        model.execute([given])
        client.say(client.submitted[0].id, "abc", STOP)
        assert given.record.wait().error is None
    assert [line for level, line in server.log if level == "warn"] == [
        "no metrics: metrics are disabled"
    ]
