"""Measures a served model under load: scripts/bench serve --start MODEL --rate 2,4,8.

Several client processes send the requests of a workload (or of an Azure trace) to tritonserver over
gRPC, or to any OpenAI server (--openai), as token ids; every output has its full length. Requests
arrive all at once, in a closed loop, as a Poisson process (independent users), or at the times of
the trace. Every time is measured at the client, from the request's due time, even if the client
sent it later.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gllm_benchmarks.load import RequestRecord, run_load
from gllm_benchmarks.offline import OURS, model_directory, parse_pairs, print_summary
from gllm_benchmarks.offline import summarize as median_run
from gllm_benchmarks.openai_api import PATHS
from gllm_benchmarks.plot import draw, draw_policies
from gllm_benchmarks.rates import Runs, search, served_rate
from gllm_benchmarks.record import Figures, make_parser, number, print_table, record, rounded, told
from gllm_benchmarks.served_model import MODEL, cpu_seconds, read_vocab, server
from gllm_benchmarks.workloads import (
    Lengths,
    at_rate,
    make_jobs,
    poisson,
    read_load,
    warm_up,
    with_images,
)

PERCENTILES = (50, 90, 99)
# Seconds per request: first token, mean of later tokens, gap between responses, last token.
TIMES = ("ttft", "tpot", "itl", "e2e")
LIMITED = ("ttft", "tpot", "e2e")  # times that an SLO may limit


Arrivals = list[float] | int  # seconds from the start for each, or the number of concurrent ones


def times_of(one: RequestRecord) -> dict[str, list[float]]:
    """Name in TIMES -> the values of one complete request, in seconds."""
    first = one.times[0]
    last = one.times[-1]
    later = one.wanted - 1
    return {
        "ttft": [first - one.due],
        "tpot": [(last - first) / later] if later else [],
        "itl": np.diff(one.times).tolist(),
        "e2e": [last - one.due],
    }


def meets(slo: dict[str, float], one: RequestRecord) -> bool:
    """Whether a request is complete and within every limit. A time without a value is within it."""
    return one.is_complete and all(max(times_of(one)[name], default=0) <= slo[name] for name in slo)


def summarize(records: list[RequestRecord], slo: dict[str, float]) -> Figures:
    """The figures of a run's records; times are in milliseconds."""
    complete = [one for one in records if one.is_complete]
    failed = [one for one in records if not one.is_complete]
    begin = min(r.due for r in records)  # a client that is late does not shorten the run
    end = max([0.0, *(t for r in records for t in r.times)])
    seconds = max(end - begin, 1e-9)
    tokens = sum(sum(r.tokens) for r in records)
    num_responses = sum(len(r.times) for r in records)
    figures: Figures = {
        "seconds": seconds,
        "requests": len(records),
        "completed": len(complete),
        "failed": len(failed),
        "first_failure": failed[0].error or "tokens are missing" if failed else None,
        "output_tokens": tokens,
        "output_tokens_per_s": tokens / seconds,
        "requests_per_s": len(complete) / seconds,
        "tokens_per_response": tokens / max(num_responses, 1),
        # The largest delay of sending. Above some milliseconds, the clients limited the results.
        "client_lag_ms": 1000 * max(one.sent - one.due for one in records),
    }
    found = [times_of(one) for one in complete]
    for name in TIMES:
        figures[f"{name}_ms"] = distribution([value for each in found for value in each[name]])
    if slo:
        good = sum(meets(slo, one) for one in records)
        speed = good / seconds
        figures["goodput"] = {"slo": slo, "share": good / len(records), "requests_per_s": speed}
    return figures


def distribution(values: list[float]) -> dict[str, float] | None:
    """Mean and percentiles in milliseconds of values in seconds; None without values."""
    if not values:
        return None
    points = np.percentile(values, PERCENTILES) * 1000
    named = zip(PERCENTILES, points.tolist(), strict=True)
    return {"mean": float(np.mean(values)) * 1000} | {f"p{p}": value for p, value in named}


def parse_slo(text: str) -> dict[str, float]:
    """Parse limits in seconds such as ttft=2,tpot=0.1. Raises ArgumentTypeError."""
    slo = {}
    seconds = number(float, 0, 1e6)
    for pair in text.split(","):
        name, _, limit = pair.partition("=")
        try:
            slo[name] = seconds(limit)
        except ArgumentTypeError as error:
            raise ArgumentTypeError(f"{pair[:60]!r} is not NAME=SECONDS ({error})") from None
        if name not in LIMITED:
            raise ArgumentTypeError(f"{name!r} is none of {', '.join(LIMITED)}")
    return slo


