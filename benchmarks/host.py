"""Measures the host's cost on one machine without a GPU: scripts/bench host.

It measures the scheduler's time per step, the share of the engine's offline speed that reaches
Triton clients, and the throughput of front ends and coalescing with an engine that takes no time.
Each comparison is made in one run, on the same work.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Iterable
from typing import Any

from gllm_benchmarks.load import run_load
from gllm_benchmarks.record import Figures, make_parser, number, print_table, record
from gllm_benchmarks.serve import summarize
from gllm_benchmarks.served_model import MODEL, SHIPPED, server
from gllm_benchmarks.workloads import Job, make_jobs
from gllm_engine import LLM, EngineConfig, SamplingParams, Scheduler, Sequence, StepResult

VOCAB = 2048
PROMPT_LEN = 12
SAMPLING: dict[str, Any] = {"ignore_eos": True, "temperature": 0.8, "top_p": 0.95}
FRONT_ENDS = (1, 2)  # of an engine that answers at once
HEADER = ["", ""]  # of rows that say themselves what they are


def step_cost(num_sequences: int, num_steps: int) -> float:
    """Median microseconds of one schedule() and one commit(), all sequences decoding."""
    config = EngineConfig(
        model=".", max_num_seqs=num_sequences, max_num_batched_tokens=max(2048, num_sequences)
    )
    num_pages = num_sequences * ((64 + num_steps) // config.page_size + 2)
    scheduler = Scheduler(config, num_pages, max_model_len=4096, eos_token_ids=(1, 2))
    sampling = SamplingParams(max_tokens=None, stop_token_ids=(3,))
    for i in range(num_sequences):
        prompt = [10 + i % 1000] * (32 + i % 16)  # pages fill up at different steps
        scheduler.add(Sequence(i, prompt, sampling, seed=i))

    def turn() -> float:
        start = time.perf_counter()
        plan = scheduler.schedule()
        middle = time.perf_counter()
        assert plan is not None
        num_rows = len(plan.decode_slots) + sum(chunk.samples for chunk in plan.chunks)
        result = StepResult(plan.step, [100] * num_rows)
        again = time.perf_counter()
        scheduler.commit(result)
        return time.perf_counter() - again + middle - start

    while scheduler.stats().waiting:
        turn()
    gc.collect()
    return statistics.median(turn() for _ in range(num_steps)) * 1e6


def make_prompts(streams: int, tokens: int) -> list[Job]:
    return make_jobs([(PROMPT_LEN, tokens)] * streams, VOCAB)


def offline_speed(streams: int, tokens: int, config: dict[str, Any]) -> float:
    """Output tokens/s of an engine in this process, best of three runs."""
    sampling = SamplingParams(max_tokens=tokens, **SAMPLING)
    prompts = [job.prompt for job in make_prompts(streams, tokens)]
    speeds = []
    with LLM(model=str(SHIPPED), **config) as llm:
        llm.generate(prompts, SamplingParams(max_tokens=4))
        for _ in range(3):
            start = time.perf_counter()
            answers = llm.generate(prompts, sampling)
            seconds = time.perf_counter() - start
            speeds.append(sum(len(a.outputs[0].token_ids) for a in answers) / seconds)
    return max(speeds)


def served_speed(
    streams: int, tokens: int, front_ends: int, coalesce: bool, config: dict[str, Any]
) -> Figures:
    """Tokens/s and tokens per response that `streams` gRPC streams receive, best of three runs."""
    parameters = {"coalesce": "true" if coalesce else "false"}
    with server(SHIPPED, front_ends, parameters, config) as addresses:
        run_load(addresses.grpc, MODEL, make_prompts(streams, 4), streams)
        jobs = make_prompts(streams, tokens)
        runs = [run_load(addresses.grpc, MODEL, jobs, streams, sampling=SAMPLING) for _ in range(3)]
    found = [summarize(records, {}) for records in runs]
    assert not any(run["failed"] for run in found), "tokens were lost"
    best = max(found, key=lambda run: run["output_tokens_per_s"])
    return {
        "tokens_per_s": best["output_tokens_per_s"],
        "tokens_per_response": best["tokens_per_response"],
    }


def measure(args: argparse.Namespace) -> Figures:
    # One thread for tensor work in both runs, so that server and client have a core in the second.
    config = {"cpu_threads": 1}
    steps = {str(n): step_cost(n, args.steps) for n in (16, 256, 1024)}
    offline = offline_speed(args.streams, args.tokens, config)
    served = served_speed(args.streams, args.tokens, args.front_ends, True, config)
    served["share_of_offline"] = served["tokens_per_s"] / offline
    instant = {
        f"F={f} {'coalesced' if c else 'one token a response'}": served_speed(
            args.streams, args.tokens * (4 if c else 1), f, c, {"device": "none"}
        )
        for f in FRONT_ENDS
        for c in (False, True)
    }
    return {
        "scheduler_us_per_step": steps,
        "offline_tokens_per_s": offline,
        "through_triton": served,
        "instant_engine": instant,
    }


def slashed(values: Iterable[float]) -> str:
    return " / ".join(f"{value:,.0f}" for value in values)


def rows(figures: Figures) -> list[list[str]]:
    """What was measured, and its figure."""
    steps = figures["scheduler_us_per_step"]
    served = figures["through_triton"]
    told = {
        f"scheduler, a step at {slashed(map(int, steps))} running sequences": (
            f"{slashed(steps.values())} us"
        ),
        "the shipped model, offline": f"{figures['offline_tokens_per_s']:,.0f} tokens/s",
        "the same through Triton, gRPC streams": (
            f"{served['tokens_per_s']:,.0f} tokens/s, {served['share_of_offline']:.0%} of offline"
        ),
    }
    for kind in ("one token a response", "coalesced"):
        runs = [figures["instant_engine"][f"F={f} {kind}"] for f in FRONT_ENDS]
        told[f"an engine that answers at once, {kind}, {slashed(FRONT_ENDS)} front ends"] = (
            f"{slashed(run['tokens_per_s'] for run in runs)} tokens/s"
        )
    return [*map(list, told.items())]


def main() -> None:
    parser = make_parser("host", __doc__)
    add = parser.add_argument
    count = number(int, 1, 1e6)
    add("--streams", type=number(int, 1, 4096), default=64)
    add("--tokens", type=count, default=200, help="output tokens a stream")
    add("--steps", type=count, default=400, help="scheduler steps timed")
    add("--front-ends", type=number(int, 1, 256), default=2)
    args = parser.parse_args()
    figures = measure(args)
    print_table("What the host costs", HEADER, rows(figures))
    record(args, "host", figures)


if __name__ == "__main__":
    main()
