"""The serving benchmark against the real server: every pattern of load, and what it tells."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from live import MODEL, Server

from gllm_benchmarks.evaluate.perplexity import actual_scores, by_engine, paragraphs, summarize
from gllm_benchmarks.load import run_load
from gllm_benchmarks.prefix import WITH, compare, run_served
from gllm_benchmarks.report import PAGES, render
from gllm_benchmarks.reuse import chats, make_chats
from gllm_benchmarks.serve import Served
from gllm_benchmarks.workloads import Job, make_jobs
from gllm_engine import LLM, write_tiny_model

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]
TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,37,4
2023-11-16 18:15:46.8009906,39,10
2023-11-16 18:15:46.9805900,879,5
"""


def bench(*arguments: str, status: int = 0, command: str = "serve") -> dict[str, Any]:
    words = [sys.executable, "-m", f"gllm_benchmarks.{command}", *arguments]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert done.returncode == status, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_each_pattern(server: Server, tmp_path: Path) -> None:
    plot = tmp_path / "plot.svg"
    line = bench(
        *("--address", server.grpc, "--model", MODEL, "--workload", "fixed:8:20:12"),
        *("--all", "--rate", "20,40", "--concurrency", "3", "--clients", "2"),
        *("--slo", "ttft=60,tpot=60", "--plot", str(plot)),
    )
    runs = line["figures"]["runs"]
    assert list(runs) == ["3 at a time", "all at once", "20 requests/s", "40 requests/s"]
    for run in runs.values():
        assert (run["completed"], run["failed"], run["output_tokens"]) == (8, 0, 96)
        assert run["goodput"]["share"] == 1
        assert 0 < run["ttft_ms"]["p50"] < run["e2e_ms"]["p50"]
        # Both are rounded to five digits, and all may have ended together.
        assert run["e2e_ms"]["p50"] <= 1000 * run["seconds"] * 1.0001
        assert 1 <= run["tokens_per_response"] <= 12
    assert line["benchmark"] == f"serve-{MODEL}" and "<svg" in plot.read_text()
    server.wait_idle()


def test_a_trace_and_what_the_model_cannot_take(server: Server, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(TRACE)
    where = ("--address", server.grpc, "--model", MODEL, "--trace", str(trace))
    (run,) = bench(*where)["figures"]["runs"].values()
    assert run["completed"] == 3 and run["output_tokens"] == 19 and run["seconds"] > 0.3
    trace.write_text(TRACE + "2023-11-16 18:15:46.9905900,2000,5\n")
    (run,) = bench(*where, status=1)["figures"]["runs"].values()
    assert (run["completed"], run["failed"]) == (3, 1) and "max_model_len" in run["first_failure"]


def test_records_are_in_the_order_of_jobs(server: Server) -> None:
    jobs = [Job(job.prompt, 3 + i) for i, job in enumerate(make_jobs([(5, 1)] * 7, 2048))]
    for arrivals in (3, [0.02 * i for i in range(7)]):
        records = run_load(server.grpc, MODEL, jobs, arrivals, clients=3)
        assert [sum(record.tokens) for record in records] == [3 + i for i in range(7)]
        assert all(record.is_complete for record in records)
        for one in records:
            assert one.due <= one.sent < one.times[0] and one.times == sorted(one.times)
    assert [one.due - records[0].due for one in records] == pytest.approx(arrivals)
    # In a closed loop of one client, so many at a time: the fourth waits for one of the first.
    records = run_load(server.grpc, MODEL, jobs, 3)
    assert sorted(r.sent for r in records)[3] >= min(r.times[-1] for r in records)
    server.wait_idle()


def test_hits_of_the_prefix_cache(server: Server) -> None:
    """One request at a time finds what any cache could hold; the hits are in the metrics."""
    jobs = make_chats(chats("chats:3:2:1:64:16:4"), vocab=2048)
    served = Served(server.grpc, MODEL, 2048, server.metrics_address)
    options = {"clients": 1, "timeout": 200.0}
    server.settle()
    figures = compare(lambda *given: run_served(served, 1, options, *given), jobs)
    without, cached = figures["runs"].values()
    assert without["hit_rate"] == 0 < figures["ideal_hit_rate"]
    assert figures["runs"][WITH]["hit_rate"] == pytest.approx(figures["ideal_hit_rate"])
    assert (without["failed"], cached["failed"], cached["completed"]) == (0, 0, 6)
    server.wait_idle()


def test_a_served_model_predicts_as_an_offline_one_does(server: Server, offline: LLM) -> None:
    """Perplexity of held-out text; tests/benchmarks compares the offline one with transformers."""
    texts = paragraphs()
    with server.client() as client:
        chunks = [next(client.generate(t, max_tokens=1, prompt_logprobs=0)) for t in texts]
    served = summarize([actual_scores(chunk.prompt_logprobs) for chunk in chunks], texts)
    known = summarize(by_engine(offline, texts), texts)
    assert served["tokens"] == known["tokens"] > 500
    assert served["nats_per_token"] == pytest.approx(known["nats_per_token"], abs=1e-4)


def test_a_server_of_its_own_for_a_mere_shape(tmp_path: Path) -> None:
    """Random weights, a tokenizer made up, images, the server gone at the end."""
    write_tiny_model(tmp_path / "tiny", "Qwen2_5_VLForConditionalGeneration")
    shape = tmp_path / "shape"
    shape.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (shape / name).write_text((tmp_path / "tiny" / name).read_text())
    line = bench(
        *("--start", str(shape), "--workload", "image:2:1:2", "--all", "--front-ends", "1"),
        *("--config", "cpu_threads=1", "--config", "num_pages=128"),
    )
    assert line["figures"]["runs"]["all at once"]["output_tokens"] == 128


@pytest.mark.parametrize(("ttft", "rates"), [("60", [20, 40]), ("0.000001", [20])])
def test_a_sweep_of_two_policies(tmp_path: Path, ttft: str, rates: list[float]) -> None:
    """Each on a server of its own; nothing is computed. No server meets the second SLO."""
    trace = tmp_path / "trace.csv"
    trace.write_text(TRACE)
    plot = tmp_path / "plot.svg"
    ways = ["schedule_policy=chunked_prefill", "schedule_policy=token_throttling plans_in_flight=2"]
    line = bench(
        *("--start", "model_repository/shakespeare/1", "--trace", str(trace), "--rate", "40,20"),
        *("--slo", f"ttft={ttft}", "--share", "0.95", "--front-ends", "1", "--plot", str(plot)),
        *("--config", "device=none", "--vary", ways[0], "--vary", ways[1]),
        command="sweep",
    )
    figures = line["figures"]
    assert line["benchmark"] == "serve-1-sweep" and figures["workload"] == "trace.csv"
    assert list(figures["policies"]) == ways
    for runs in figures["policies"].values():
        assert [run["rate"] for run in runs.values()] == rates
        assert all(run["completed"] == 3 for run in runs.values())
    served = 40 if len(rates) == 2 else None
    assert figures["served_rate"] == dict.fromkeys(ways, served)
    told = [f"{way}, {served or 20} requests/s" for way in ways]
    assert list(figures["runs"]) == told
    about = line | {"commit": "abc", "hardware": "none"}
    page = render(PAGES["docs/benchmarks.md"], {"serve-1-sweep": about})
    assert all(name in page for name in told)
    assert plot.read_text().count(f">{ways[1]}<") == 3


def test_nobody_there() -> None:
    with pytest.raises(SystemExit, match="before it began"):
        run_load("127.0.0.1:9", MODEL, [Job([1], 1)], 1)
