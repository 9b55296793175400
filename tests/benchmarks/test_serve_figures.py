"""What serve.py makes of known times: percentiles, goodput, the patterns of arrival, the plot."""

from __future__ import annotations

import argparse
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from gllm_benchmarks.load import Record
from gllm_benchmarks.plot import draw
from gllm_benchmarks.serve import meets, numbers, parse_slo, patterns, summarize, times_of


def made(due: float, times: list[float], tokens: list[int], **over: Any) -> Record:
    fields: dict[str, Any] = {"sent": due, "wanted": sum(tokens), "error": None}
    return Record(due=due, times=times, tokens=tokens, **fields | over)


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


def test_nothing_came() -> None:
    refused = made(5.0, [], [], wanted=3, error="no")
    figures = summarize([refused], {})
    assert figures["completed"] == 0 and figures["first_failure"] == "no"
    assert figures["ttft_ms"] is None and figures["output_tokens_per_s"] == 0
    assert "goodput" not in figures


def test_client_lag_is_told() -> None:
    one = made(1.0, [2.0], [1], sent=1.25)
    assert summarize([one], {})["client_lag_ms"] == pytest.approx(250)


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
    options = {"concurrency": [], "all": False, "rate": [], "seconds": None} | given
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


@pytest.mark.parametrize("text", ["", "1,x", "0", "2,-1"])
def test_bad_numbers(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        numbers(int)(text)
    assert numbers(float)("0.5,2") == [0.5, 2.0]


def test_plot() -> None:
    def run(speed: float, ttft: float, tpot: float | None) -> dict[str, Any]:
        tpots = None if tpot is None else {"p50": tpot, "p99": 2 * tpot}
        ttfts = {"p50": ttft, "p99": 2 * ttft}
        return {"output_tokens_per_s": speed, "ttft_ms": ttfts, "tpot_ms": tpots}

    runs = [run(2000, 80, 20), run(1000, 40, 10), run(10, 1, None)]
    tree = ET.fromstring(draw("a < b & c", runs))
    name = "{http://www.w3.org/2000/svg}"
    assert "a < b & c" in [each.text for each in tree.iter(f"{name}text")]
    assert len(tree.findall(f"{name}g")) == 2
    lines = [line.get("points", "").split() for line in tree.iter(f"{name}polyline")]
    assert [len(points) for points in lines] == [3, 3, 2, 2]
    width, height = float(tree.get("width", 0)), float(tree.get("height", 0))
    for points in lines:
        places = [tuple(map(float, point.split(","))) for point in points]
        assert places == sorted(places) and all(0 <= x < width for x, _ in places)
        heights = [y for _, y in places]
        assert heights == sorted(heights, reverse=True) and all(0 <= y < height for y in heights)
    # Twice the time is twice as high: from the axis at the bottom, p99 over p50.
    (_, p50), (_, p99) = (tuple(map(float, line[-1].split(","))) for line in lines[:2])
    bottom = float(next(tree.iter(f"{name}path")).get("d", "").split("V")[1].split("H")[0])
    assert (bottom - p99) == pytest.approx(2 * (bottom - p50), rel=0.01)
    ET.fromstring(draw("nothing", []))
