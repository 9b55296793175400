"""The README's measurements are those in benchmarks/results, and are told as they were made."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from gllm_benchmarks.record import RESULTS, record, table_lines
from gllm_benchmarks.report import (
    BEGIN,
    END,
    PAGES,
    ROOT,
    insert,
    kernels_part,
    offline_part,
    read_results,
    render,
    serve_part,
    share_of_offline,
    sizes,
    speed,
)


def result(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    command = f"python -m gllm_benchmarks.{name.partition('-')[0]} --save"
    about = {"benchmark": name, "commit": "abc1234", "command": command, "hardware": "1 x GPU"}
    return about | {"figures": figures}


def run(seconds: float, tokens: int) -> dict[str, Any]:
    return {"seconds": seconds, "tokens": tokens, "first_token": 0.1, "steps": 9}


OURS = {"start_s": 10.0, "kv_tokens": 900, "share": run(25.0, 393_788), "lat1": run(1.28, 256)}
PEER = {"start_s": 80.0, "version": "0.24.0", "share": run(30.0, 393_788), "lat1": run(1.024, 256)}


def cells(text: str) -> dict[str, list[str]]:
    """Rows of a part's table by their first cell."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_up_to_date(name: str) -> None:
    text = (ROOT / name).read_text()
    told = render(PAGES[name], read_results())
    assert insert(text, told) == text, "run scripts/bench report"


def test_every_result_is_told() -> None:
    results = read_results()
    assert sorted(results) == sorted(path.stem for path in RESULTS.glob("*.json"))
    told = "".join(render(sections, results) for sections in PAGES.values())
    assert all(about["commit"] in told for about in results.values())


def test_both_engines_side_by_side() -> None:
    results = {"offline-m": result("offline-m", {"ours": OURS, "vllm": PEER})}
    rows = cells(offline_part("m", results))
    assert rows["workload"] == ["ours", "vllm 0.24.0", "ours is faster by"]
    share = rows["`share`: 2,000 requests, 437k tokens in, 394k out"]
    assert share == ["15,752 output tokens/s", "13,126 output tokens/s", "1.20"]
    lat1 = rows["`lat1`: 1 x 128 tokens in, 256 out"]
    assert lat1 == ["5.00 ms a token", "4.00 ms a token", "0.80"]
    assert rows["start"] == ["10.0 s", "80.0 s", "8.00"]


def test_one_engine_alone_is_compared_with_nothing() -> None:
    rows = cells(offline_part("m", {"offline-m": result("offline-m", {"ours": OURS})}))
    assert rows["workload"] == ["ours"] and rows["start"] == ["10.0 s"]


def test_units() -> None:
    assert speed("prefill", run(20.0, 1536)) == "39,398 tokens/s, prompts included"
    assert speed("1k1k", run(50.0, 524_288)) == "10,486 output tokens/s"
    assert speed("fixed:2:5:100", run(2.0, 200)) == "100 output tokens/s"
    assert sizes("fixed:2:5:1000") == "2 x 5 tokens in, 1,000 out"


def served(workload: str, seconds: float) -> dict[str, Any]:
    about: dict[str, Any] = {"seconds": seconds, "output_tokens": 393_788, "failed": 0}
    about |= {"output_tokens_per_s": 393_788 / seconds, "tpot_ms": None}
    about |= {"ttft_ms": {"mean": 1.0, "p50": 1200.4, "p90": 2.0, "p99": 3000.6}}
    about |= {"goodput": {"slo": {"ttft": 2}, "share": 0.5, "requests_per_s": 10.0}}
    runs = {"all at once": about}
    return {"serve-m": result("serve-m", {"workload": workload, "runs": runs})}


