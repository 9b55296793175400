"""Simulates pipelines without GPUs: scripts/bench simulate --pp 4 --stage params=8e9 kv_bytes=65536

The scheduler and its policies are the real ones. A cost model for each stage replaces the GPUs, and
time is simulated. Costs come from measured steps (--steps FILE, as offline --timeline FILE writes
it), from a model's config.json (--model DIR), or from numbers (--stage: fields of Roofline). A step
passes through the stages in order, each stage computes one step at a time, and sending activations
to the next stage takes time. The host takes no time. Without --rate, requests arrive at the times
of the trace, or all at once. The same seed gives the same figures.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections import deque
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from gllm_benchmarks.load import RequestRecord
from gllm_benchmarks.measured_steps import Cost, fit_cost
from gllm_benchmarks.offline import parse_pairs
from gllm_benchmarks.rates import Runs
from gllm_benchmarks.record import make_parser, number, told
from gllm_benchmarks.serve import (
    MORE,
    add_load_arguments,
    conclude,
    patterns,
    print_runs,
    summarize,
)
from gllm_benchmarks.workloads import Lengths, read_load
from gllm_engine import (
    POLICIES,
    ConfigError,
    CostModel,
    EngineConfig,
    Policy,
    SamplingParams,
    Scheduler,
    Sequence,
    StepPlan,
    StepResult,
    Work,
    read_arch,
)

COLUMNS = MORE | {
    "stages idle": lambda run: " ".join(f"{share:.0%}" for share in run["idle"]),
    "preempted": lambda run: run["preemptions"],
}
DEFAULTS: dict[str, Any] = {
    "max_num_seqs": 1024,
    "max_num_batched_tokens": 2048,
    "num_pages": 65_536,
    "enable_prefix_caching": False,
}


class Roofline(NamedTuple):
    """Lower bound of the seconds of a part of a model, by memory and arithmetic."""

    bandwidth: float  # achieved bytes/s
    flops: float  # achieved operations/s
    params: float  # stored parameters
    active: float = inf  # parameters used for one token; at most `params` count
    param_bytes: float = 2.0
    kv_bytes: float = 0.0  # K and V of one token
    pair_flops: float = 0.0  # operations for one token to attend to one token
    step: float = 0.0
    launch: float = 0.0  # least seconds of a step with prompts, which the host launches by kernel

    def seconds(self, work: Work) -> float:
        """Seconds of a step. Reading weights overlaps with their use; attention does not."""
        used = min(self.params, self.active) * work.tokens
        read = min(self.params, used) * self.param_bytes / self.bandwidth
        weights = max(read, 2 * used / self.flops)
        attention = self.kv_bytes * work.kv / self.bandwidth
        whole = self.step + weights + attention + self.pair_flops * work.context / self.flops
        return max(whole, self.launch) if work.tokens > work.sequences else whole


class Pipeline:
    """Pipeline stages that serve steps in order; launch() computes all times of a step.

    `head`: the last stage's additional cost for rows that sample. `travel`: seconds from one stage
    to the next, which keep no stage busy. A decode row waits until its input token is sampled.
    """

    def __init__(self, stages: list[Cost], head: Cost, travel: Cost) -> None:
        self.busy = [0.0] * len(stages)
        self._stages = stages
        self._head = head
        self._travel = travel
        self._free = [0.0] * len(stages)
        self._lengths: dict[int, int] = {}  # slot -> number of computed tokens
        self._sampled: dict[int, float] = {}  # slot -> time at which its last token is known

    def launch(self, plan: StepPlan, now: float) -> tuple[float, StepResult]:
        """The time at which the step ends, and its result."""
        work = self._work(plan)
        slots = plan.decode_slots + [chunk.slot for chunk in plan.chunks if chunk.samples]
        head = self._head(Work(len(slots), 0, 0, len(slots))) if slots else 0.0
        at = max([now, *(self._sampled[s] for s in plan.decode_slots)])
        travel = self._travel(work)
        for i, cost in enumerate(self._stages):
            is_last = i + 1 == len(self._stages)
            seconds = cost(work) + (head if is_last else 0.0)
            self._free[i] = max(at, self._free[i]) + seconds
            self.busy[i] += seconds
            at = self._free[i] + (0.0 if is_last else travel)
        self._sampled.update(dict.fromkeys(slots, at))
        return at, StepResult(plan.step, [0] * len(slots), seconds=seconds)

    def _work(self, plan: StepPlan) -> Work:
        lengths = self._lengths
        context = 0
        count = len(plan.decode_slots)
        for slot in plan.decode_slots:
            lengths[slot] += 1
            context += lengths[slot]
        for chunk in plan.chunks:
            lengths[chunk.slot] = chunk.start + len(chunk.tokens)
        chunks = [Work.row(chunk.start, len(chunk.tokens)) for chunk in plan.chunks]
        return Work(count, context, context, count).plus(*chunks)


class Run(NamedTuple):
    records: list[RequestRecord]
    idle: list[float]  # each stage's idle share of the time from first arrival to last token
    steps: int
    preemptions: int


def simulate(
    config: EngineConfig, policy: Policy, pipeline: Pipeline, pairs: Lengths, arrivals: list[float]
) -> Run:
    """Run the engine's loop in simulated time. Every request's output has its full length."""
    assert config.num_pages is not None
    scheduler = Scheduler(config, config.num_pages, max(map(sum, pairs)) + 1, (), policy)
    times: list[list[float]] = [[] for _ in pairs]
    flights: deque[tuple[float, StepResult]] = deque()
    now = 0.0
    arrived = 0
    while True:
        while arrived < len(pairs) and arrivals[arrived] <= now:
            prompt_len, output_len = pairs[arrived]
            sampling = SamplingParams(max_tokens=output_len, ignore_eos=True)
            scheduler.add(Sequence((b"", arrived), [0] * prompt_len, sampling, seed=0))
            arrived += 1
        plan = scheduler.schedule() if len(flights) < config.plans_in_flight else None
        if plan is not None:
            flights.append(pipeline.launch(plan, now))
        if flights and (plan is None or len(flights) == config.plans_in_flight):
            end, result = flights.popleft()
            now = max(now, end)
            for sequence, _ in scheduler.commit(result).tokens:
                times[sequence.key[1]].append(now)
        elif plan is None:
            if arrived == len(pairs):
                break
            now = arrivals[arrived]
    records = [
        RequestRecord(due, due, at, [1] * len(at), pair[1], None)
        for due, at, pair in zip(arrivals, times, pairs, strict=True)
    ]
    stats = scheduler.stats()
    idle = [1 - busy / (now - arrivals[0] or 1.0) for busy in pipeline.busy]
    return Run(records, idle, stats.steps, stats.preemptions)


def read_costs(trace: Any, stages: int) -> list[Cost]:
    """The costs of `stages` stages by the steps in a timeline; the last one's is with the head.

    The steps of a single stage stand for those of each. Raises ValueError for anything else.
    """
    try:
        found = [
            fit_cost([(Work(*work), seconds) for work, seconds in steps])
            for steps in trace["otherData"]["steps"]
        ]
    except (TypeError, KeyError) as error:
        raise ValueError(f"it is no timeline of an engine: {error!r}") from None
    if len(found) not in (1, stages):
        raise ValueError(f"the timeline is of {len(found)} stages, --pp says {stages}")
    return found * (stages // len(found))


def make_costs(arguments: Namespace) -> tuple[list[Cost], Cost]:
    """The costs of the stages and of the head."""
    if arguments.steps:
        found = read_costs(json.loads(arguments.steps.read_text()), arguments.pp)
        return found, CostModel(0.0).seconds
    gpus = arguments.gpus_per_stage
    chip = {"bandwidth": arguments.bandwidth * gpus, "flops": arguments.flops * gpus}
    stage = parse_pairs(arguments.stage)
    head = {"params": 0.0}
    if arguments.model:
        arch = read_arch(arguments.model)
        pp = arguments.pp
        size = arch.vocab * arch.dim
        width = sum(layer.mixer.heads * layer.mixer.head_dim for layer in arch.layers)
        found = {"params": (arch.num_params() - size * (1 if arch.tie else 2)) / pp}
        found |= {"kv_bytes": arch.kv_bytes_per_token(2) / pp, "pair_flops": 4 * width / pp}
        stage = found | stage
        head = {"params": size}
    head |= parse_pairs(arguments.head)
    return [Roofline(**chip, **stage).seconds] * arguments.pp, Roofline(**chip, **head).seconds


def parse_arguments() -> Namespace:
    parser = make_parser("simulate", __doc__)
    add = parser.add_argument
    add("--pp", type=number(int, 1, 64), default=4, help="stages; one step more is in flight")
    add("--steps", type=Path, help="a timeline of as many stages, or of one that stands for each")
    add("--model", type=Path, help="a directory with a config.json, cut into equal stages")
    pairs: dict[str, Any] = {"nargs": "+", "default": [], "metavar": "KEY=VALUE"}
    add("--stage", **pairs, help=f"numbers of a stage: {', '.join(Roofline._fields[2:])}")
    add("--head", **pairs, help="of what the last stage does besides, for rows that sample")
    speed = number(float, 1, 1e30)
    add("--gpus-per-stage", type=number(int, 1, 64), default=1)
    add("--bandwidth", type=speed, default=4.3e12, help="bytes/s that a GPU reaches")
    add("--flops", type=speed, default=6.5e14, help="a second that a GPU reaches")
    size = number(float, 0, 1e12)
    add("--activation-bytes", type=size, default=0.0, help="of a token, between stages")
    add("--link", type=speed, default=5e10, help="bytes/s between stages")
    add("--latency", type=number(float, 0, 1e6), default=20e-6, help="seconds between stages")
    known = ",".join(POLICIES)
    add("--policies", default=known, help=f"of {known}; as NAME or as NAME:TOKENS, in a step")
    add("--config", **pairs, help="of the engine")
    add_load_arguments(parser)
    parser.set_defaults(concurrency=[])  # options that serve.patterns also reads
    arguments = parser.parse_args()
    arguments.name = f"simulate-{arguments.name or 'simulate'}"
    arguments.all = not (arguments.rate or arguments.trace)
    arguments.policies = arguments.policies.split(",")
    for name in arguments.policies:
        bare, _, most = name.partition(":")
        if bare not in POLICIES or not (most or "1").isdecimal():
            parser.error(f"--policies: {name} is none of {', '.join(POLICIES)}")
    if not (arguments.steps or arguments.model or arguments.stage):
        parser.error("no costs: give --steps, --model or --stage")
    if arguments.steps and (arguments.model or arguments.stage or arguments.head):
        parser.error("--steps: it is of all costs; --model, --stage and --head do not go with it")
    return arguments


@told(ConfigError)
def main() -> None:
    arguments = parse_arguments()
    workload, recorded, pairs = read_load(arguments.workload, arguments.trace, arguments.limit)
    try:
        stages, head = make_costs(arguments)
    except (OSError, TypeError, ValueError) as error:  # an unreadable file or an invalid name
        raise SystemExit(f"--steps, --model, --stage or --head: {error}") from None
    keys = {
        "pipeline_parallel_size": arguments.pp,
        "plans_in_flight": arguments.pp + 1,
        "max_waiting": len(pairs),
    }
    values = DEFAULTS | keys | parse_pairs(arguments.config)
    loads = patterns(arguments, recorded, len(pairs))

    def travel(work: Work) -> float:
        return arguments.latency + work.tokens * arguments.activation_bytes / arguments.link

    found: dict[str, Runs] = {name: {} for name in arguments.policies}
    for name, runs in found.items():
        bare, _, text = name.partition(":")
        most = int(text or values["max_num_batched_tokens"])
        sizes = {"max_num_batched_tokens": most, "max_num_seqs": min(most, values["max_num_seqs"])}
        config = EngineConfig(model=".", **values | sizes)
        for (load, arrivals), rate in zip(loads.items(), arguments.rate or [None], strict=True):
            pipeline = Pipeline(stages, head, travel)
            run = simulate(config, POLICIES[bare], pipeline, pairs, arrivals)
            runs[load] = summarize(run.records, arguments.slo) | run._asdict() | {"rate": rate}
            del runs[load]["records"]
    title = f"{len(pairs)} requests of {workload}, {arguments.pp} stages, simulated"
    every = {f"{policy}, {load}": run for policy in found for load, run in found[policy].items()}
    print_runs(title, every, COLUMNS)
    conclude(arguments, "", title, {"simulated": True, "workload": workload, "policies": found})


if __name__ == "__main__":
    main()
