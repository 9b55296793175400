"""The load client against an OpenAI server: what it asks, what it counts, what errors it tells."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fake_openai import MODEL, Answer, FakeOpenAI, event, usage
from patience import SCRIPT_S

from gllm_benchmarks import serve
from gllm_benchmarks.load import RequestRecord, play, run_load
from gllm_benchmarks.openai_api import OpenAIClient
from gllm_benchmarks.serve import summarize
from gllm_benchmarks.workloads import Job
from gllm_client import GenerateError

JOBS = [Job([5, 6, 7], 4), Job([8], 2)]


def completion(path: str, body: dict[str, Any]) -> tuple[int, list[bytes]]:
    """An event for each token, then the usage; the prompt's length is what was cached."""
    count = body["max_tokens"]
    text = event(choices=[{"index": 0, "text": "", "finish_reason": None}])
    return 200, [text * count, usage(count, len(body["prompt"]))]


def chat(path: str, body: dict[str, Any]) -> tuple[int, list[bytes]]:
    """A role alone, thoughts, text and an end, as servers stream them."""
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"reasoning_content": "so"}, {"content": "hi"}, {}]
    ends = [None, None, None, "length"]
    parts = [
        event(choices=[{"index": 0, "delta": delta, "finish_reason": end}])
        for delta, end in zip(deltas, ends, strict=True)
    ]
    return 200, [*parts, usage(body["max_tokens"])]


def sent(url: str, monkeypatch: pytest.MonkeyPatch, **over: Any) -> list[RequestRecord]:
    """Records of JOBS, two at a time, by a client in this process."""
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{time.monotonic()}\n"))
    task = {"address": url, "model": MODEL, "api": "completions", "key_file": None}
    task |= {"arrivals": 2, "sampling": {}, "timeout": 60.0, "jobs": JOBS, "salts": None}
    return asyncio.run(play(task | over))


