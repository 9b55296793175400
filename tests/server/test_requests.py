"""What a user of Triton asks and gets, over every transport, against the offline engine."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
import tritonclient.grpc as triton
from asking import (
    ALL_FLAGS,
    ONE_SHOT,
    STREAMING,
    GrpcStream,
    Response,
    ask,
    generate,
    generate_once,
    joined,
    sampled,
    text_of,
)
from live import MODEL, Server, wait_for
from tritonclient.utils import InferenceServerException

from gllm_client import connect
from gllm_engine import LLM, SamplingParams

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

PROMPT = "ROMEO:"
GREEDY = {"temperature": 0, "max_tokens": 24}
SEEDED = {"temperature": 0.9, "top_p": 0.95, "seed": 1234, "max_tokens": 24}
STREAM_ERROR = (
    "Error generating stream: When streaming, `exclude_input_in_output` = False is not allowed."
)


def expected(offline: LLM, prompt: Any = PROMPT, **fields: Any) -> Any:
    """The offline engine's answer (its first output)."""
    output = offline.generate([prompt], SamplingParams(**fields))[0]
    assert output.error is None, output.error
    return output.outputs[0]


def check_counts(responses: list[Response]) -> None:
    """Every response carries tokens and says how many; only the last one is final."""
    for response in responses:
        (count,) = response.outputs["num_output_tokens"]
        assert count == len(response.outputs["token_ids"]) > 0
    assert {r.final for r in responses[:-1]} <= {False, None}
    assert responses[-1].final in (True, None)  # None: HTTP does not tell
    reasons = joined(responses, "finish_reason")
    assert reasons[:-1] == ["None"] * (len(responses) - 1) and reasons[-1] != "None"


# ---------------------------------------------------------------- transports


