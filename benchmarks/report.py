"""The README's tables of measurements, made from benchmarks/results: scripts/bench report.

Owns what stands between the README's two markers. Takes every figure from a result as it was
recorded, and says of each table by which command, at which commit and on what it was measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gllm_benchmarks.record import RESULTS, table_lines
from gllm_benchmarks.workloads import lengths

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN = "<!-- Measurements: written by scripts/bench report from benchmarks/results. -->"
END = "<!-- The end of measurements. -->"

Results = dict[str, dict[str, Any]]  # by benchmark: what record.py wrote


def read_results(directory: Path = RESULTS) -> Results:
    found = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
    return {result["benchmark"]: result for result in found}


def render(results: Results) -> str:
    """All sections, in an order of their own; a benchmark without a result has none."""
    parts = []
    if "host" in results:
        parts += ["## What the host costs", host_part(results["host"])]
    makers = {
        "offline-": offline_part,
        "start-": start_part,
        "serve-": serve_part,
        "kernels-": kernels_part,
    }
    found = told(makers, results)
    if found:
        parts += ["## On GPUs", *found]
    found = told({"simulate-": simulate_part}, results)
    if found:
        parts += ["## Simulated, on no GPU", *found]
    return "\n\n".join(parts)


def told(makers: dict[str, Callable[[str, Results], str]], results: Results) -> list[str]:
    """A part for each result whose name begins with a maker's prefix."""
    return [
        maker(name.removeprefix(prefix), results)
        for prefix, maker in makers.items()
        for name in sorted(results)
        if name.startswith(prefix)
    ]


def source(result: dict[str, Any]) -> str:
    command = result["command"].partition("gllm_benchmarks.")[2]
    note = f" {result['note']}." if "note" in result else ""
    return f"`scripts/bench {command}` at {result['commit']} on {result['hardware']}.{note}"


def host_part(result: dict[str, Any]) -> str:
    figures = result["figures"]
    steps, served = figures["scheduler_us_per_step"], figures["through_triton"]
    counts = " / ".join(f"{int(n):,}" for n in steps)
    rows = [
        [f"scheduler, a step at {counts} running sequences", f"{slashed(steps.values())} us"],
        ["the shipped model, offline", f"{figures['offline_tokens_per_s']:,} tokens/s"],
        [
            "the same through Triton, gRPC streams",
            f"{served['tokens_per_s']:,} tokens/s, {served['share_of_offline']:.0%} of offline",
        ],
    ]
    for kind in ("one token a response", "coalesced"):
        runs = {n: r for n, r in figures["instant_engine"].items() if n.endswith(kind)}
        names = " / ".join(name.split()[0].removeprefix("F=") for name in runs)
        speeds = slashed(run["tokens_per_s"] for run in runs.values())
        what = f"an engine that answers at once, {kind}, {names} front ends"
        rows.append([what, f"{speeds} tokens/s"])
    closing = "Single runs differ by about a tenth."
    return "\n\n".join([source(result), "\n".join(table_lines(["", ""], rows)), closing])


def slashed(values: Any) -> str:
    return " / ".join(f"{value:,.0f}" for value in values)


def offline_part(model: str, results: Results) -> str:
    """One table a model: what each engine makes of each workload, and how they compare."""
    result = results[f"offline-{model}"]
    engines: dict[str, dict[str, Any]] = result["figures"]
    first = next(iter(engines.values()))
    rows = []
    for name, run in first.items():
        if isinstance(run, dict) and "seconds" in run:
            told = [speed(name, figures[name]) for figures in engines.values()]
            rows.append([f"`{name}`: {sizes(name)}", *told, ratio(engines, name)])
    starts = [f"{figures['start_s']:.1f} s" for figures in engines.values()]
    rows.append(["start", *starts, ratio(engines, None)])
    versions = [f"{e} {f.get('version', '')}".strip() for e, f in engines.items()]
    header = ["workload", *versions]
    if len(engines) == 2:
        header.append("ours is faster by")
    lines = table_lines(header, [row[: len(header)] for row in rows])
    title = f"**{model}, offline**, random weights, every request queued at once."
    return "\n\n".join([f"{title} {source(result)}", "\n".join(lines)])


def sizes(name: str) -> str:
    pairs = lengths(name)
    if len(set(pairs)) == 1:
        (prompt_len, output_len), count = pairs[0], len(pairs)
        return f"{count:,} x {prompt_len:,} tokens in, {output_len:,} out"
    totals = (sum(column) for column in zip(*pairs, strict=True))
    tokens_in, tokens_out = (f"{round(total, -3) // 1000:,}k" for total in totals)
    return f"{len(pairs):,} requests, {tokens_in} tokens in, {tokens_out} out"