def test_completions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("sk-1\n")
    with FakeOpenAI(completion) as server:
        over = {"key_file": str(key), "salts": ["a", "b"], "sampling": {"temperature": 0.5}}
        first, second = sent(server.url, monkeypatch, **over)
        asked = sorted(server.asked, key=lambda each: each.body["cache_salt"])
    # The last response has the tokens of the whole answer: only the usage tells their number.
    assert (first.tokens, first.cached, first.error) == ([0, 0, 0, 4], 3, None)
    assert (second.tokens, second.cached) == ([0, 2], 1)
    assert first.is_complete and len(first.times) == 4 and first.times == sorted(first.times)
    assert summarize([first, second], {})["output_tokens"] == 6
    assert [each.path for each in asked] == ["/v1/completions"] * 2
    assert asked[0].headers["authorization"] == "Bearer sk-1"
    assert asked[0].body == {
        "model": MODEL,
        "prompt": [5, 6, 7],
        "max_tokens": 4,
        "ignore_eos": True,
        "temperature": 0.5,
        "cache_salt": "a",
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeOpenAI(chat) as server:
        first, second = sent(f"{server.url}/v1/", monkeypatch, api="chat")
        asked = {each.body["max_tokens"]: each for each in server.asked}
    # The role comes before any token, and is none.
    assert first.tokens == [0, 0, 4] and first.is_complete and first.cached is None
    assert asked[4].path == "/v1/chat/completions" and "authorization" not in asked[4].headers
    assert asked[4].body["messages"] == [{"role": "user", "content": "5 6 7"}]
    assert asked[4].body["temperature"] == 1.0 and "prompt" not in asked[4].body


@pytest.mark.parametrize(
    ("status", "parts", "sentence"),
    [
        (429, [b'{"error": {"message": "the queue is full"}}'], "status 429: .*queue is full"),
        (200, [event(error={"message": "engine died"})], "engine died"),
        (200, [event(choices=[])], "without its usage"),
        (200, [b"data: {nonsense\n\n"], "the server fails: DecodeError"),
        (200, [event(choices="none")], "the server fails: ValidationError"),
    ],
)
def test_errors_are_records(
    status: int, parts: list[bytes], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeOpenAI(lambda path, body: (status, parts)) as server:
        found = sent(server.url, monkeypatch)
    assert not any(one.is_complete for one in found)
    for one in found:
        with pytest.raises(GenerateError, match=sentence):
            raise GenerateError(str(one.error))


def test_images_are_for_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeOpenAI(completion) as server:
        (record,) = sent(server.url, monkeypatch, jobs=[Job([1], 1, ["abcd"])], arrivals=1)
    assert record.error == "images: only a tritonserver is asked about them"


def test_a_wrong_model_and_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeOpenAI(completion) as server:
        url = server.url
        with pytest.raises(SystemExit, match="serves no model other"):
            sent(url, monkeypatch, model="other")
    with pytest.raises(GenerateError, match="the server fails: ClientConnectorError"):
        sent(url, monkeypatch)


class Cut:
    """A response whose body comes in two blocks, cut at a byte."""

    def __init__(self, data: bytes, at: int) -> None:
        self._blocks = (data[:at], data[at:])
        self.content = self

    async def iter_any(self) -> AsyncIterator[bytes]:
        for block in self._blocks:
            yield block


def test_events_may_be_cut_at_every_byte() -> None:
    stream = b": a comment\r\n\r\nevent: message\nretry: 5\ndata:" + event(choices=[{}])[5:]
    stream += event(choices=[], usage={"completion_tokens": 3}) + b"data: [DONE]\r\n\r\nafter"

    async def read(at: int) -> list[tuple[int, int | None]]:
        events = OpenAIClient("http://x", MODEL)._read_events(Cut(stream, at))  # type: ignore[arg-type]
        return [(len(e.choices), e.usage and e.usage.completion_tokens) async for e in events]

    for at in range(len(stream)):
        assert asyncio.run(read(at)) == [(1, None), (0, 3)], at


def bench(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "gllm_benchmarks.serve", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SCRIPT_S)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_figures_are_those_of_grpc() -> None:
    with FakeOpenAI(completion) as server:
        line = bench(
            *("--openai", server.url, "--model", MODEL, "--workload", "fixed:6:20:12"),
            *("--rate", "40", "--slo", "ttft=60,tpot=60", "--clients", "2"),
        )
        prompts = {tuple(each.body["prompt"]) for each in server.asked}
    (run,) = line["figures"]["runs"].values()
    assert line["benchmark"] == f"serve-{MODEL}" and line["figures"]["api"] == "completions"
    assert (run["completed"], run["failed"], run["output_tokens"]) == (6, 0, 72)
    assert run["goodput"]["share"] == 1 and run["e2e_ms"]["p50"] > 0 and run["client_lag_ms"] >= 0
    assert all(len(prompt) == 20 and max(prompt) < 1000 for prompt in prompts)
    keys = {"seconds", "requests_per_s", "output_tokens_per_s", "ttft_ms", "tpot_ms", "itl_ms"}
    assert keys <= run.keys()


def test_the_client_is_no_bottleneck(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one client reads of a server that only writes: in processor time, as cores are busy."""
    count = 1000
    one = event(id="cmpl-1", object="text_completion", model=MODEL, choices=[{"text": " word"}])
    body = [one * count, usage(count)]
    with FakeOpenAI(lambda path, given: (200, body)) as server:
        begin = time.thread_time()
        records = sent(server.url, monkeypatch, arrivals=16, jobs=[Job([1], count)] * 64)
        seconds = time.thread_time() - begin
    figures = summarize(records, {})
    assert figures["completed"] == 64 and figures["tokens_per_response"] == 1
    speed = figures["output_tokens"] / seconds
    print(f"one client process reads {speed:,.0f} events in a second of processor time")
    assert speed > 60_000  # an engine on a GPU sends some 15,000 a second, to several clients


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--openai http://x --all", "--openai: --model is needed too"),
        ("--address x --model m --all --api chat", "they are of an OpenAI server"),
        ("--start x --all --api-key-file k", "they are of an OpenAI server"),
        (
            "--openai http://x --model m --all --timeline t",
            "--timeline, --gateway: they are of a server",
        ),
        ("--openai http://x --model m --all --gateway 1", "they are of a server to start, once"),
        ("--openai http://x --address x --model m", "not allowed with"),
    ],
)
def test_flags_that_do_not_go_together(
    flags: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench", *flags.split()])
    with pytest.raises(SystemExit):
        serve.parse_arguments()
    assert sentence in capsys.readouterr().err


def test_the_key_is_in_no_command_line(tmp_path: Path) -> None:
    """Other users of a machine read command lines; the key is read by the clients themselves."""
    key = tmp_path / "key"
    key.write_text("sk-secret")
    seen: list[str] = []

    def answer(path: str, body: dict[str, Any]) -> tuple[int, list[bytes]]:
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                seen.append(Path("/proc", pid, "cmdline").read_text())
            except OSError:
                continue
        return completion(path, body)

    spy: Answer = answer
    with FakeOpenAI(spy) as server:
        run_load(server.url, MODEL, JOBS, 1, api="completions", key_file=key)
    assert any("gllm_benchmarks.load" in line for line in seen)
    assert not any("sk-secret" in line for line in seen)
