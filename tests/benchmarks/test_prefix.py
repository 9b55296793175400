"""The prefix benchmark: its workloads, the ideal it compares with, and its hits and figures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from fake_openai import MODEL, FakeOpenAI, event, usage
from hypothesis import given, settings
from hypothesis import strategies as st

from gllm_benchmarks import offline, prefix, serve, sweep
from gllm_benchmarks.prefix import WITH, compare, rows, run_offline, run_served
from gllm_benchmarks.report import PAGES, render
from gllm_benchmarks.reuse import PAGE, Chats, chats, ideal_rate, make_chats, read_mooncake
from gllm_benchmarks.serve import Served
from gllm_benchmarks.workloads import Job
from gllm_engine import Engine, make_config, write_tiny_model

OPTIONS = {"clients": 1, "timeout": 60.0, "api": "completions"}


def test_a_prompt_begins_with_the_one_before() -> None:
    sizes = chats("chats:6:3:2:50:10:7")
    assert sizes == Chats(6, 3, 2, 50, 10, 7)
    jobs = make_chats(sizes, vocab=100)
    assert jobs == make_chats(sizes, vocab=100) != make_chats(sizes, vocab=100, seed=2)
    assert [len(job.prompt) for job in jobs] == [60] * 6 + [77] * 6 + [94] * 6
    assert {job.output_len for job in jobs} == {7}
    for before, after in zip(jobs, jobs[6:], strict=False):
        assert after.prompt[: len(before.prompt)] == before.prompt
    assert len({tuple(job.prompt[:50]) for job in jobs}) == 2
    assert len({tuple(job.prompt[50:60]) for job in jobs}) == 6


@pytest.mark.parametrize(
    "name", ["", "users", "chats:1:2", "chats:1:1:1:1:1:0", "chats:1:1:1:1:1:x"]
)
def test_unknown_workloads_are_named(name: str) -> None:
    with pytest.raises(SystemExit, match="is not chats:users:rounds:systems:system_len"):
        chats(name)


def test_the_ideal_by_hand() -> None:
    a, b = list(range(PAGE)), list(range(50, 50 + PAGE))
    assert ideal_rate([a, a]) == 0  # the last token is computed, and with it its page
    assert ideal_rate([[*a, 1], [*a, 2]]) == pytest.approx(PAGE / (2 * PAGE + 2))
    assert ideal_rate([[*a, *b, 1], [*b, *a, 1]]) == 0  # a page is known by all before it too
    assert ideal_rate([[*a[1:], 1, 1], [*a[1:], 2, 1]]) == 0  # less than a page


def longest(before: list[list[int]], prompt: list[int]) -> int:
    """Tokens of the longest prefix in whole pages, without the last token, that one before has."""
    ends = range(0, len(prompt), PAGE)
    return max((n for n in ends for each in before if each[:n] == prompt[:n]), default=0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=3 * PAGE), min_size=1, max_size=6))
def test_the_ideal_is_the_longest_prefix_in_whole_pages(ends: list[list[int]]) -> None:
    prompts = [[0] * 2 * PAGE + end for end in ends]
    hits = sum(longest(prompts[:i], prompt) for i, prompt in enumerate(prompts))
    assert ideal_rate(prompts) == pytest.approx(hits / sum(map(len, prompts)))


def line(input_length: int, output_length: int, *ids: int) -> str:
    about = {"timestamp": 0, "input_length": input_length, "output_length": output_length}
    return json.dumps(about | {"hash_ids": ids}) + "\n"


TRACE = line(1024, 64, 0, 1) + line(1300, 3, 0, 1, 2) + line(600, 100, 0, 3)


def test_mooncake(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(TRACE)
    first, second, third = read_mooncake(path, vocab=1000)
    assert [len(job.prompt) for job in (first, second, third)] == [1024, 1300, 600]
    assert [job.output_len for job in (first, second, third)] == [64, 3, 100]
    assert second.prompt[:1024] == first.prompt and third.prompt[:512] == first.prompt[:512]
    assert third.prompt[512:] != first.prompt[512:600]
    rate = ideal_rate([first.prompt, second.prompt, third.prompt])
    assert rate == pytest.approx((1024 + 512) / (1024 + 1300 + 600))
    short = read_mooncake(path, vocab=1000, limit=2, block=32)
    assert [(len(job.prompt), job.output_len) for job in short] == [(64, 4), (81, 1)]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "holds no request"),
        (TRACE + "{}\n", "request 4: KeyError"),
        (TRACE + "nonsense\n", "request 4: JSONDecodeError"),
        (line(513, 1, 7), "request 1: .*the ids are of fewer tokens than the input"),
    ],
)
def test_what_is_no_trace_is_refused(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(SystemExit, match=sentence):
        read_mooncake(path, vocab=10)


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path, "Qwen3ForCausalLM")
    return path


@pytest.fixture
def engine(shape: Path) -> Iterator[Engine]:
    """One that schedules and caches, and computes nothing."""
    config = {"model": str(shape), "device": "none", "num_pages": 256, "max_model_len": 512}
    engine = Engine(make_config(config))
    yield engine
    engine.close()


def test_an_engine_with_room_reaches_the_ideal(engine: Engine) -> None:
    jobs = make_chats(chats("chats:4:3:2:60:20:10"), vocab=100)
    figures = compare(lambda *given: run_offline(engine, 1, *given), jobs)
    without, cached = figures["runs"].values()
    assert without["hit_rate"] == 0 < figures["ideal_hit_rate"] == cached["hit_rate"]
    assert figures["prompt_tokens"] == sum(len(job.prompt) for job in jobs)
    assert without["completed"] == cached["completed"] == 12
    assert cached["output_tokens"] == 120 and cached["ttft_ms"]["p50"] > 0
    again = compare(lambda *given: run_offline(engine, 4, *given), jobs)
    assert 0 < again["runs"][WITH]["hit_rate"] <= figures["ideal_hit_rate"]


def test_an_engine_without_room_does_not(shape: Path) -> None:
    config = {"model": str(shape), "device": "none", "num_pages": 24, "max_model_len": 256}
    jobs = make_chats(chats("chats:8:2:8:100:30:10"), vocab=100)
    engine = Engine(make_config(config))
    try:
        figures = compare(lambda *given: run_offline(engine, 2, *given), jobs)
    finally:
        engine.close()
    assert figures["runs"][WITH]["hit_rate"] < figures["ideal_hit_rate"] / 2


def test_a_refused_request_is_told(engine: Engine) -> None:
    records, _ = run_offline(engine, 2, [Job([1] * 600, 3), Job([2] * 20, 3)], ["a", "a"])
    assert "512" in str(records[0].error) and not records[0].is_complete
    assert records[1].is_complete and sum(records[1].tokens) == 3


def test_hits_of_any_openai_server() -> None:
    """A server that tells what it had in its cache, and one that does not."""
    seen: list[list[int]] = []

    def answer(path: str, body: dict[str, Any]) -> tuple[int, list[bytes]]:
        cached = longest(seen, body["prompt"]) if body["cache_salt"] == "a" else None
        seen.append(body["prompt"])
        return 200, [event(choices=[{"text": "x"}]), usage(body["max_tokens"], cached)]

    jobs = make_chats(chats("chats:3:2:1:40:10:5"), vocab=100)
    with FakeOpenAI(answer) as server:
        served = Served(server.url, MODEL, 100)
        records, hits = run_served(served, 1, OPTIONS, jobs, ["a"] * 6)
        _, unknown = run_served(served, 2, OPTIONS, jobs, ["b"] * 6)
    assert all(one.is_complete for one in records) and unknown is None
    prompts = [job.prompt for job in jobs]
    assert hits == pytest.approx(ideal_rate(prompts) * sum(map(len, prompts))) and hits > 0


def test_the_command_and_its_table(
    shape: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(TRACE)
    flags = ["--offline", str(shape), "--trace", str(path), "--block", "32", "--name", "prefix-x"]
    flags += ["--concurrency", "1", "--config", "device=none", "--config", "num_pages=64"]
    monkeypatch.setattr("sys.argv", ["bench", *flags])
    prefix.main()
    *table, last = capsys.readouterr().out.strip().splitlines()
    result = json.loads(last)
    figures = result["figures"]
    assert figures["workload"] == "trace.jsonl" and figures["prompt_tokens"] == 64 + 81 + 37
    ideal = 96 / 182
    assert figures["runs"][WITH]["hit_rate"] == pytest.approx(ideal, rel=1e-4)
    assert rows(figures)[1][:3] == [WITH, "52.7%", "52.7%"] and rows(figures)[0][1:3] == [
        "0.0%",
        "",
    ]
    told = render(PAGES["docs/benchmarks.md"], {"prefix-x": result})
    assert told.startswith(
        "## What the prefix cache saves\n\n**x, trace.jsonl.** 182 prompt tokens."
    )
    assert table[-1] in told


def test_rows_without_figures() -> None:
    run = {"hit_rate": None, "ttft_ms": None, "failed": 3}
    assert rows({"ideal_hit_rate": 0.5, "runs": {WITH: run}}) == [[WITH, "", "50.0%", "", 3]]


BAD = [
    ("prefix --offline {shape} --config page_size=7", "page_size: 7 is not a power of two"),
    ("prefix --offline {shape} --config nonsense=7", "unknown key 'nonsense'; known keys are"),
    ("prefix --offline {shape} --config max_model_len=999999", "max_model_len: 999999 is more"),
    ("prefix --offline {shape} --workload chats:1:x", "workload 'chats:1:x' is not chats:users"),
    ("prefix --offline {shape} --trace /nowhere", "No such file or directory: '/nowhere'"),
    ("serve --start {shape} --all --workload x", "workload 'x' is unknown; known are share"),
    ("sweep --start {shape} --rate 1 --slo ttft=1 --workload x", "workload 'x' is unknown; known"),
    ("serve --start {shape} --trace /nowhere", "No such file or directory: '/nowhere'"),
    ("offline --model {shape} --workloads x", "workload 'x' is unknown; known are share"),
    ("offline --model {shape} --workloads image", "workload 'image' is for a model that takes"),
    ("simulate --model {shape} --workload x", "workload 'x' is unknown; known are share"),
]


@pytest.mark.parametrize(("words", "sentence"), BAD)
def test_a_wrong_value_is_a_sentence(
    words: str, sentence: str, shape: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every benchmark, without a traceback."""
    monkeypatch.setattr("sys.argv", words.format(shape=shape).split())
    module = import_module(f"gllm_benchmarks.{words.split()[0]}")
    run = serve.main if module is sweep else module.main
    with pytest.raises(SystemExit, match=re.escape(sentence)):
        run(*([module.parse_arguments()] if run is serve.main else []))


def test_nobody_there_is_a_sentence_of_each_client(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "serve --openai http://127.0.0.1:1 --model x --all --clients 1"
    monkeypatch.setattr("sys.argv", words.split())
    with pytest.raises(SystemExit, match="a load client failed before it began"):
        serve.main(serve.parse_arguments())
    told = capfd.readouterr().err
    assert told.startswith("the server fails: ClientConnectorError") and told.count("\n") == 1


def test_a_wrong_value_of_the_engine_of_another_process_is_a_sentence(
    shape: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    task = {"model": str(shape), "config": {"nonsense": 7}, "figures": str(tmp_path / "figures")}
    with pytest.raises(SystemExit, match="ours: its process ended with status 1 and no figures"):
        offline.drive("ours", task, None, 60)
    told = capfd.readouterr().err
    assert told.startswith("unknown key 'nonsense'; known keys are") and told.count("\n") == 1