def test_serving_is_compared_with_the_same_work_offline() -> None:
    offline = {"offline-m": result("offline-m", {"ours": OURS})}
    results = served("share", 25.5) | offline
    assert share_of_offline("m", results) == pytest.approx(25.0 / 25.5)
    told = serve_part("m", results)
    assert "All at once, that is 98.0% of what the engine does offline." in told
    assert cells(told)["all at once"] == ["15,443", "1,200 / 3,001", "", "10.00/s, 50%", "0"]
    # Other work, or none to compare with, gives no share.
    assert share_of_offline("m", served("1k1k", 25.5) | offline) is None
    assert share_of_offline("m", served("share", 25.5)) is None
    fewer = {"offline-m": result("offline-m", {"ours": OURS | {"share": run(25.0, 9)}})}
    assert share_of_offline("m", served("share", 25.5) | fewer) is None


def test_kernels() -> None:
    kernels = [
        {"kernel": "GEMM out", "size": "1 x 2 x 3", "us": 10.2, "share": 0.5},
        {"kernel": "sample", "size": "4 x 9", "us": 1.0, "share": 0.25},
        {"kernel": "GEMM out", "size": "8 x 2 x 3", "us": 2000.0, "share": 0.91},
    ]
    told = kernels_part("m", {"kernels-m": result("kernels-m", {"kernels": kernels})})
    assert cells(told)["GEMM out"] == ["1 x 2 x 3: 10 us, 50%; 8 x 2 x 3: 2,000 us, 91%"]
    assert "`scripts/bench kernels --save` at abc1234 on 1 x GPU." in told


def test_what_was_simulated_is_told_as_such() -> None:
    times = {"ttft_ms": {"p50": 71.4, "p99": 1303.0}, "tpot_ms": {"p50": 27.0, "p99": 35.0}}
    policies = {"a": {"12 requests/s": times}}
    policies["b"] = {"12 requests/s": times | {"goodput": {"share": 0.97}}}
    results = {"simulate-m": result("simulate-m", {"policies": policies})}
    told = render(PAGES["docs/benchmarks.md"], results)
    assert told.startswith("## Simulated, on no GPU\n\n**m.**") and "nothing of this" in told
    rows = cells(told)
    assert rows["load"] == ["a", "b"]
    assert rows["12 requests/s"] == [
        "71.4 / 1,303 / 27.0 / 35.0",
        "71.4 / 1,303 / 27.0 / 35.0, 97%",
    ]
    assert "`scripts/bench simulate --save` at abc1234" in told


def test_sections_are_there_for_what_was_measured() -> None:
    sections = PAGES["docs/benchmarks.md"]
    assert render(sections, {}) == ""
    told = render(sections, served("share", 25.5))
    assert told.startswith("## Through a server\n\n**m, through tritonserver")


def test_markers() -> None:
    once = insert(f"a\n{BEGIN}\nold\n{END}\nb", "new")
    assert once == f"a\n{BEGIN}\n\nnew\n\n{END}\nb" == insert(once, "new")
    for text in ("a", f"{BEGIN} a", f"a {END}"):
        with pytest.raises(ValueError, match="lost a marker"):
            insert(text, "new")


def test_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gllm_benchmarks.record.RESULTS", tmp_path)
    monkeypatch.setenv("GLLM_COMMIT", "0123abc")
    figures = {"a": [1.23456789, {"b": 1234567.8}], "n": 1234567}
    record(Namespace(name=None, save=True), "serve-x", figures)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line == json.loads((tmp_path / "serve-x.json").read_text())
    assert line["commit"] == "0123abc" and line["benchmark"] == "serve-x"
    assert line["figures"] == {"a": [1.2346, {"b": 1234600.0}], "n": 1234567}
    monkeypatch.delenv("GLLM_COMMIT")
    monkeypatch.setattr("sys.orig_argv", ["python", "-m", "x", "--trace", "/home/me/t.csv", "a/b"])
    record(Namespace(name="y", save=False), "serve-x", {})
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["commit"] != "0123abc" and line["command"].endswith("-m x --trace t.csv a/b")
    assert line["benchmark"] == "y" and len([*tmp_path.iterdir()]) == 1


def test_tables_are_aligned() -> None:
    assert table_lines(["a", "long"], [[1, 2], ["wide cell", ""]]) == [
        "| a         | long |",
        "| --------- | ---- |",
        "| 1         | 2    |",
        "| wide cell |      |",
    ]