def patterns(arguments: Namespace, recorded: list[float], count: int) -> dict[str, Arrivals]:
    """Name -> arrivals of each requested run. `recorded`: the trace's arrivals, if any."""
    found: dict[str, list[float]] = {}
    if arguments.all:
        found["all at once"] = [0.0] * count
    for rate in arguments.rate:
        found[f"{rate:g} requests/s"] = (
            at_rate(recorded, rate) if recorded else poisson(count, rate, arguments.seed)
        )
    if recorded and not (found or arguments.concurrency):
        found["as recorded"] = recorded
    end = arguments.seconds or float("inf")
    early = {name: [at for at in arrivals if at <= end] for name, arrivals in found.items()}
    return {f"{n} at a time": n for n in arguments.concurrency} | early


def latencies(run: Figures, *keys: str) -> str:
    """The p50 and p99 of each of `keys` that the run has."""
    values = [run[key][p] for key in keys if run[key] for p in ("p50", "p99")]
    return " / ".join(f"{value:,.{int(value < 100)}f}" for value in values)


def goodput(run: Figures) -> str:
    good = run.get("goodput")
    return f"{good['requests_per_s']:.2f}/s, {good['share']:.0%}" if good else ""


Columns = dict[str, Callable[[Figures], Any]]  # header -> cell of a run
LOADS: Columns = {
    "output tokens/s": lambda run: f"{run['output_tokens_per_s']:,.0f}",
    "TTFT p50 / p99, ms": lambda run: latencies(run, "ttft_ms"),
    "TPOT p50 / p99, ms": lambda run: latencies(run, "tpot_ms"),
    "within the SLO": goodput,
    "failed": lambda run: run["failed"],
}
MORE = LOADS | {  # columns that are printed, but not in the docs
    "done": lambda run: run["completed"],
    "requests/s": lambda run: f"{run['requests_per_s']:.2f}",
    "tokens/response": lambda run: f"{run['tokens_per_response']:.1f}",
    "ITL p50 / p99, ms": lambda run: latencies(run, "itl_ms"),
    "e2e p50 / p99, ms": lambda run: latencies(run, "e2e_ms"),
    "CPU us/token": lambda run: rounded(run.get("cpu_us", "")),
}


def table(runs: Runs, columns: Columns = LOADS) -> tuple[list[str], list[list[Any]]]:
    """The header and one row per run."""
    rows = [[name, *(cell(run) for cell in columns.values())] for name, run in runs.items()]
    return ["load", *columns], rows


def print_runs(title: str, runs: Runs, columns: Columns = MORE) -> None:
    print_table(title, *table(runs, columns))


def parse_arguments(command: str = "serve", within: float | None = None) -> Namespace:
    """`within`: the default of --within."""
    parser = make_parser(command, __doc__)
    add_server_arguments(parser)
    add = parser.add_argument
    count = number(int, 1, 256)
    add("--concurrency", type=numbers(int, 1, 65536), default=[], help="under way at a time")
    add("--all", action="store_true", help="all requests at once")
    add("--repeat", type=count, default=1, help="runs of each; the median is told")
    add(
        "--timeline", type=Path, help="a file for a Chrome trace of the started server's last steps"
    )
    add("--within", type=number(float, 1e-3, 1), default=within, help="find the rate so exactly")
    add("--gateway", type=count, default=0, help="processes of gllm openai; it gets each load too")
    add("--vary", action="append", help="'KEY=VALUE ...', beside --config, of one sweep")
    add_load_arguments(parser)
    arguments = parser.parse_args()
    check_server_arguments(parser, arguments)
    is_whole = arguments.start and arguments.rate and arguments.slo
    if arguments.within and (arguments.all or arguments.concurrency or not is_whole):
        parser.error("--within: it needs --start, --rate and --slo, and no other load")
    if arguments.vary and not arguments.within:
        parser.error("--vary: it needs --within")
    if (arguments.timeline or arguments.gateway) and (arguments.within or not arguments.start):
        parser.error(
            "--timeline, --gateway: they are of a server to start, once; another one has the key "
            "timeline in model.json, and an OpenAI server is measured by --openai"
        )
    if not (arguments.all or arguments.rate or arguments.concurrency or arguments.trace):
        parser.error("no load: give --rate, --concurrency, --all or --trace")
    return arguments


