"""Pipelines that nobody has yet: scripts/bench simulate --pp 4 --params 8e9 --kv-bytes 65536 ...

The scheduler and its policies are the real ones; in place of GPUs there is a cost for each stage,
and time is only counted. What stages cost comes from measured steps (--steps FILE), from a model's
config.json (--model DIR), or from numbers on the command line. A step passes through the stages in
order, each stage computes one step at a time, and between two of them its activations travel. The
host takes no time. The same seed gives the same figures.
"""

from __future__ import annotations

import argparse
import json
from collections import deque
from collections.abc import Callable
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from gllm_benchmarks.load import Record
from gllm_benchmarks.offline import parse_pairs

from gllm_benchmarks.plot import draw_policies
from gllm_benchmarks.record import RESULTS, add_arguments, print_table, record
from gllm_benchmarks.serve import numbers, parse_slo, summarize
from gllm_benchmarks.workloads import Lengths, at_rate, lengths, poisson, read_azure
from gllm_engine import (
    POLICIES,
    Budget,
    CostModel,
    EngineConfig,
    Fit,
    Policy,
    SamplingParams,
    Scheduler,
    Sequence,
    StepPlan,
    StepResult,
    Work,
    read_spec,
)

Cost = Callable[[Work], float]  # seconds

# Sarathi-Serve as pipelines run it: the first step takes all decodes that have no token in flight.
# chunked_prefill itself takes the others too, which only one device can compute without waiting.
BASELINES: dict[str, Policy] = {
    "sarathi": lambda load: Budget(load.num_decoding, load.max_tokens, decode_seconds=inf)
}
GOOD_SHARE = 0.9  # of requests within the SLO, for a rate to count as served
DEFAULTS: dict[str, Any] = {
    "max_num_seqs": 1024,
    "max_num_batched_tokens": 2048,
    "num_pages": 65_536,
    "enable_prefix_caching": False,
}


class Roofline(NamedTuple):
    """Seconds of a part of a model by what memory and arithmetic need at least."""

    bandwidth: float  # bytes/s that are reached
    flops: float  # per second that are reached
    params: float  # stored
    active: float  # of these, used for one token
    param_bytes: float = 2.0
    kv_bytes: float = 0.0  # of one token
    pair_flops: float = 0.0  # for one token that attends to one
    step: float = 0.0

    def seconds(self, work: Work) -> float:
        """Weights are read while they are used; attention comes after."""
        read = min(self.params, self.active * work.tokens) * self.param_bytes / self.bandwidth
        weights = max(read, 2 * self.active * work.tokens / self.flops)
        attention = self.kv_bytes * work.kv / self.bandwidth
        return self.step + weights + attention + self.pair_flops * work.context / self.flops


class Pipeline:
    """Stages in a row, first come first served; all of a step's times are known at its launch.

    `head`: what the last stage does besides, for rows that sample. `travel`: from one stage to the
    next, in seconds; it keeps no stage busy. A decode row waits for the token that it computes.
    """

    def __init__(self, stages: list[Cost], head: Cost, travel: Cost) -> None:
        self.busy = [0.0] * len(stages)
        self._stages, self._head, self._travel = stages, head, travel
        self._free = [0.0] * len(stages)
        self._lengths: dict[int, int] = {}  # by slot, of what is computed
        self._sampled: dict[int, float] = {}  # by slot, when its last token is known

    def launch(self, plan: StepPlan, now: float) -> tuple[float, StepResult]:
        """When the step ends, and its result."""
        work = self._work(plan)
        slots = plan.decode_slots + [chunk.slot for chunk in plan.chunks if chunk.samples]
        head = self._head(Work(len(slots), 0, 0, len(slots))) if slots else 0.0
        at, travel = max([now, *(self._sampled[s] for s in plan.decode_slots)]), self._travel(work)
        for i, cost in enumerate(self._stages):
            is_last = i + 1 == len(self._stages)
            seconds = cost(work) + (head if is_last else 0.0)
            self._free[i] = max(at, self._free[i]) + seconds
            self.busy[i] += seconds
            at = self._free[i] + (0.0 if is_last else travel)
        self._sampled.update(dict.fromkeys(slots, at))
        return at, StepResult(plan.step, [0] * len(slots), seconds=seconds)

    def _work(self, plan: StepPlan) -> Work:
        lengths, context = self._lengths, 0
        for slot in plan.decode_slots:
            lengths[slot] += 1
            context += lengths[slot]
        kv, tokens = context, len(plan.decode_slots)
        for chunk in plan.chunks:
            count = len(chunk.tokens)
            tokens += count
            context += count * chunk.start + count * (count + 1) // 2
            kv += chunk.start + count
            lengths[chunk.slot] = chunk.start + count
        return Work(tokens, context, kv, len(plan.decode_slots) + len(plan.chunks))


class Run(NamedTuple):
    records: list[Record]
    idle: list[float]  # share of the time from the first arrival to the last token, by stage
    steps: int
    preemptions: int


