"""Every door and every output that can be asked for there: what is asked for comes back.

A door is a way to an answer: the offline API, both gRPC clients, the HTTP client, plain HTTP, and
`gllm batch` over each. All give the same request, so all must give the offline engine's answer.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from asking import ask, generate_once, generate_stream, joined, sampled
from live import MODEL, SHIPPED, Server
from odd_lines import check_odd_lines

from gllm_client import Chunk, Client, GenerateError, connect, merge
from gllm_client.__main__ import main
from gllm_client.local_answers import LocalAnswers
from gllm_client.protocol import detokenize_inputs
from gllm_engine import LLM, RequestOutput, SamplingParams

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

PROMPT = "ROMEO:"
SAMPLING = {"max_tokens": 6, "ignore_eos": True, "seed": 3, "temperature": 0.8}
LOGPROBS = {"logprobs": 2, "prompt_logprobs": 1}
FLAGS = ["finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens"]
FLAGS += ["num_output_tokens", "token_ids", "stop_reason", "num_cached_tokens"]
Found = dict[str, Any]  # by output; those of one answer in a list with an entry for each of n


class Doors:
    """`ask(n)` of each door; `found` has no key for what the door has no way to ask for."""

    def __init__(self, server: Server, offline: LLM, directory: Path) -> None:
        self.server, self.offline, self.directory = server, offline, directory

    def llm_generate(self, n: int) -> Found:
        (output,) = self.offline.generate([PROMPT], SamplingParams(n=n, **SAMPLING, **LOGPROBS))
        return of_request(output)

    def llm_stream(self, n: int) -> Found:
        deltas = list(self.offline.stream(PROMPT, SamplingParams(n=n, **SAMPLING, **LOGPROBS)))
        return {
            "text": ["".join(delta.text for delta in deltas)],
            "token_ids": [[id for delta in deltas for id in delta.token_ids]],
            "finish_reason": [deltas[-1].finish_reason],
            "stop_reason": [deltas[-1].stop_reason],
            "logprobs": [[entry for delta in deltas for entry in delta.logprobs or ()]],
            "cumulative_logprob": [deltas[-1].cumulative_logprob],
            "prompt_logprobs": deltas[0].prompt_logprobs,
        }

    def local(self, n: int) -> Found:
        source = LocalAnswers.__new__(LocalAnswers)  # the engine that runs already
        source._llm = self.offline
        return of_chunk(merge(source.stream(PROMPT, {"n": n} | SAMPLING | LOGPROBS)))

    def client(self, scheme: str, n: int, stream: bool) -> Found:
        with connect(f"{scheme}://{self.server.address(scheme)}", MODEL) as client:
            return of_chunk(merge(client.generate(PROMPT, n=n, stream=stream, **OPTIONS)))

    def async_client(self, n: int) -> Found:
        async def ask_it() -> Chunk:
            async with Client(self.server.grpc, MODEL) as client:
                return merge([chunk async for chunk in client.generate(PROMPT, n=n, **OPTIONS)])

        return of_chunk(asyncio.run(ask_it()))

    def plain(self, way: Callable[..., Any], n: int, stream: bool) -> Found:
        tensors = {"text_input": PROMPT, "stream": stream, "exclude_input_in_output": True}
        tensors |= {f"return_{name}": True for name in FLAGS}
        responses = way(self.server, tensors | sampled(n=n, **SAMPLING, **LOGPROBS))
        return of_responses(responses, n)

    def batch(self, n: int, *source: str) -> Found:
        """Parameters by flag and by line."""
        line = {"prompt": PROMPT, "sampling_parameters": {"n": n} | LOGPROBS}
        (self.directory / "in").write_text(json.dumps(line))
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in SAMPLING.items()]
        command = ["batch", str(self.directory / "in"), str(self.directory / "out")]
        assert main([*command, *source, *flags]) == 0
        return of_line(json.loads((self.directory / "out").read_text()))


OPTIONS: dict[str, Any] = {
    "sampling": SAMPLING | LOGPROBS,
    "return_cumulative_logprob": True,
    "return_stop_reason": True,
    "return_num_cached_tokens": True,
}
DOORS: dict[str, Callable[[Doors, int], Found]] = {
    "LLM.generate": Doors.llm_generate,
    "LLM.stream": Doors.llm_stream,
    "gllm, in this process": Doors.local,
    "grpc client": lambda doors, n: doors.client("grpc", n, stream=False),
    "grpc client, stream": lambda doors, n: doors.client("grpc", n, stream=True),
    "asyncio client, stream": Doors.async_client,
    "http client": lambda doors, n: doors.client("http", n, stream=False),
    "http client, stream": lambda doors, n: doors.client("http", n, stream=True),
    "tritonclient": lambda doors, n: doors.plain(ask, n, stream=False),
    "tritonclient, stream": lambda doors, n: doors.plain(ask, n, stream=True),
    "generate": lambda doors, n: doors.plain(generate_once, n, stream=False),
    "generate_stream": lambda doors, n: doors.plain(generate_stream, n, stream=True),
    "batch, grpc": lambda doors, n: doors.batch(n, "--url", doors.server.grpc),
    "batch, http": lambda doors, n: doors.batch(n, "--url", f"http://{doors.server.http}"),
    "batch, in this process": lambda doors, n: doors.batch(
        n, "--model", str(SHIPPED / MODEL / "1")
    ),
}
ANSWERS = {"text", "finish_reason", "logprobs", "cumulative_logprob", "prompt_logprobs"}
COUNTS = {"num_input_tokens", "num_output_tokens"}
# What can be asked for, or comes always, at each door.
ALL = ANSWERS | COUNTS | {"token_ids", "stop_reason", "num_cached_tokens"}
ASKED = dict.fromkeys(DOORS, ALL) | {
    "LLM.generate": ALL - COUNTS,
    "gllm, in this process": ALL - {"num_cached_tokens"},
    "LLM.stream": ANSWERS | {"token_ids", "stop_reason"},
    **{f"batch, {way}": ANSWERS | COUNTS for way in ("grpc", "http", "in this process")},
}


def of_request(output: RequestOutput) -> Found:
    """What the offline engine found; the counts are those of its token ids."""
    names = ("text", "token_ids", "finish_reason", "stop_reason", "logprobs", "cumulative_logprob")
    found: Found = {name: [getattr(o, name) for o in output.outputs] for name in names}
    found["num_input_tokens"] = len(output.prompt_token_ids)
    found["num_output_tokens"] = [len(o.token_ids) for o in output.outputs]
    found["prompt_logprobs"] = output.prompt_logprobs
    found["num_cached_tokens"] = output.num_cached_tokens
    return found


def of_chunk(chunk: Chunk) -> Found:
    names = ("text", "finish_reason", "stop_reason", "logprobs", "cumulative_logprob")
    found: Found = {name: [getattr(o, name) for o in chunk.outputs] for name in names}
    found["token_ids"] = [list(o.token_ids) for o in chunk.outputs]
    found["num_output_tokens"] = [o.num_tokens for o in chunk.outputs]
    found["num_input_tokens"] = chunk.num_input_tokens
    found["prompt_logprobs"] = chunk.prompt_logprobs
    found["num_cached_tokens"] = chunk.num_cached_tokens
    return found


def of_line(line: Found) -> Found:
    outputs = line.get("outputs", [line])
    names = ("text", "finish_reason", "logprobs", "cumulative_logprob", "num_output_tokens")
    found: Found = {name: [output[name] for output in outputs] for name in names}
    return found | {name: line[name] for name in ("num_input_tokens", "prompt_logprobs")}


def of_responses(responses: list[Any], n: int) -> Found:
    """Of tensors: each response has n elements, and the token ids of n answers in a row."""
    counts, ids = joined(responses, "num_output_tokens"), iter(joined(responses, "token_ids"))
    tokens: list[list[int]] = [[] for _ in range(n)]
    for i, count in enumerate(counts):
        tokens[i % n] += [next(ids) for _ in range(count)]
    entries = list(map(json.loads, joined(responses, "logprobs")))
    (prompt_logprobs,) = joined(responses, "prompt_logprobs")
    (num_cached_tokens,) = joined(responses, "num_cached_tokens")
    return {
        "text": ["".join(joined(responses, "text_output")[i::n]) for i in range(n)],
        "token_ids": tokens,
        "finish_reason": joined(responses, "finish_reason")[-n:],
        "stop_reason": [None if r == "None" else r for r in joined(responses[-1:], "stop_reason")],
        "logprobs": [sum(entries[i::n], []) for i in range(n)],
        "cumulative_logprob": joined(responses, "cumulative_logprob")[-n:],
        "num_input_tokens": joined(responses, "num_input_tokens")[0],
        "num_output_tokens": [sum(counts[i::n]) for i in range(n)],
        "prompt_logprobs": json.loads(prompt_logprobs),
        "num_cached_tokens": num_cached_tokens,
    }


def close_to(value: Any) -> Any:
    """Equal to it as JSON would have it, with floats that differ in the last bits."""
    if isinstance(value, dict):
        return {str(key): close_to(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [close_to(each) for each in value]
    return pytest.approx(value, abs=2e-3) if isinstance(value, float) else value


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


@pytest.fixture
def doors(server: Server, offline: LLM, tmp_path: Path) -> Doors:
    return Doors(server, offline, tmp_path)


@pytest.fixture(scope="module")
def expected(offline: LLM) -> dict[int, Found]:
    """By n."""

    def answer(n: int) -> Found:
        (output,) = offline.generate([PROMPT], SamplingParams(n=n, **SAMPLING, **LOGPROBS))
        return of_request(output)

    return {1: answer(1), 2: answer(2)}


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("door", DOORS)
def test_what_is_asked_for_comes_back(
    doors: Doors, expected: dict[int, Found], door: str, n: int
) -> None:
    if (door, n) == ("LLM.stream", 2):
        with pytest.raises(ValueError, match="n: 2 outputs cannot be streamed"):
            DOORS[door](doors, n)
        return
    found = DOORS[door](doors, n)
    assert {name for name, value in found.items() if value is not None} >= ASKED[door] - {
        "stop_reason"
    }
    for name in ASKED[door]:
        assert as_json(found[name]) == close_to(expected[n][name]), name


def test_the_expected_answer_has_all_of_it(expected: dict[int, Found]) -> None:
    for n, answer in expected.items():
        assert len(answer["text"]) == len(answer["logprobs"]) == n
        assert [len(entries) for entries in answer["logprobs"]] == [6] * n
        assert answer["num_output_tokens"] == [6] * n and max(answer["cumulative_logprob"]) < 0
        assert len(answer["prompt_logprobs"]) == answer["num_input_tokens"] > 1
    assert expected[2]["text"][0] == expected[1]["text"][0] != expected[2]["text"][1]


def test_a_stop_reason_comes_back(offline: LLM, expected: dict[int, Found]) -> None:
    third = expected[1]["token_ids"][0][2]
    sampling = SamplingParams(stop_token_ids=(third,), **SAMPLING)
    (output,) = offline.generate([PROMPT], sampling)
    assert output.outputs[0].stop_reason == third
    assert list(offline.stream(PROMPT, sampling))[-1].stop_reason == third


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_what_a_server_in_front_needs_to_know(server: Server, offline: LLM, scheme: str) -> None:
    prompt = PROMPT * 20
    with connect(f"{scheme}://{server.address(scheme)}", MODEL) as client:
        tokens = client.tokenize(prompt)
        assert list(tokens.token_ids) == offline.tokenizer.encode(prompt)
        assert (tokens.text, tokens.num_input_tokens) == (prompt, len(tokens.token_ids))
        shown = offline.tokenizer.decode(tokens.token_ids, skip_special_tokens=False)
        assert client.detokenize(tokens.token_ids) == shown
        texts = merge(client._send(detokenize_inputs(tokens.token_ids, "token_texts"))).text
        assert "".join(json.loads(texts)) == shown
        facts = client.describe()
        assert facts["model"] == MODEL and facts["vocab_size"] == offline.engine.info.vocab_size
        assert facts["special_tokens"] == offline.tokenizer.special_tokens
        client.complete(prompt, max_tokens=1)
        again = client.complete(
            prompt,
            sampling=SAMPLING | {"stop_token_ids": list(range(1024))},
            return_stop_reason=True,
            return_num_cached_tokens=True,
            return_request_times=True,
        )
        assert again.request_times is not None and len(again.request_times) == 3
        assert min(again.request_times) >= 0 and again.request_times[1] > 0
        assert again.num_cached_tokens is not None and again.num_cached_tokens > 0
        assert again.stop_reason == str(again.token_ids[-1])
        with pytest.raises(GenerateError, match="^text_input: it does not go with detokenize"):
            merge(client._send({"operation": "detokenize", "text_input": "a"}))


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_the_prompt_comes_back_where_it_is_asked_for(
    server: Server, expected: dict[int, Found], scheme: str
) -> None:
    with connect(f"{scheme}://{server.address(scheme)}", MODEL) as client:
        whole = client.complete(PROMPT, sampling=SAMPLING, exclude_input_in_output=False)
        assert whole.text == PROMPT + expected[1]["text"][0]


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize("flag", ["--logprobs=2", "--prompt-logprobs=1"])
def test_what_a_command_cannot_show_is_refused(
    server: Server, command: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = [PROMPT] if command == "generate" else []
    assert main([command, *prompt, "--url", server.grpc, flag]) == 2
    assert flag.partition("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_odd_lines_cost_no_other_its_answer(server: Server, tmp_path: Path, scheme: str) -> None:
    check_odd_lines(tmp_path, "--url", f"{scheme}://{server.address(scheme)}", "--concurrency=8")
    server.wait_idle()