def add_server_arguments(parser: ArgumentParser) -> Any:
    """Add the options that serve.py and prefix.py share; returns the group of the places."""
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--start", metavar="MODEL", help="start a server on a directory or a shape")
    where.add_argument("--address", help="gRPC address of a server that runs, with --model")
    where.add_argument("--openai", metavar="URL", help="any OpenAI server that runs, with --model")
    add = parser.add_argument
    add("--model", help="the model's name there")
    add("--api", choices=tuple(PATHS), help="of an OpenAI server; default: completions")
    add("--api-key-file", type=Path, help="holds the key of an OpenAI server")
    add("--vocab", type=number(int, 1, 2**24), default=1000, help="prompts are of ids below it")
    add("--front-ends", type=number(int, 1, 256), default=2, help="of a server to start")
    add("--config", action="append", default=[], metavar="KEY=VALUE")
    add("--clients", type=number(int, 1, 256), default=4, help="client processes")
    add("--timeout", type=number(float, 1, 1e6), default=900, help="seconds for one run")
    return where


def check_server_arguments(parser: ArgumentParser, arguments: Namespace) -> None:
    """End with a usage error for options that do not go together."""
    where = "--openai" if arguments.openai else "--address"
    if (arguments.openai or arguments.address) and not arguments.model:
        parser.error(f"{where}: --model is needed too")
    if not arguments.openai and (arguments.api or arguments.api_key_file):
        parser.error("--api, --api-key-file: they are of an OpenAI server, --openai")


def load_options(arguments: Namespace) -> dict[str, Any]:
    """The options of run_load that say how the load gets to the server."""
    api = (arguments.api or "completions") if arguments.openai else "grpc"
    return {
        "clients": arguments.clients,
        "timeout": arguments.timeout,
        "api": api,
        "key_file": arguments.api_key_file,
    }


def add_load_arguments(parser: ArgumentParser) -> None:
    """Add the load options that serve.py and simulate.py share."""
    add = parser.add_argument
    add("--workload", default="share", help="of workloads.py; image, fixed:COUNT:IN:OUT")
    add("--trace", type=Path, help="an Azure CSV file, in place of a workload")
    add("--limit", type=number(int, 1, 1e7), help="only so many requests")
    add("--rate", type=numbers(float, 1e-6, 1e6), default=[], help="requests/s, such as 2,4,8")
    add("--seconds", type=number(float, 0, 1e6), help="what comes later is left out")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of random arrivals")
    add("--slo", type=parse_slo, default={}, help="such as ttft=2,tpot=0.1")
    add("--share", type=number(float, 0, 1), default=0.9, help="of requests within the SLO")
    add("--plot", type=Path, help="an SVG file; with --save also in results")


def numbers(kind: Callable[[str], float], low: float, high: float) -> Callable[[str], list[Any]]:
    """An argparse type: numbers from `low` to `high`, separated by commas, such as 2,4,8."""
    parse = number(kind, low, high)
    return lambda text: [parse(each) for each in text.split(",")]


class Served(NamedTuple):
    """A model on a server. `metrics`: host:port of tritonserver's metrics, if they are known.

    `special`: its tokens that with_images takes. `openai`: host:port of its OpenAI
    server, if it has one.
    """

    address: str
    model: str
    vocab: int
    metrics: str | None = None
    special: dict[int, str] = {}
    openai: str | None = None


def our_config(path: Path, arguments: Namespace) -> dict[str, Any]:
    """Our engine's configuration: as in offline runs, but with the weights that are there."""
    config = dict(OURS)
    if any(path.glob("*.safetensors")):
        del config["load_format"]
    return config | parse_pairs(arguments.config)


@contextlib.contextmanager
def serving(arguments: Namespace, config: dict[str, Any], gateways: int = 0) -> Iterator[Served]:
    """The model that the arguments name. `config`: further keys of a model to start. `gateways`:
    processes of gllm openai, which is started too."""
    if not arguments.start:
        yield Served(arguments.openai or arguments.address, arguments.model, arguments.vocab)
        return
    path = model_directory(arguments.start)
    vocab, special = read_vocab(path)
    config = our_config(path, arguments) | config
    with server(path, arguments.front_ends, {}, config, gateways) as addresses:
        yield Served(addresses.grpc, MODEL, vocab, addresses.metrics, special, addresses.openai)