def simulate(
    config: EngineConfig,
    policy: Policy,
    pipeline: Pipeline,
    pairs: Lengths,
    arrivals: list[float],
) -> Run:
    """The engine's loop, in simulated time. Every request's output has its full length."""
    assert config.num_pages is not None
    scheduler = Scheduler(config, config.num_pages, max(map(sum, pairs)) + 1, (), policy)
    times: list[list[float]] = [[] for _ in pairs]
    flights: deque[tuple[float, StepResult]] = deque()
    now, arrived = 0.0, 0
    while True:
        while arrived < len(pairs) and arrivals[arrived] <= now:
            prompt_len, output_len = pairs[arrived]
            sampling = SamplingParams(max_tokens=output_len, ignore_eos=True)
            scheduler.add(Sequence(arrived, [0] * prompt_len, sampling, seed=0))
            arrived += 1
        plan = scheduler.schedule() if len(flights) < config.plans_in_flight else None
        if plan is not None:
            flights.append(pipeline.launch(plan, now))
        if flights and (plan is None or len(flights) == config.plans_in_flight):
            end, result = flights.popleft()
            now = max(now, end)
            for sequence, _ in scheduler.commit(result).tokens:
                times[sequence.key].append(now)
        elif plan is None:
            if arrived == len(pairs):
                break
            now = arrivals[arrived]
    records = [
        Record(due, due, at, [1] * len(at), pair[1], None)
        for due, at, pair in zip(arrivals, times, pairs, strict=True)
    ]
    stats = scheduler.stats()
    idle = [1 - busy / (now - arrivals[0] or 1.0) for busy in pipeline.busy]
    return Run(records, idle, stats.steps, stats.preemptions)