def speed(name: str, run: dict[str, Any]) -> str:
    """In the unit that matters for a workload: latency, prefill or output."""
    pairs = lengths(name)
    seconds = run["seconds"]
    tokens_in = sum(prompt_len for prompt_len, _ in pairs)
    if name.startswith("lat"):
        return f"{1000 * seconds / pairs[0][1]:.2f} ms a token"
    if tokens_in > 10 * run["tokens"]:
        return f"{(tokens_in + run['tokens']) / seconds:,.0f} tokens/s, prompts included"
    return f"{run['tokens'] / seconds:,.0f} output tokens/s"


def ratio(engines: dict[str, dict[str, Any]], name: str | None) -> str:
    """The second engine's time by the first's; `name`: of a workload, None: to start."""
    times = [f["start_s"] if name is None else f[name]["seconds"] for f in engines.values()]
    return f"{times[1] / times[0]:.2f}" if len(times) == 2 else ""


def start_part(model: str, results: Results) -> str:
    """A sentence: seconds of each start, in order."""
    result = results[f"start-{model}"]
    figures = result["figures"]
    times = ", ".join(f"{seconds:.1f}" for seconds in figures["start_s"])
    size = f"{figures['checkpoint_gb']:.1f} GB of weights"
    return f"**{model}, cold starts** one after the other, {size}: {times} s. {source(result)}"


def serve_part(model: str, results: Results) -> str:
    result = results[f"serve-{model}"]
    figures = result["figures"]
    rows = []
    for name, run in figures["runs"].items():
        row = [name, f"{run['output_tokens_per_s']:,.0f}"]
        for key in ("ttft_ms", "tpot_ms"):
            row.append(slashed(run[key][p] for p in ("p50", "p99")) if run[key] else "")
        good = run.get("goodput")
        row.append(f"{good['requests_per_s']:.2f}/s, {good['share']:.0%}" if good else "")
        rows.append([*row, str(run["failed"])])
    header = ["load", "output tokens/s", "TTFT p50 / p99, ms", "TPOT p50 / p99, ms"]
    lines = table_lines([*header, "within the SLO", "failed"], rows)
    parts = [f"**{model}, through tritonserver by gRPC.** {source(result)}", "\n".join(lines)]
    share = share_of_offline(model, results)
    if share is not None:
        parts.append(f"All at once, that is {share:.1%} of what the engine does offline.")
    if (RESULTS / f"serve-{model}.svg").is_file():
        parts.append(f"![latency by throughput](benchmarks/results/serve-{model}.svg)")
    return "\n\n".join(parts)


def share_of_offline(model: str, results: Results) -> float | None:
    """How much of the offline speed comes through the server, where both did the same work."""
    served = results[f"serve-{model}"]["figures"]
    alone = results.get(f"offline-{model}", {}).get("figures", {}).get("ours", {})
    run, same = served["runs"].get("all at once"), alone.get(served["workload"])
    if not run or not same or run["output_tokens"] != same["tokens"]:
        return None
    return float(same["seconds"] / run["seconds"])


def kernels_part(model: str, results: Results) -> str:
    """A row a kernel: microseconds at each size, and which share of the floor that is."""
    result = results[f"kernels-{model}"]
    by_kernel: dict[str, list[str]] = {}
    for about in result["figures"]["kernels"]:
        told = f"{about['size']}: {about['us']:,.0f} us, {about['share']:.0%}"
        by_kernel.setdefault(about["kernel"], []).append(told)
    rows = [[kernel, "; ".join(told)] for kernel, told in by_kernel.items()]
    title = f"**{model}, single kernels**, and how near each is to the least time the chip needs."
    lines = table_lines(["kernel", "size: time, share of the floor"], rows)
    return "\n\n".join([f"{title} {source(result)}", "\n".join(lines)])


def simulate_part(name: str, results: Results) -> str:
    """A row a load, a column a policy."""
    result = results[f"simulate-{name}"]
    policies = result["figures"]["policies"]
    rows = []
    for load in next(iter(policies.values())):
        cells = []
        for run in (runs[load] for runs in policies.values()):
            keys = [key for key in ("ttft_ms", "tpot_ms") if run[key]]
            times = (run[key][p] for key in keys for p in ("p50", "p99"))
            good = f", {run['goodput']['share']:.0%}" if "goodput" in run else ""
            cells.append(slashed(times) + good)
        rows.append([load, *cells])
    title = (
        f"**{name}.** The scheduler is the real one, the stages are cost models: nothing of this"
    )
    lines = table_lines(["load", *policies], rows)
    closing = (
        "TTFT p50 / p99 / TPOT p50 / p99 in ms, and the share of requests within the SLO. "
        "With NAME:TOKENS its steps have so many tokens at most, not 2,048 (or as --config says)."
    )
    return "\n\n".join([f"{title} was measured. {source(result)} {closing}", "\n".join(lines)])


def insert(readme: str, text: str) -> str:
    """The README with `text` between its markers. Raises ValueError where they are not there."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("README.md has lost a marker of scripts/bench report")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main() -> None:
    README.write_text(insert(README.read_text(), render(read_results())))


if __name__ == "__main__":
    main()
