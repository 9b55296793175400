"""Writes the tables of measurements in README and docs: scripts/bench report.

This module owns the text between the two markers of each page. All figures come from the results
recorded in benchmarks/results. Each table states its command, commit and hardware.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gllm_benchmarks import evaluate, fairness, faults, host, offline, prefix
from gllm_benchmarks.record import RESULTS, Figures, table_lines
from gllm_benchmarks.serve import latencies, table
from gllm_benchmarks.workloads import images_of, lengths

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- Measurements: written by scripts/bench report from benchmarks/results. -->"
END = "<!-- The end of measurements. -->"

Results = dict[str, dict[str, Any]]  # benchmark -> the object that record.py wrote
Part = Callable[[str, Results], str]
Sections = dict[str, dict[str, Part]]


def read_results(directory: Path = RESULTS) -> Results:
    found = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
    return {result["benchmark"]: result for result in found}


def render(sections: Sections, results: Results) -> str:
    """The sections of a page in order; a benchmark without a result has no section."""
    parts = []
    for title, makers in sections.items():
        found = [
            maker(name.removeprefix(prefix), results)
            for prefix, maker in makers.items()
            for name in sorted(results)
            if name.startswith(prefix)
        ]
        parts += [f"## {title}", *found] if found else []
    return "\n\n".join(parts)


def part(
    title: str, result: dict[str, Any], header: list[str], rows: list[list[Any]], *closing: str
) -> str:
    """One section: the measurement's conditions, the table, and the `closing` paragraphs."""
    command = result["command"].partition("gllm_benchmarks.")[2]
    source = f"`scripts/bench {command}` at {result['commit']} on {result['hardware']}."
    about = f"{title} {source}".strip()
    return "\n\n".join([about, "\n".join(table_lines(header, rows)), *closing])


def part_of(benchmark: Any, name: str, title: str, *closing: str) -> Part:
    """The part of a benchmark with one result, `name`: the table that it prints itself."""

    def make(_: str, results: Results) -> str:
        result = results[name]
        return part(title, result, benchmark.HEADER, benchmark.rows(result["figures"]), *closing)

    return make


def offline_part(model: str, results: Results) -> str:
    """One table per model: each engine's speed on each workload, and their ratio."""
    result = results[f"offline-{model}"]
    header = ["workload"]
    engines = []
    for engine, figures in result["figures"].items():
        header.append(f"{engine} {figures.get('version', '')}".strip())
        engines.append(figures | {"start": {"seconds": figures["start_s"]}})
    if len(engines) == 2:
        header.append("ours is faster by")
    rows = []
    for name, run in engines[0].items():
        if isinstance(run, dict) and "seconds" in run:
            runs = [figures[name] for figures in engines]
            told = "start" if name == "start" else f"`{name}`: {sizes(name)}"
            ratios = [f"{peer['seconds'] / run['seconds']:.2f}" for peer in runs[1:]]
            rows.append([told, *(speed(name, run) for run in runs), *ratios])
    title = f"**{model}, offline**, random weights, every request queued at once."
    return part(title, result, header, rows)


def sizes(name: str) -> str:
    pairs = lengths(name)
    if len(set(pairs)) == 1:
        prompt_len, output_len = pairs[0]
        return f"{len(pairs):,} x {images_of(name)}{prompt_len:,} tokens in, {output_len:,} out"
    totals = map(sum, zip(*pairs, strict=True))
    tokens_in, tokens_out = (f"{total / 1000:,.0f}k" for total in totals)
    return f"{len(pairs):,} requests, {tokens_in} tokens in, {tokens_out} out"


def speed(name: str, run: Figures) -> str:
    """The workload's main figure: latency, prefill speed or output speed; for a start, its time."""
    if name == "start":
        return f"{run['seconds']:.1f} s"
    output_speed, speed, latency, *_ = offline.describe(name, run)
    if name.startswith("lat"):
        return f"{latency} ms a token"
    if sum(prompt_len for prompt_len, _ in lengths(name)) > 10 * run["tokens"]:
        return f"{speed} tokens/s, prompts included"
    return f"{output_speed} output tokens/s"


