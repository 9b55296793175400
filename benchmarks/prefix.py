"""Measures what the prefix cache saves: scripts/bench prefix --offline MODEL --workload users.

Sends the same requests twice: first each with a cache_salt of its own, so that none finds another's
pages, then all with one. It tells the share of prompt tokens that came from the cache, the share
that a cache without limits would have held, and both times to first token. The model is an engine
in this process, a tritonserver (the hits are in its metrics) or any OpenAI server (in its usage).
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import uuid
from functools import partial
from pathlib import Path
from typing import Any

from gllm_benchmarks.load import RequestRecord, run_load
from gllm_benchmarks.offline import model_directory
from gllm_benchmarks.record import add_arguments, number, print_table, record
from gllm_benchmarks.reuse import TRACE_BLOCK, chats, ideal_rate, make_chats, read_mooncake
from gllm_benchmarks.serve import (
    Arrivals,
    Served,
    add_server_arguments,
    check_server_arguments,
    load_options,
    our_config,
    serving,
    summarize,
)
from gllm_benchmarks.workloads import Job, at_rate, poisson, warm_up
from gllm_client import read_metrics
from gllm_engine import IN_PROCESS, Engine, Request, SamplingParams, make_config

WITHOUT, WITH = "without the cache", "with the cache"
COUNTERS = ("gllm:prefix_cache_queries_total", "gllm:prefix_cache_hits_total")
METRICS_S = 30.0  # until what was done is in the metrics; it takes a tenth of a second


def run_offline(
    engine: Engine, jobs: list[Job], arrivals: Arrivals, salts: list[str]
) -> tuple[list[RequestRecord], int]:
    """As run_served, by an engine in this process."""
    begin = time.monotonic()
    records: list[RequestRecord] = []
    num_live = 0
    while len(records) < len(jobs) or engine.has_work:
        now = time.monotonic()
        while len(records) < len(jobs):
            id = len(records)
            due = begin + arrivals[id] if isinstance(arrivals, list) else now
            if due > now or (isinstance(arrivals, int) and num_live >= arrivals):
                break
            prompt, output_len = jobs[id]
            sampling = SamplingParams(max_tokens=output_len, ignore_eos=True, cache_salt=salts[id])
            engine.add(Request(id, prompt, sampling, id))
            records.append(RequestRecord(due, now, [], [], output_len, None))
            num_live += 1
        if not engine.has_work:
            time.sleep(max(due - now, 0))
            continue
        outputs = engine.step().get(IN_PROCESS)
        if outputs is None:
            continue
        now = time.monotonic()
        for id in outputs.ids:
            records[id].times.append(now)
            records[id].tokens.append(1)
        for id, finish in outputs.finished.items():
            num_live -= 1
            error = None if finish.reason == "length" else finish.message or finish.reason
            records[id] = records[id]._replace(error=error, cached=finish.num_cached_tokens)
    return records, sum(one.cached or 0 for one in records)


def read_counters(served: Served) -> list[float]:
    """COUNTERS of the served model: prompt tokens looked up and found."""
    assert served.metrics is not None
    samples = read_metrics(served.metrics).items()
    mine = f'model="{served.model}"'
    return [sum(v for name, v in samples if name.startswith(c) and mine in name) for c in COUNTERS]


def run_served(
    served: Served, options: dict[str, Any], jobs: list[Job], arrivals: Arrivals, salts: list[str]
) -> tuple[list[RequestRecord], float | None]:
    """The records of run_load, and the prompt tokens from the cache; None if the server is silent.

    Raises RuntimeError if the metrics do not tell of all requests.
    """
    before = read_counters(served) if served.metrics else []
    records = run_load(served.address, served.model, jobs, arrivals, salts=salts, **options)
    if not served.metrics:
        told = [one.cached for one in records if one.cached is not None]
        return records, sum(told) if told else None
    pairs = zip(jobs, records, strict=True)
    expected = sum(len(job.prompt) for job, one in pairs if one.is_complete)
    end = time.monotonic() + METRICS_S
    while True:
        looked_up, found = (b - a for a, b in zip(before, read_counters(served), strict=True))
        if looked_up >= expected:
            return records, found
        if time.monotonic() > end:
            raise RuntimeError(f"the metrics tell of {looked_up:g} of {expected} prompt tokens")
        time.sleep(0.05)


def compare(run: Any, jobs: list[Job], arrivals: Arrivals) -> dict[str, Any]:
    """The figures of both runs. `run`: jobs, arrivals and salts -> records and cached tokens."""
    unique = uuid.uuid4().hex  # what earlier runs left in a server's cache is of no use
    prompt_tokens = sum(len(job.prompt) for job in jobs)
    some = warm_up(jobs)
    run(some, len(some), [f"{unique}-warm-up"] * len(some))
    runs = {}
    for name, salts in (
        (WITHOUT, [f"{unique}-{i}" for i in range(len(jobs))]),
        (WITH, [unique] * len(jobs)),
    ):
        records, cached = run(jobs, arrivals, salts)
        runs[name] = summarize(records, {})
        runs[name]["hit_rate"] = None if cached is None else cached / prompt_tokens
    ideal = ideal_rate([job.prompt for job in jobs])
    return {"prompt_tokens": prompt_tokens, "ideal_hit_rate": ideal, "runs": runs}


def rows(figures: dict[str, Any]) -> list[list[Any]]:
    """One row for each run, and the ideal hit rate beside the second."""
    found = []
    for name, run in figures["runs"].items():
        rate = run["hit_rate"]
        told = "" if rate is None else f"{rate:.1%}"
        ideal = f"{figures['ideal_hit_rate']:.1%}" if name == WITH else ""
        times = [run[key][p] for key in ("ttft_ms", "e2e_ms") if run[key] for p in ("p50", "p99")]
        cells = [f"{time:,.1f}" for time in times] or [""] * 4
        speed = f"{run['output_tokens_per_s']:,.0f}"
        found.append([name, told, ideal, *cells, speed, run["failed"]])
    return found


HEADER = ["", "hit rate", "ideal", "TTFT p50, ms", "p99", "e2e p50, ms", "p99", "out tok/s"]
HEADER += ["failed"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench prefix", description=__doc__)
    where = add_server_arguments(parser)
    where.add_argument("--offline", metavar="MODEL", help="an engine in this process")
    add = parser.add_argument
    add("--metrics", help="host:port of the metrics of the server at --address")
    add("--workload", default="users", help="users, shared, or chats:... as in the documentation")
    add("--trace", type=Path, help="a Mooncake trace (JSON lines), in place of a workload")
    add("--block", type=number(int, 1, 512), default=TRACE_BLOCK, help="tokens of a trace's block")
    add("--limit", type=number(int, 1, 1e7), help="only so many requests")
    load = parser.add_mutually_exclusive_group()
    load.add_argument(
        "--rate", type=number(float, 1e-6, 1e6), help="requests/s; else a closed loop"
    )
    load.add_argument("--concurrency", type=number(int, 1, 65536), default=8, help="at a time")
    add("--name", help="of the result; default: prefix-MODEL")
    add_arguments(parser)
    arguments = parser.parse_args()
    check_server_arguments(parser, arguments)
    if bool(arguments.address) != bool(arguments.metrics):
        parser.error("--address and --metrics: one needs the other")
    return arguments


def make_work(arguments: argparse.Namespace, vocab: int) -> tuple[list[Job], Arrivals]:
    """The requests and their arrivals; those of a trace at --rate are the trace's own."""
    recorded: list[float] = []
    if arguments.trace:
        recorded, jobs = read_mooncake(arguments.trace, vocab, arguments.limit, arguments.block)
    else:
        jobs = make_chats(chats(arguments.workload), vocab)[: arguments.limit]
    if arguments.rate is None:
        return jobs, arguments.concurrency
    return jobs, at_rate(recorded, arguments.rate) if recorded else poisson(
        len(jobs), arguments.rate
    )


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    config: dict[str, Any] = {"enable_prefix_caching": True}
    if not arguments.offline:
        with serving(arguments, config) as served:
            jobs, arrivals = make_work(arguments, served.vocab)
            run = partial(run_served, served, load_options(arguments))
            return compare(run, jobs, arrivals)
    path = model_directory(arguments.offline)
    jobs, arrivals = make_work(
        arguments, json.loads((path / "config.json").read_text())["vocab_size"]
    )
    engine = Engine(make_config({"model": str(path)} | our_config(path, arguments) | config))
    try:
        return compare(partial(run_offline, engine), jobs, arrivals)
    finally:
        engine.close()


def main() -> None:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends a server too
    title = Path(arguments.offline or arguments.start or arguments.model).name
    workload = arguments.trace.name if arguments.trace else arguments.workload
    figures = {"workload": workload} | measure(arguments)
    print_table(f"{title}, {workload}", HEADER, rows(figures))
    record(arguments.name or f"prefix-{title}", figures, arguments.save)
    if any(run["failed"] for run in figures["runs"].values()):
        raise SystemExit("requests have failed")


if __name__ == "__main__":
    main()