def read_cost(about: Any) -> Cost:
    """Of one stage: a CostModel's coefficients, or measured steps that it is fitted to.

    `about`: an object {"step": ..., "token": ...}, or a list of objects with the counts of Work
    and "seconds". Raises ValueError for anything else.
    """
    try:
        if isinstance(about, dict):
            return CostModel(**about).seconds
        fit = Fit()
        for each in about:
            fit.observe(Work(*(each[key] for key in Work._fields)), each["seconds"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"neither coefficients nor measured steps: {error!r}") from None
    return fit.model.seconds


def make_stages(arguments: argparse.Namespace) -> tuple[list[Cost], Cost]:
    """The cost of each stage, and of the head."""
    pp, gpus = arguments.pp, arguments.gpus_per_stage
    if arguments.steps:
        about = json.loads(arguments.steps.read_text())
        parts = about if isinstance(about, dict) and "stage" in about else {"stage": about}
        head = read_cost(parts["head"]) if "head" in parts else lambda work: 0.0
        return [read_cost(parts["stage"])] * pp, head
    chip = partial(Roofline, arguments.bandwidth * gpus, arguments.flops * gpus)
    if arguments.model:
        spec = read_spec(arguments.model)
        inside = spec.num_params() - spec.vocab * spec.dim * (1 if spec.tie else 2)
        heads = [layer.mixer.heads * layer.mixer.head_dim for layer in spec.layers]
        params = active = inside / pp
        kv_bytes, pair_flops = spec.kv_bytes_per_token(2) / pp, 4 * sum(heads) / pp
        head_params = spec.vocab * spec.dim
    else:
        active, params = arguments.active or arguments.params, arguments.params
        kv_bytes, pair_flops = arguments.kv_bytes, arguments.pair_flops
        head_params = arguments.head_params
    size, step = arguments.param_bytes, arguments.overhead
    stage = chip(params, active, size, kv_bytes, pair_flops, step)
    return [stage.seconds] * pp, chip(head_params, head_params).seconds


def served_rate(runs: dict[str, dict[str, Any]]) -> float | None:
    """The highest rate at which, as at all lower ones, GOOD_SHARE of requests meet the SLO."""
    best = None
    for run in sorted(runs.values(), key=lambda run: run["rate"]):
        if run["goodput"]["share"] < GOOD_SHARE:
            break
        best = run["rate"]
    return best


def print_runs(title: str, found: dict[str, dict[str, dict[str, Any]]]) -> None:
    header = ["policy", "load", "out tok/s"]
    header += [f"{name} {p}" for name in ("TTFT", "TPOT", "E2E") for p in ("p50", "p99")]
    rows = []
    for policy, load, run in [(p, n, r) for p, runs in found.items() for n, r in runs.items()]:
        row = [policy, load, f"{run['output_tokens_per_s']:,.0f}"]
        for key in ("ttft_ms", "tpot_ms", "e2e_ms"):
            row += [f"{run[key][p]:,.0f}" if run[key] else "" for p in ("p50", "p99")]
        row.append(f"{run['goodput']['share']:.1%}" if "goodput" in run else "")
        rows.append([*row, " ".join(f"{share:.0%}" for share in run["idle"]), run["preemptions"]])
    header += ["within the SLO", "stages idle", "preempted"]
    print_table(f"{title}; times in ms", header, rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench simulate", description=__doc__)
    add = parser.add_argument
    add("--pp", type=int, default=4, help="stages; one step more than that is in flight")
    add("--steps", type=Path, help="a JSON file: coefficients or measured steps of a stage, or "
        '{"stage": either, "head": either}')  # fmt: skip
    add("--model", type=Path, help="a directory with a config.json, cut into equal stages")
    add("--params", type=float, help="of a stage, all its GPUs together")
    add("--active", type=float, help="of these, for one token; default: all")
    add("--param-bytes", type=float, default=2.0)
    add("--kv-bytes", type=float, default=0.0, help="K and V of one token in a stage")
    add("--pair-flops", type=float, default=0.0, help="for a token that attends to one, a stage")
    add("--head-params", type=float, default=0.0)
    add("--overhead", type=float, default=0.0, help="seconds of a stage in every step")
    add("--gpus-per-stage", type=int, default=1)
    add("--bandwidth", type=float, default=4.3e12, help="bytes/s that a GPU reaches")
    add("--flops", type=float, default=6.5e14, help="a second that a GPU reaches")
    add("--activation-bytes", type=float, default=0.0, help="of a token, between stages")
    add("--link", type=float, default=5e10, help="bytes/s between stages")
    add("--latency", type=float, default=20e-6, help="seconds between stages")
    add("--policies", default="sarathi,token_throttling,cost_throttling",
        help=", ".join([*BASELINES, *POLICIES]))  # fmt: skip
    add("--config", action="append", default=[], metavar="KEY=VALUE")
    add("--workload", default="share", help="of workloads.py; fixed:COUNT:IN:OUT")
    add("--trace", type=Path, help="an Azure CSV file, in place of a workload")
    add("--limit", type=int, help="only so many requests")
    add("--rate", type=numbers(float), default=[], help="requests/s; default: all at once")
    add("--seed", type=int, default=0, help="of the arrivals")
    add("--slo", type=parse_slo, default={}, help="such as ttft=2,tpot=0.1")
    add("--name", default="simulate", help="of the result: simulate-NAME")
    add("--plot", type=Path, help="an SVG file; with --save also in results")
    add_arguments(parser)
    arguments = parser.parse_args()
    unknown = set(arguments.policies.split(",")) - {*BASELINES, *POLICIES}
    if unknown:
        parser.error(f"--policies: {', '.join(unknown)} is none of {[*BASELINES, *POLICIES]}")
    if not (arguments.steps or arguments.model or arguments.params):
        parser.error("no costs: give --steps, --model or --params")
    return arguments


def sweep(
    arguments: argparse.Namespace, recorded: list[float], pairs: Lengths
) -> dict[str, dict[str, dict[str, Any]]]:
    """By policy and load, what summarize makes of the run, and a little more."""
    stages, head = make_stages(arguments)
    values = DEFAULTS | {"plans_in_flight": arguments.pp + 1, "max_waiting": len(pairs)}
    values |= parse_pairs(arguments.config)

    def travel(work: Work) -> float:
        return arguments.latency + work.tokens * arguments.activation_bytes / arguments.link

    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in arguments.policies.split(","):
        found[name] = {}
        policy = BASELINES.get(name) or POLICIES[name]
        for rate in arguments.rate or [None]:
            arrivals = [0.0] * len(pairs)
            if rate is not None and recorded:
                arrivals = at_rate(recorded, rate)
            elif rate is not None:
                arrivals = poisson(len(pairs), rate, arguments.seed)
            pipeline = Pipeline(stages, head, travel)
            config = EngineConfig(model=".", **values)
            run = simulate(config, policy, pipeline, pairs, arrivals)
            figures = summarize(run.records, arguments.slo) | run._asdict() | {"rate": rate}
            del figures["records"]
            found[name]["all at once" if rate is None else f"{rate:g} requests/s"] = figures
    return found


def main() -> None:
    arguments = parse_arguments()
    recorded: list[float] = []
    if arguments.trace:
        recorded, pairs = read_azure(arguments.trace, arguments.limit)
    else:
        pairs = lengths(arguments.workload)[: arguments.limit]
    found = sweep(arguments, recorded, pairs)
    workload = arguments.trace.name if arguments.trace else arguments.workload
    title = f"{len(pairs)} requests of {workload}, {arguments.pp} stages, simulated"
    print_runs(title, found)
    name = f"simulate-{arguments.name}"
    figures: dict[str, Any] = {"simulated": True, "workload": workload, "policies": found}
    if arguments.slo and arguments.rate:
        best = {policy: served_rate(runs) for policy, runs in found.items()}
        figures["served_rate"] = best
        limits = f"{GOOD_SHARE:.0%} within {arguments.slo}"
        print_table(
            f"the highest of these rates with {limits}",
            ["policy", "requests/s"],
            [[policy, rate or "none"] for policy, rate in best.items()],
        )
        plots = [arguments.plot] if arguments.plot else []
        plots += [RESULTS / f"{name}.svg"] if arguments.save else []
        for path in plots:
            by_policy = {policy: list(runs.values()) for policy, runs in found.items()}
            path.write_text(draw_policies(title, by_policy))
    record(name, figures, arguments.save)


if __name__ == "__main__":
    main()