def serve_part(model: str, results: Results) -> str:
    result = results[f"serve-{model}"]
    closing = []
    share = share_of_offline(model, results)
    if share is not None:
        closing.append(f"All at once, that is {share:.1%} of what the engine does offline.")
    if (RESULTS / f"serve-{model}.svg").is_file():
        closing.append(f"![latency by throughput](../benchmarks/results/serve-{model}.svg)")
    api = result["figures"].get("api", "grpc")
    through = "tritonserver by gRPC" if api == "grpc" else f"an OpenAI server, {api}"
    return part(
        f"**{model}, through {through}.**", result, *table(result["figures"]["runs"]), *closing
    )


def share_of_offline(model: str, results: Results) -> float | None:
    """The served speed as a share of the offline speed; None if their workloads differ."""
    served = results[f"serve-{model}"]["figures"]
    alone = results.get(f"offline-{model}", {}).get("figures", {}).get("ours", {})
    run = served["runs"].get("all at once")
    same = alone.get(served["workload"])
    if not run or not same or run["output_tokens"] != same["tokens"]:
        return None
    return float(same["seconds"] / run["seconds"])


def kernels_part(model: str, results: Results) -> str:
    """One row per kernel: microseconds at each size, and the floor as a share of that time."""
    result = results[f"kernels-{model}"]
    by_kernel: dict[str, list[str]] = {}
    for about in result["figures"]["kernels"]:
        told = f"{about['size']}: {about['us']:,.0f} us, {about['share']:.0%}"
        by_kernel.setdefault(about["kernel"], []).append(told)
    rows = [[kernel, "; ".join(told)] for kernel, told in by_kernel.items()]
    title = f"**{model}, single kernels**, and how near each is to the least time the chip needs."
    return part(title, result, ["kernel", "size: time, share of the floor"], rows)


def simulate_part(name: str, results: Results) -> str:
    """One row per load, one column per policy."""
    result = results[f"simulate-{name}"]
    policies = result["figures"]["policies"]
    rows: dict[str, list[str]] = {}
    for runs in policies.values():
        for load, run in runs.items():
            good = f", {run['goodput']['share']:.0%}" if "goodput" in run else ""
            rows.setdefault(load, [load]).append(latencies(run, "ttft_ms", "tpot_ms") + good)
    title = (
        f"**{name}.** The scheduler is the real one, the stages are cost models: nothing of this "
        "was measured."
    )
    closing = (
        "TTFT p50 / p99 / TPOT p50 / p99 in ms, and the share of requests within the SLO. "
        "With NAME:TOKENS its steps have so many tokens at most, not 2,048 (or as --config says)."
    )
    return part(title, result, ["load", *policies], list(rows.values()), closing)


def prefix_part(model: str, results: Results) -> str:
    """One row without the cache, one with it."""
    result = results[f"prefix-{model}"]
    figures = result["figures"]
    title = f"**{model}, {figures['workload']}.** {figures['prompt_tokens']:,} prompt tokens."
    return part(title, result, prefix.HEADER, prefix.rows(figures))


def evaluate_part(name: str, results: Results) -> str:
    result = results[f"evaluate-{name}"]
    return part(f"**{name}.**", result, *evaluate.table(result["figures"]))


# Page -> heading -> prefix of the names of the benchmarks in that section.
PAGES: dict[str, Sections] = {
    "README.md": {"Speed": {"offline-": offline_part}},
    "docs/benchmarks.md": {
        "Through a server": {"serve-": serve_part},
        "What the prefix cache saves": {"prefix-": prefix_part},
        "How well models answer": {"evaluate-": evaluate_part},
        "Single kernels": {"kernels-": kernels_part},
        "What the host costs": {
            "host": part_of(host, "host", "", "Single runs differ by about a tenth.")
        },
        "Shares of tenants": {
            "fairness": part_of(
                fairness,
                "fairness",
                "Two tenants, of which one keeps ten times as many requests alive as the other.",
            )
        },
        "Simulated, on no GPU": {"simulate-": simulate_part},
    },
    "docs/operations.md": {
        "When a part breaks": {
            "faults": part_of(
                faults,
                "faults",
                "A tiny model on CPU ranks, so that the time to serve again is that of starting "
                "processes: add the time that your model takes to load.",
            )
        }
    },
}


def insert(page: str, text: str) -> str:
    """The page with `text` between its markers. Raises ValueError if a marker is missing."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("a page has lost a marker of scripts/bench report")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main() -> None:
    ArgumentParser("scripts/bench report", description=__doc__).parse_args()
    results = read_results()
    for name, sections in PAGES.items():
        page = ROOT / name
        page.write_text(insert(page.read_text(), render(sections, results)))


if __name__ == "__main__":
    main()