@pytest.mark.parametrize("fields", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("transport", STREAMING)
def test_a_stream_is_the_offline_answer(
    server: Server, offline: LLM, transport: str, fields: dict[str, Any]
) -> None:
    tensors = {"text_input": PROMPT, "stream": True} | ALL_FLAGS | sampled(**fields)
    responses = STREAMING[transport](server, tensors)
    answer = expected(offline, **fields)
    assert text_of(responses) == answer.text
    assert joined(responses, "token_ids") == answer.token_ids
    assert len(answer.token_ids) == sum(joined(responses, "num_output_tokens")) == 24
    assert set(joined(responses, "num_input_tokens")) == {len(offline.tokenizer.encode(PROMPT))}
    assert 1 < len(responses) <= 24
    check_counts(responses)


@pytest.mark.parametrize("fields", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("transport", ONE_SHOT)
def test_one_shot_is_the_offline_answer(
    server: Server, offline: LLM, transport: str, fields: dict[str, Any]
) -> None:
    tensors = {"text_input": PROMPT} | ALL_FLAGS | sampled(**fields)
    (response,) = ONE_SHOT[transport](server, tensors)
    answer = expected(offline, **fields)
    assert response.text == PROMPT + answer.text
    assert response.outputs["token_ids"] == answer.token_ids
    assert response.outputs["finish_reason"] == [answer.finish_reason]
    check_counts([response])


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_the_own_client_gets_the_offline_answer(server: Server, offline: LLM, scheme: str) -> None:
    answer = expected(offline, logprobs=2, **SEEDED)
    with connect(f"{scheme}://{server.address(scheme)}", MODEL) as client:
        chunks = list(client.generate(PROMPT, sampling=SEEDED, logprobs=2))
        whole = client.complete(PROMPT, sampling=SEEDED, logprobs=2)
    for text, ids in (
        (whole.text, whole.token_ids),
        ("".join(c.text for c in chunks), tuple(t for c in chunks for t in c.token_ids)),
    ):
        assert (text, list(ids)) == (answer.text, answer.token_ids)
    assert [set(map(int, entry)) for entry in whole.logprobs] == [set(e) for e in answer.logprobs]


def test_a_model_that_does_not_merge_sends_a_token_a_response(narrow: Server) -> None:
    """config.pbtxt's coalesce "false": responses can be counted, none is lost on any transport."""
    tensors = {"text_input": "abc", "stream": True} | ALL_FLAGS
    tensors |= sampled(temperature=0, max_tokens=300, ignore_eos=True)
    answers = {name: transport(narrow, tensors, "narrow") for name, transport in STREAMING.items()}
    assert {name: len(responses) for name, responses in answers.items()} == dict.fromkeys(
        STREAMING, 300
    )
    assert len({tuple(joined(responses, "token_ids")) for responses in answers.values()}) == 1


def test_two_prompts_on_one_stream(server: Server, offline: LLM) -> None:
    prompts = {"a": "ROMEO:", "b": "First Citizen:"}
    found: dict[str, list[Response]] = {"a": [], "b": []}
    with GrpcStream(server) as stream:
        for request_id, prompt in prompts.items():
            tensors = {"text_input": prompt, "stream": True} | ALL_FLAGS | sampled(**GREEDY)
            stream.send(tensors, request_id=request_id)
        while sum(bool(r and r[-1].final) for r in found.values()) < 2:
            response = stream.take()
            found[response.request_id].append(response)
    for request_id, prompt in prompts.items():
        assert text_of(found[request_id]) == expected(offline, prompt, **GREEDY).text
        check_counts(found[request_id])


def test_an_error_leaves_its_stream_usable(server: Server, offline: LLM) -> None:
    with GrpcStream(server) as stream:
        stream.send({"text_input": PROMPT} | sampled(n=0))
        with pytest.raises(InferenceServerException, match=r"n: 0 is outside \[1, 64\]"):
            stream.take()
        stream.send({"text_input": PROMPT} | sampled(**GREEDY))
        assert stream.take().text == PROMPT + expected(offline, **GREEDY).text


# ---------------------------------------------------------------- inputs


@pytest.mark.parametrize("transport", ONE_SHOT)
def test_exclude_input_in_output_one_shot(server: Server, offline: LLM, transport: str) -> None:
    answer = expected(offline, **GREEDY).text
    for flag, begins in ((None, PROMPT), (False, PROMPT), (True, "")):
        tensors = {"text_input": PROMPT} | sampled(**GREEDY)
        if flag is not None:
            tensors["exclude_input_in_output"] = flag
        (response,) = ONE_SHOT[transport](server, tensors)
        assert response.text == begins + answer


def test_exclude_input_in_output_streaming(server: Server, offline: LLM) -> None:
    answer = expected(offline, **GREEDY).text
    tensors = {"text_input": PROMPT, "stream": True} | sampled(**GREEDY)
    assert text_of(ask(server, tensors)) == answer
    assert text_of(ask(server, tensors | {"exclude_input_in_output": True})) == answer
    with pytest.raises(InferenceServerException) as refused:
        ask(server, tensors | {"exclude_input_in_output": False})
    assert refused.value.message() == STREAM_ERROR
    status, body = generate(server, tensors | {"exclude_input_in_output": False})
    assert (status, body) == (400, {"error": STREAM_ERROR})


@pytest.mark.parametrize("transport", ONE_SHOT)
def test_token_ids_as_prompt(server: Server, offline: LLM, transport: str) -> None:
    ids = offline.tokenizer.encode(PROMPT)
    answer = expected(offline, ids, **GREEDY)
    tensors = {"input_ids": ids} | ALL_FLAGS | sampled(**GREEDY)
    (response,) = ONE_SHOT[transport](server, tensors)
    assert response.text == answer.text  # a text is given back only to who sent one
    assert response.outputs["token_ids"] == answer.token_ids
    assert response.outputs["num_input_tokens"] == [len(ids)]
    (response,) = ONE_SHOT[transport](server, tensors | {"exclude_input_in_output": False})
    assert response.text == PROMPT + answer.text


@pytest.mark.parametrize("transport", ONE_SHOT)
def test_messages_go_through_the_chat_template(
    server: Server, offline: LLM, transport: str
) -> None:
    messages = [
        {"role": "user", "content": "Who art thou?"},
        {"role": "assistant", "content": "A player."},
        {"role": "user", "content": "Play!"},
    ]
    output = offline.chat(messages, SamplingParams(**GREEDY))[0]
    tensors = {"messages": json.dumps(messages)} | ALL_FLAGS | sampled(**GREEDY)
    (response,) = ONE_SHOT[transport](server, tensors)
    assert response.text == output.outputs[0].text
    assert response.outputs["num_input_tokens"] == [len(output.prompt_token_ids)]
    bare = {"add_generation_prompt": False}
    (response,) = ONE_SHOT[transport](server, tensors | {"chat_template_kwargs": json.dumps(bare)})
    ids = offline.tokenizer.chat(messages, chat_template_kwargs=bare)
    assert response.outputs["num_input_tokens"] == [len(ids)] < [len(output.prompt_token_ids)]


def test_request_parameters_are_sampling_parameters(server: Server, offline: LLM) -> None:
    fields = {"temperature": 0.7, "top_k": 40, "seed": 7, "max_tokens": 12, "ignore_eos": True}
    answer = PROMPT + expected(offline, **fields).text
    typed = {k: str(v) if isinstance(v, float) else v for k, v in fields.items()}
    texts = {
        "tensor": ask(server, {"text_input": PROMPT} | sampled(**fields)),
        "gRPC parameters": ask(server, {"text_input": PROMPT}, parameters=typed),
        "JSON keys": generate_once(server, {"text_input": PROMPT} | fields),
        "JSON parameters": generate_once(server, {"text_input": PROMPT, "parameters": fields}),
        "both": ask(
            server,
            {"text_input": PROMPT} | sampled(temperature=0.7, top_k=40, seed=7),
            parameters={"max_tokens": 12, "ignore_eos": True},
        ),
    }
    assert {name: text_of(r) for name, r in texts.items()} == dict.fromkeys(texts, answer)


def test_numbers_may_come_as_strings(server: Server, offline: LLM) -> None:
    fields = {"temperature": 0.7, "top_p": 0.9, "seed": 7, "max_tokens": 12, "ignore_eos": True}
    strings = {k: str(v).lower() for k, v in fields.items()}
    answer = PROMPT + expected(offline, **fields).text
    assert text_of(ask(server, {"text_input": PROMPT} | sampled(**strings))) == answer
    assert text_of(ask(server, {"text_input": PROMPT}, parameters=strings)) == answer
    assert text_of(generate_once(server, {"text_input": PROMPT} | strings)) == answer


def test_the_request_id_comes_back_and_is_logged(server: Server) -> None:
    start = server.log_size()
    tensors = {"text_input": PROMPT, "stream": True} | sampled(**GREEDY)
    responses = ask(server, tensors, request_id="of-grpc-17")
    assert {response.request_id for response in responses} == {"of-grpc-17"}
    generate(server, {"text_input": PROMPT, "id": "of-http-18", "max_tokens": 5})
    for line in (
        r"request 'of-grpc-17': 2 tokens in, 24 tokens \(length\) out, [\d.]+ s",
        r"request 'of-http-18': 2 tokens in, 5 tokens \(length\) out, [\d.]+ s",
    ):
        wait_for(lambda line=line: re.search(line, server.log(start)), f"{line} in the log")


def test_lower_priority_is_served_sooner(narrow: Server) -> None:
    """One request runs, two wait; when it goes, the one that came later but matters more runs."""
    with narrow.client("narrow") as client, GrpcStream(narrow) as stream:
        running = client.generate("abc", max_tokens=16_000, ignore_eos=True)
        next(running)
        for count, (name, priority) in enumerate((("late", 5), ("soon", -5)), 1):
            fields = sampled(max_tokens=4, ignore_eos=True, priority=priority)
            tensors = {"text_input": "abc"} | fields
            # Triton's own priority is no secret to it, but it tells backends nothing of it.
            stream.send(tensors, "narrow", request_id=name, priority=1)
            wait_for(
                lambda count=count: narrow.metric("num_requests_waiting", "narrow") == count,
                f"{count} waiting",
            )
        running.close()
        assert [stream.take().request_id for _ in range(2)] == ["soon", "late"]
    narrow.wait_idle("narrow")


# ---------------------------------------------------------------- outputs


FLAGS = (
    "finish_reason",
    "cumulative_logprob",
    "logprobs",
    "num_input_tokens",
    "num_output_tokens",
    "token_ids",
)


@pytest.mark.parametrize("streaming", [False, True])
def test_flags_over_http(server: Server, streaming: bool) -> None:
    body = {"text_input": PROMPT, "stream": streaming, "max_tokens": 3}
    transport = (STREAMING if streaming else ONE_SHOT)[
        "generate_stream" if streaming else "generate"
    ]
    for value in (None, False, True):
        flags = {} if value is None else {f"return_{f}": value for f in FLAGS}
        wanted = {"text_output"} | (set(FLAGS) if value else set())
        assert all(r.outputs.keys() == wanted for r in transport(server, body | flags))
    for flag in FLAGS:
        responses = transport(server, body | {f"return_{flag}": True})
        assert all(r.outputs.keys() == {"text_output", flag} for r in responses)


def test_outputs_may_be_named_instead(server: Server) -> None:
    tensors = {"text_input": PROMPT} | sampled(**GREEDY)
    for names in (("text_output", "finish_reason"), ("prompt_logprobs", "logprobs")):
        outputs = [triton.InferRequestedOutput(name) for name in names]
        (response,) = ask(server, tensors, outputs=outputs)
        assert response.outputs.keys() == {*names}
    assert [*response.outputs.values()] == [["null"], ["null"]]  # there, though not computed


def test_three_answers_at_once(server: Server, offline: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=16)
    answers = offline.generate([PROMPT], params)[0].outputs
    fields = sampled(n=3, temperature=1.0, seed=5, max_tokens=16)
    tensors = {"text_input": PROMPT, "exclude_input_in_output": True} | ALL_FLAGS | fields
    assert len({answer.text for answer in answers}) == 3
    for one_shot in ONE_SHOT.values():
        (response,) = one_shot(server, tensors)
        assert response.outputs["text_output"] == [a.text for a in answers]
        assert response.outputs["finish_reason"] == [a.finish_reason for a in answers]
        assert response.outputs["num_output_tokens"] == [len(a.token_ids) for a in answers]
        assert response.outputs["token_ids"] == [t for a in answers for t in a.token_ids]
    for transport in STREAMING.values():
        responses = transport(server, tensors | {"stream": True})
        for i, answer in enumerate(answers):
            assert "".join(r.outputs["text_output"][i] for r in responses) == answer.text
            counts = [r.outputs["num_output_tokens"][i] for r in responses]
            assert sum(counts) == len(answer.token_ids)
        assert all(
            len(r.outputs["token_ids"]) == sum(r.outputs["num_output_tokens"]) for r in responses
        )


def test_logprobs_are_json_by_token_id(server: Server, offline: LLM) -> None:
    fields = {"temperature": 0.8, "seed": 3, "max_tokens": 8, "logprobs": 3}
    answer = expected(offline, **fields)
    flags = {"return_logprobs": True, "return_cumulative_logprob": True} | ALL_FLAGS
    tensors = {"text_input": PROMPT, "stream": True} | flags | sampled(**fields)
    for transport in STREAMING.values():
        responses = transport(server, tensors)
        for response in responses:  # each carries those of its own tokens
            assert len(json.loads(response.outputs["logprobs"][0])) == len(
                response.outputs["token_ids"]
            )
        entries = [e for text in joined(responses, "logprobs") for e in json.loads(text)]
        for entry, token, known in zip(entries, answer.token_ids, answer.logprobs, strict=True):
            assert str(token) in entry and 3 <= len(entry) <= 4
            for key, about in entry.items():
                assert about.keys() == {"logprob", "rank", "decoded_token"}
                ours = known[int(key)]
                assert about["logprob"] == pytest.approx(ours["logprob"], abs=1e-3)
                assert (about["rank"], about["decoded_token"]) == (
                    ours["rank"],
                    ours["decoded_token"],
                )
            assert [1, 2, 3] == sorted(a["rank"] for a in entry.values())[:3]
        total = math.fsum(
            e[str(t)]["logprob"] for e, t in zip(entries, answer.token_ids, strict=True)
        )
        assert responses[-1].outputs["cumulative_logprob"] == [pytest.approx(total, abs=1e-3)]


def test_logprobs_that_were_not_computed_are_null(server: Server) -> None:
    tensors = {"text_input": PROMPT, "return_logprobs": True, "return_cumulative_logprob": True}
    (response,) = ask(server, tensors | sampled(max_tokens=3))
    assert response.outputs["logprobs"] == ["null"]
    assert response.outputs["cumulative_logprob"][0] < 0  # this alone makes them be computed


@pytest.mark.parametrize(
    ("streaming", "transport"),
    [(False, name) for name in ONE_SHOT] + [(True, name) for name in STREAMING],
)
def test_prompt_logprobs_come_with_the_first_response(
    server: Server, offline: LLM, streaming: bool, transport: str
) -> None:
    prompt = "ROMEO:\nBut, soft!"
    output = offline.generate([prompt], SamplingParams(max_tokens=3, prompt_logprobs=1))[0]
    fields = sampled(max_tokens=3, prompt_logprobs=1, ignore_eos=True)
    send = (STREAMING if streaming else ONE_SHOT)[transport]
    first, *others = send(server, {"text_input": prompt, "stream": streaming} | fields)
    assert not any("prompt_logprobs" in response.outputs for response in others)
    entries = json.loads(first.outputs["prompt_logprobs"][0])
    assert entries[0] is None and len(entries) == len(output.prompt_token_ids)
    for entry, token, known in zip(
        entries[1:], output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
    ):
        assert str(token) in entry and entry.keys() == {str(key) for key in known}


# ---------------------------------------------------------------- how generation is steered


@pytest.mark.parametrize("transport", STREAMING)
def test_a_stop_string_ends_the_text_before_it(
    server: Server, offline: LLM, transport: str
) -> None:
    whole = expected(offline, **GREEDY).text
    stop = whole[8:13]  # somewhere in the midst, not at a token's edge
    before = whole[: whole.index(stop)]
    tensors = {"text_input": PROMPT, "stream": True} | ALL_FLAGS
    responses = STREAMING[transport](server, tensors | sampled(stop=["\0", stop], **GREEDY))
    assert text_of(responses) == before
    assert joined(responses, "finish_reason")[-1] == "stop"
    kept = sampled(stop=stop, include_stop_str_in_output=True, **GREEDY)
    assert text_of(STREAMING[transport](server, tensors | kept)) == before + stop


def test_structured_outputs(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"age": {"enum": [13, 16]}},
        "required": ["age"],
        "additionalProperties": False,
    }
    texts = {}
    for kind, rule in (
        ("json", schema),
        ("regex", "[0-9]{4}-[a-f]{2}"),
        ("choice", ["to be", "not to be"]),
    ):
        for written in ({kind: rule}, json.dumps({kind: rule})):  # JSON in JSON is vLLM's way
            fields = sampled(structured_outputs=written, max_tokens=120, seed=2)
            tensors = {"text_input": PROMPT, "exclude_input_in_output": True}
            (response,) = ask(server, tensors | {"return_finish_reason": True} | fields)
            assert response.outputs["finish_reason"] == ["stop"]
            assert texts.setdefault(kind, response.text) == response.text
    assert json.loads(texts["json"]) in ({"age": 13}, {"age": 16})
    assert re.fullmatch("[0-9]{4}-[a-f]{2}", texts["regex"])
    assert texts["choice"] in ("to be", "not to be")


def test_bad_words_do_not_appear(server: Server, offline: LLM) -> None:
    whole = expected(offline, **GREEDY).text
    word = max(re.findall(r"[a-z]+", whole), key=len)
    tensors = {"text_input": PROMPT, "exclude_input_in_output": True}
    (response,) = ask(server, tensors | sampled(bad_words=[word], **GREEDY))
    assert word in whole and word not in response.text
    assert response.text == expected(offline, bad_words=(word,), **GREEDY).text


def test_penalties_and_bias_reach_the_sampler(server: Server, offline: LLM) -> None:
    plain = expected(offline, **GREEDY)
    token = plain.token_ids[0]
    for fields in (
        {"repetition_penalty": 1.9},
        {"presence_penalty": 1.9},
        {"frequency_penalty": 1.9},
        {"logit_bias": {str(token): -100}},
        {"min_p": 0.2, "temperature": 1.3, "seed": 11},
    ):
        merged = GREEDY | fields
        params = merged | ({"logit_bias": {token: -100.0}} if "logit_bias" in fields else {})
        answer = expected(offline, **params)
        (response,) = ask(server, {"text_input": PROMPT} | sampled(**merged))
        assert response.text == PROMPT + answer.text
        assert answer.text != plain.text
