"""What serve.py makes of known times: percentiles, goodput, the patterns of arrival, the plot."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from gllm_benchmarks import evaluate, host, offline, prefix, serve, served_model, simulate, sweep
from gllm_benchmarks.load import RequestRecord
from gllm_benchmarks.plot import draw
from gllm_benchmarks.record import number, told
from gllm_benchmarks.serve import meets, numbers, parse_slo, patterns, summarize, times_of
from gllm_benchmarks.served_model import cpu_seconds
from gllm_client import GenerateError

NUMBER_FLAGS = {
    *("--streams", "--tokens", "--steps", "--front-ends", "--repeat", "--timeout", "--vocab"),
    *("--seconds", "--concurrency", "--clients", "--limit", "--rate", "--seed", "--slo", "--pp"),
    *("--share", "--within", "--block", "--length", "--samples", "--max-tokens"),
    *(
        "--gateway",
        "--gpus-per-stage",
        "--bandwidth",
        "--flops",
        "--activation-bytes",
        "--link",
        "--latency",
    ),
}


def made(due: float, times: list[float], tokens: list[int], **over: Any) -> RequestRecord:
    fields: dict[str, Any] = {"sent": due, "wanted": sum(tokens), "error": None}
    return RequestRecord(due=due, times=times, tokens=tokens, **fields | over)


def test_times_of_one_request() -> None:
    one = made(10.0, [10.5, 11.0, 12.5], [1, 1, 3], sent=10.2)
    # From when it was due, not from when it was sent; 4 tokens after the first in 2 s.
    assert times_of(one) == {"ttft": [0.5], "tpot": [0.5], "itl": [0.5, 1.5], "e2e": [2.5]}
    single = made(0.0, [0.25], [1])
    assert times_of(single) == {"ttft": [0.25], "tpot": [], "itl": [], "e2e": [0.25]}


def test_summary() -> None:
    whole = [made(i, [i + 0.1 * (i + 1), i + 1.1 * (i + 1)], [1, 10]) for i in range(9)]
    lost = made(0.0, [0.2], [1], wanted=11)
    refused = made(0.0, [], [], wanted=11, error="queue full")
    figures = summarize([*whole, lost, refused], {"ttft": 0.45, "tpot": 0.65})
    assert (figures["completed"], figures["failed"], figures["requests"]) == (9, 2, 11)
    assert figures["first_failure"] == "tokens are missing"
    assert figures["seconds"] == pytest.approx(8 + 9.9)
    assert figures["output_tokens"] == 9 * 11 + 1
    assert figures["output_tokens_per_s"] == pytest.approx(100 / 17.9)
    assert figures["tokens_per_response"] == pytest.approx(100 / 19)
    # TTFT is 100, 200, ... 900 ms, TPOT the same; ITL ten times that.
    expected = {"mean": 500, "p50": 500, "p90": 820, "p99": 892}
    assert figures["ttft_ms"] == pytest.approx(expected)
    assert figures["tpot_ms"] == pytest.approx(expected)
    assert figures["itl_ms"] == pytest.approx({key: 10 * value for key, value in expected.items()})
    # Four keep the first limit, six the second: four keep both. What failed is never good.
    assert figures["goodput"]["share"] == pytest.approx(4 / 11)
    assert figures["goodput"]["requests_per_s"] == pytest.approx(4 / 17.9)


def test_each_load_goes_through_the_openai_server_too(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []

    def load(address: str, model: str, jobs: Any, arrivals: int, **options: Any) -> Any:
        sent.append((address, options["api"]))
        return [made(0.0, [1.0, 2.0], [1, 10]) for _ in jobs]

    monkeypatch.setattr(serve, "run_load", load)
    monkeypatch.setattr("sys.argv", "serve --start m --concurrency 2,4 --gateway 1".split())
    served = serve.Served("grpc", "m", 100, openai="h:1")
    runs = serve.measure(served, serve.parse_arguments(), [], [(5, 11)] * 4)
    assert [*runs] == [f"{n} at a time{way}" for n in (2, 4) for way in ("", ", gllm openai")]
    ways = [("grpc", "grpc"), ("http://h:1", "completions")]
    assert sent == ways * 3  # to warm up, and of each load


def test_the_cpu_time_of_the_parts() -> None:
    busy = "import os, time\nwhile time.process_time() < 0.2: pass\nprint(1, flush=True)\ninput()"
    before = cpu_seconds()
    command = [sys.executable, "-c", busy, "gllm_engine"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        alive = cpu_seconds() - before
        process.communicate(b"\n")
    ended = cpu_seconds() - before
    assert alive["gllm_engine"] > 0.15 and alive["clients"] < 0.1
    assert ended["clients"] > 0.15 and "gllm_engine" not in ended


def test_a_process_that_has_just_ended_costs_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    monkeypatch.setattr(served_model, "descendants", lambda pid: {(process.pid, pid, 0)})
    assert cpu_seconds().keys() == {"clients"}


def test_a_failure_is_a_sentence_and_a_bug_has_its_traceback() -> None:
    for error in (GenerateError("x"), FileNotFoundError("x")):
        with pytest.raises(SystemExit, match="x"), told():
            raise error
    for bug in (RuntimeError("dictionary changed size"), ValueError("not enough values")):
        with pytest.raises(type(bug)), told():
            raise bug
        with pytest.raises(SystemExit), told(type(bug)):
            raise bug


def test_nothing_came() -> None:
    refused = made(5.0, [], [], wanted=3, error="no")
    figures = summarize([refused], {})
    assert figures["completed"] == 0 and figures["first_failure"] == "no"
    assert figures["ttft_ms"] is None and figures["output_tokens_per_s"] == 0
    assert "goodput" not in figures


def test_client_lag_is_told_and_shortens_no_run() -> None:
    figures = summarize([made(1.0, [2.0], [1], sent=1.25)], {})
    assert figures["client_lag_ms"] == pytest.approx(250)
    assert figures["seconds"] == pytest.approx(1.0)


def test_slo() -> None:
    slo = parse_slo("ttft=2,tpot=0.1")
    assert slo == {"ttft": 2.0, "tpot": 0.1}
    assert meets(slo, made(0, [2.0, 2.9], [1, 9]))
    assert not meets(slo, made(0, [2.1, 2.9], [1, 9]))
    assert not meets(slo, made(0, [2.0, 3.1], [1, 9]))
    assert meets(slo, made(0, [1.0], [1]))  # no later token, so none came late
    assert not meets(slo, made(0, [1.0], [1], wanted=2))
    for text, problem in (("itl=1", "'itl' is none of ttft"), ("ttft", "is not NAME=SECONDS")):
        with pytest.raises(argparse.ArgumentTypeError, match=problem):
            parse_slo(text)


def loads(**given: Any) -> dict[str, Any]:
    options = {"concurrency": [], "all": False, "rate": [], "seconds": None, "seed": 0} | given
    return patterns(argparse.Namespace(**options), given.pop("recorded", []), 50)


def test_patterns() -> None:
    found = loads(concurrency=[4], all=True, rate=[1.0, 10.0])
    assert list(found) == ["4 at a time", "all at once", "1 requests/s", "10 requests/s"]
    closed, burst, slow, fast = found.values()
    assert closed == 4 and burst == [0.0] * 50 and len(slow) == len(fast) == 50
    assert slow == pytest.approx([10 * at for at in fast])
    short = loads(rate=[10.0], seconds=2.0)["10 requests/s"]
    assert short == [at for at in fast if at <= 2] and 5 < len(short) < 50


def test_patterns_of_a_trace() -> None:
    recorded = [0.0, 1.0, 5.0]
    assert loads(recorded=recorded) == {"as recorded": recorded}
    assert loads(recorded=recorded, rate=[0.8])["0.8 requests/s"] == pytest.approx([0, 0.5, 2.5])
    assert loads(recorded=recorded, concurrency=[2]) == {"2 at a time": 2}


@pytest.mark.parametrize("text", ["", "1,x", "0", "2,-1", "nan", "inf", "1e400", "9" * 400, "101"])
@pytest.mark.parametrize("kind", [int, float])
def test_bad_numbers(text: str, kind: Any) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        numbers(kind, 0.1, 100)(text)
    assert len(str(caught.value)) < 100


def test_good_numbers() -> None:
    assert numbers(float, 0.1, 100)("0.5,2,100") == [0.5, 2.0, 100.0]
    assert number(int, 1, 5)("5") == 5


@pytest.mark.parametrize("module", [evaluate, host, offline, prefix, serve, simulate, sweep])
def test_every_number_flag_of_the_benchmarks_has_a_range(
    module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parse = module.parse_arguments if hasattr(module, "parse_arguments") else module.main
    monkeypatch.setattr("sys.argv", ["bench", "--help"])
    with pytest.raises(SystemExit):
        parse()
    flags = NUMBER_FLAGS & {*re.findall(r"--[\w-]+", capsys.readouterr().out)}
    if module is simulate:  # its steps are a file
        flags -= {"--steps"}
    assert len(flags) > 1
    for flag in flags:
        for text in ("nan", "1e400", "9" * 400, "-1", "x"):
            monkeypatch.setattr("sys.argv", ["bench", f"{flag}={text}"])
            with pytest.raises(SystemExit) as ended:
                parse()
            told = capsys.readouterr().err.splitlines()[-1]
            assert ended.value.code == 2 and f"argument {flag}: " in told and len(told) < 200


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("sweep --start m --rate 2", "--within: it needs --start, --rate and --slo"),
        ("sweep --start m --slo ttft=1", "--within: it needs --start, --rate and --slo"),
        ("sweep --address a --model m --rate 2 --slo ttft=1", "--within: it needs --start"),
        ("sweep --start m --rate 2 --slo ttft=1 --all", "and no other load"),
        ("serve --start m --rate 2 --vary a=1", "--vary: it needs --within"),
        (
            "sweep --start m --rate 2 --slo ttft=1 --timeline t",
            "--timeline, --gateway: they are of a server to start, once",
        ),
    ],
)
def test_what_a_sweep_needs(
    words: str, problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *_ = words.split()
    monkeypatch.setattr("sys.argv", words.split())
    with pytest.raises(SystemExit):
        (sweep if command == "sweep" else serve).parse_arguments()
    assert problem in capsys.readouterr().err


def test_times_below_a_tenth_of_a_second_have_a_decimal() -> None:
    run = {"ttft_ms": {"p50": 4.26, "p99": 99.96}, "itl_ms": None}
    assert serve.latencies(run, "ttft_ms", "itl_ms") == "4.3 / 100.0"
    assert (
        serve.latencies({"ttft_ms": {"p50": 100.4, "p99": 12_345.6}}, "ttft_ms") == "100 / 12,346"
    )


def test_plot() -> None:
    def run(speed: float, ttft: float, tpot: float | None) -> dict[str, Any]:
        tpots = None if tpot is None else {"p50": tpot, "p99": 2 * tpot}
        ttfts = {"p50": ttft, "p99": 2 * ttft}
        return {"output_tokens_per_s": speed, "ttft_ms": ttfts, "tpot_ms": tpots}

    runs = [run(2000, 80, 20), run(1000, 40, 10), run(10, 1, None)]
    svg = draw("a < b & c$", runs)
    assert svg == draw("a < b & c$", runs) and "<dc:date>" not in svg
    tree = ET.fromstring(svg)
    name = "{http://www.w3.org/2000/svg}"
    words = [each.text for each in tree.iter(f"{name}text")]
    assert "a < b & c$" in words and words.count("output tokens/s") == 2
    assert words.count("p50") == words.count("p99") == 2
    assert {"time to first token, ms", "time per output token, ms"} < set(words)
    # What is clipped to the axes is drawn from data: lines, and a group of markers for each.
    (left, left99, right, right99), dots = curves(tree)
    assert [len(line) for line in (left, left99, right, right99)] == [3, 3, 2, 2]
    assert [left, left99, right, right99] == dots
    frames = [panel(tree, number) for number in (1, 2)]
    for line, frame in zip(dots, [frames[0], frames[0], frames[1], frames[1]], strict=True):
        (x0, y0), (x1, y1) = frame
        assert all(x0 < x < x1 and y0 < y < y1 for x, y in line)
        # From the origin in the lower left corner, both axes are linear.
        times = [(x - x0, y1 - y) for x, y in line]
        assert times == sorted(times)
        (x_1000, y_1000), (x_2000, y_2000) = times[-2:]
        assert x_2000 == pytest.approx(2 * x_1000, rel=0.01)
        assert y_2000 == pytest.approx(2 * y_1000, rel=0.01)
    for half, whole, frame in ((left, left99, frames[0]), (right, right99, frames[1])):
        bottom = frame[1][1]
        assert bottom - whole[-1][1] == pytest.approx(2 * (bottom - half[-1][1]), rel=0.01)
    ET.fromstring(draw("nothing", []))


Line = list[tuple[float, ...]]


def curves(tree: ET.Element) -> tuple[list[Line], list[Line]]:
    """The corners of each line, and the places of its markers, in the order of drawing."""
    name = "{http://www.w3.org/2000/svg}"
    paths = (path for path in tree.iter(f"{name}path") if "clip-path" in path.keys())
    groups = (group for group in tree.iter(f"{name}g") if "clip-path" in group.keys())
    return [corners(path) for path in paths], [
        [(float(use.get("x", "")), float(use.get("y", ""))) for use in group] for group in groups
    ]


def corners(path: ET.Element) -> Line:
    parts = re.split("[MLz]", path.get("d", ""))
    return [tuple(map(float, part.split())) for part in parts if part.strip()]


def panel(tree: ET.Element, number: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The upper left and the lower right corner of a panel: of the first thing that is in it."""
    (axes,) = (each for each in tree.iter() if each.get("id") == f"axes_{number}")
    places = corners(axes[0][0])
    return min(places), max(places)
