"""Measures what the prefix cache saves: scripts/bench prefix --offline MODEL.

Sends the same requests twice in a closed loop: first each with a cache_salt of its own, so that
none finds another's pages, then all with one. It tells the share of prompt tokens that came from
the cache, the share that a cache without limits would have held, and both times to first token. The
model is an engine in this process, a tritonserver (the hits are in its metrics) or any OpenAI
server (in its usage).
"""

from __future__ import annotations

import contextlib
import time
import uuid
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

from gllm_benchmarks.load import RequestRecord, run_load
from gllm_benchmarks.offline import model_directory
from gllm_benchmarks.record import Figures, make_parser, number, print_table, record, told
from gllm_benchmarks.reuse import TRACE_BLOCK, chats, ideal_rate, make_chats, read_mooncake
from gllm_benchmarks.serve import (
    Served,
    add_server_arguments,
    check_server_arguments,
    latencies,
    load_options,
    our_config,
    serving,
    summarize,
)
from gllm_benchmarks.served_model import metric_sums, read_vocab
from gllm_benchmarks.workloads import Job, warm_up
from gllm_engine import IN_PROCESS, Engine, Request, SamplingParams, make_config

DEFAULT = "chats:32:5:1:200:40:60"
WITH = "with the cache"
# Of all models on the server: prompt tokens looked up and found.
COUNTERS = [("gllm:prefix_cache_queries_total",), ("gllm:prefix_cache_hits_total",)]
NUM_LOOKS = 600  # each after 50 ms, until all is in the metrics; it takes a tenth of a second


def run_offline(
    engine: Engine, concurrency: int, jobs: list[Job], salts: list[str]
) -> tuple[list[RequestRecord], int]:
    """As run_served, by an engine in this process."""
    records: list[RequestRecord] = []
    num_live = 0
    hits = 0
    while len(records) < len(jobs) or num_live:
        now = time.monotonic()
        while len(records) < len(jobs) and num_live < concurrency:
            id = len(records)
            prompt, output_len, _ = jobs[id]
            sampling = SamplingParams(max_tokens=output_len, ignore_eos=True, cache_salt=salts[id])
            engine.add(Request(id, prompt, sampling, id))
            records.append(RequestRecord(now, now, [], [], output_len, None))
            num_live += 1
        outputs = engine.step().get(IN_PROCESS)
        if outputs is None:
            continue
        now = time.monotonic()
        hits += sum(outputs.num_cached_tokens.values())
        for id in outputs.ids:
            records[id].times.append(now)
            records[id].tokens.append(1)
        for id, finish in outputs.finished.items():
            num_live -= 1
            error = None if finish.reason == "length" else finish.message or finish.reason
            records[id] = records[id]._replace(error=error)
    return records, hits


def run_served(
    served: Served, concurrency: int, options: dict[str, Any], jobs: list[Job], salts: list[str]
) -> tuple[list[RequestRecord], float | None]:
    """The records of run_load, and the prompt tokens from the cache; None if the server is silent.

    Raises SystemExit if the metrics do not tell of all requests.
    """
    before = metric_sums(served.metrics, *COUNTERS) if served.metrics else []
    records = run_load(served.address, served.model, jobs, concurrency, salts=salts, **options)
    if not served.metrics:
        told = [one.cached for one in records if one.cached is not None]
        return records, sum(told) if told else None
    done = sum(len(jobs[i].prompt) for i, one in enumerate(records) if one.is_complete)
    for _ in range(NUM_LOOKS):
        after = metric_sums(served.metrics, *COUNTERS)
        looked_up, found = (b - a for a, b in zip(before, after, strict=True))
        if looked_up >= done:
            return records, found
        time.sleep(0.05)
    raise SystemExit(f"the metrics tell of {looked_up:g} of {done} prompt tokens")


def compare(run: Any, jobs: list[Job]) -> Figures:
    """The figures of both runs. `run`: jobs and salts -> records, and the tokens from the cache."""
    unique = uuid.uuid4().hex  # what earlier runs left in a server's cache is of no use
    prompt_tokens = sum(len(job.prompt) for job in jobs)
    some = warm_up(jobs)
    run(some, [f"{unique}-warm-up"] * len(some))
    runs = {}
    apart = [f"{unique}-{i}" for i in range(len(jobs))]
    for name, salts in (("without the cache", apart), (WITH, [unique] * len(jobs))):
        records, cached = run(jobs, salts)
        rate = None if cached is None else cached / prompt_tokens
        runs[name] = summarize(records, {}) | {"hit_rate": rate}
    return {
        "prompt_tokens": prompt_tokens,
        "ideal_hit_rate": ideal_rate([job.prompt for job in jobs]),
        "runs": runs,
    }


def rows(figures: Figures) -> list[list[Any]]:
    """One row for each run, and the ideal hit rate beside the second."""
    found = []
    for name, run in figures["runs"].items():
        rate = run["hit_rate"]
        told = "" if rate is None else f"{rate:.1%}"
        ideal = f"{figures['ideal_hit_rate']:.1%}" if name == WITH else ""
        found.append([name, told, ideal, latencies(run, "ttft_ms"), run["failed"]])
    return found


HEADER = ["", "hit rate", "ideal", "TTFT p50 / p99, ms", "failed"]


def parse_arguments() -> Namespace:
    parser = make_parser("prefix", __doc__)
    where = add_server_arguments(parser)
    where.add_argument("--offline", metavar="MODEL", help="an engine in this process")
    add = parser.add_argument
    add("--metrics", help="host:port of a running tritonserver's metrics, which tell the hits")
    add("--workload", default=DEFAULT, help="chats:USERS:ROUNDS:SYSTEMS:SYSTEM:QUESTION:ANSWER")
    add("--trace", type=Path, help="a Mooncake trace (JSON lines), in place of a workload")
    add("--block", type=number(int, 16, 512), default=TRACE_BLOCK, help="tokens of a hash id")
    add("--limit", type=number(int, 1, 1e7), help="only so many requests")
    add("--concurrency", type=number(int, 1, 65536), default=8, help="requests at a time")
    arguments = parser.parse_args()
    check_server_arguments(parser, arguments)
    return arguments


def make_work(arguments: Namespace, vocab: int) -> list[Job]:
    if arguments.trace:
        return read_mooncake(arguments.trace, vocab, arguments.limit, arguments.block)
    return make_chats(chats(arguments.workload), vocab)[: arguments.limit]


def measure(arguments: Namespace) -> Figures:
    config = {"enable_prefix_caching": True}
    if not arguments.offline:
        with serving(arguments, config) as served:
            served = served._replace(metrics=arguments.metrics or served.metrics)
            run = partial(run_served, served, arguments.concurrency, load_options(arguments))
            return compare(run, make_work(arguments, served.vocab))
    path = model_directory(arguments.offline)
    settings = {"model": str(path)} | our_config(path, arguments) | config
    jobs = make_work(arguments, read_vocab(path)[0])
    with told(ValueError):  # of the configuration or the checkpoint
        engine = Engine(make_config(settings))
    with contextlib.closing(engine):
        return compare(partial(run_offline, engine, arguments.concurrency), jobs)


@told()
def main() -> None:
    arguments = parse_arguments()
    title = Path(arguments.offline or arguments.start or arguments.model).name
    workload = arguments.trace.name if arguments.trace else arguments.workload
    figures = {"workload": workload} | measure(arguments)
    print_table(f"{title}, {workload}", HEADER, rows(figures))
    record(arguments, f"prefix-{title}", figures)
    if any(run["failed"] for run in figures["runs"].values()):
        raise SystemExit("requests have failed")


if __name__ == "__main__":
    main()