def measure(served: Served, arguments: Namespace, recorded: list[float], pairs: Lengths) -> Runs:
    """Warm a model up and send it the loads. `recorded`: the trace's arrivals, if any."""
    options = load_options(arguments)
    ways = {"": partial(run_load, served.address, served.model, **options)}
    if arguments.gateway:
        options["api"] = "completions"
        url = f"http://{served.openai}"
        ways[", gllm openai"] = partial(run_load, url, served.model, **options)
    seeds = itertools.count(1)  # new prompts each time, which no cache holds
    images = (arguments.workload, served.special)
    some = warm_up(with_images(make_jobs(pairs, served.vocab, seed=0), *images))
    for load in ways.values():
        load(some, len(some))

    def send(rates: list[float]) -> Runs:
        given = Namespace(**vars(arguments) | {"rate": rates})
        runs = {}
        loads = patterns(given, recorded, len(pairs)).items()
        for (name, arrivals), (way, load) in itertools.product(loads, ways.items()):
            found = []
            for _ in range(arguments.repeat):
                count = len(pairs) if isinstance(arrivals, int) else len(arrivals)
                jobs = make_jobs(pairs[:count], served.vocab, next(seeds))
                jobs = with_images(jobs, *images)
                before = cpu_seconds()
                figures = summarize(load(jobs, arrivals), arguments.slo)
                us = 1e6 / (figures["output_tokens"] or 1)
                spent = cpu_seconds() - before
                found.append(figures | {"cpu_us": {part: spent[part] * us for part in spent}})
            name += way
            runs[name] = median_run(found)
            print_runs(name, {name: runs[name]})
        return runs

    if not arguments.within:
        return send(arguments.rate)
    return search(send, arguments.rate, arguments.share, arguments.within)


def conclude(arguments: Namespace, name: str, title: str, figures: Figures) -> None:
    """Tell the highest rates of several policies, and record. `figures`: with "policies"."""
    found: dict[str, Runs] = figures["policies"]
    plot = None
    if arguments.slo and arguments.rate:
        figures |= {"share": arguments.share, "served_rate": {}, "runs": {}}
        for policy, runs in found.items():
            rate = served_rate(runs, arguments.share)
            figures["served_rate"][policy] = rate
            # Of a policy that serves no rate, its first run.
            load = next(load for load, run in runs.items() if rate in (None, run["rate"]))
            figures["runs"][f"{policy}, {load}"] = runs[load]
        told = f"the highest of these rates with {arguments.share:.0%} within {arguments.slo}"
        print_runs(told, figures["runs"])
        plot = partial(draw_policies, title, found)
    record(arguments, name, figures, draw=plot)


@told()
def main(arguments: Namespace) -> None:
    workload, recorded, pairs = read_load(arguments.workload, arguments.trace, arguments.limit)
    title = Path(arguments.start or arguments.model).name
    timeline = {"timeline": str(arguments.timeline.resolve())} if arguments.timeline else {}
    kind = "-sweep" if arguments.within else ""
    name = f"serve-{title}{kind}"
    figures: Figures = {"workload": workload, "api": load_options(arguments)["api"]}
    found = {}
    for way in arguments.vary or [title]:
        keys = parse_pairs(way.split()) if arguments.vary else timeline
        with serving(arguments, keys, arguments.gateway) as served:
            found[way] = runs = measure(served, arguments, recorded, pairs)
        print_runs(f"{way}, {len(pairs)} requests, {arguments.clients} clients", runs)
        if kind:  # after each, so that an interrupted sweep loses nothing
            conclude(arguments, name, f"{title}, {workload}", figures | {"policies": found})
    if kind:
        return
    if arguments.timeline:
        trace = json.loads(arguments.timeline.read_text())
        print_summary("timeline", trace["otherData"]["summary"])
    plot = partial(draw, title, [*runs.values()]) if arguments.plot or len(runs) > 1 else None
    record(arguments, name, figures | {"runs": runs}, draw=plot)
    if any(run["failed"] for run in runs.values()):
        raise SystemExit("requests have failed")


if __name__ == "__main__":
    main(parse_arguments())
