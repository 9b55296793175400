"""How fast the engine is with every request queued at once: scripts/bench offline --model DIR.

Runs workloads of workloads.py on random weights of the model's shape (only config.json is read),
temperature 1, no prefix cache. With --profile, also where a step's time goes on the GPU.
"""

from __future__ import annotations

import argparse
import logging
import time
from typing import Any

from gllm_benchmarks.record import add_arguments, print_table, record
from gllm_benchmarks.workloads import WORKLOADS, Job, make_jobs
from gllm_engine import Engine, Request, SamplingParams, make_config

# A kernel belongs to the first kind one of whose words is in its name.
KINDS = {
    "attention": ("PrefillWith", "DecodeWith", "PersistentVariableLength", "MergeState"),
    "norms": ("_rms_norm",),
    "rotation and KV store": ("_rotate_and_store",),
    "activation": ("_silu_mul",),
    "sampling": ("_look", "_choose"),
    "GEMM": ("gemm", "nvjet", "cutlass", "gemv", "splitK", "cublas"),
    "copies": ("Memcpy", "Memset"),
}

# Steps before the profile, where it is not 60: amid the workload's usual work.
SKIPPED = {"prefill": 20, "1k1k": 500}


def submit(engine: Engine, jobs: list[Job]) -> None:
    for id, job in enumerate(jobs):
        sampling = SamplingParams(max_tokens=job.output_len, ignore_eos=True)
        engine.add(Request(id, job.prompt, sampling, seed=id))


def run(engine: Engine, jobs: list[Job]) -> dict[str, float]:
    """Serve the jobs; seconds in all, until the first token, and steps."""
    before = engine.stats().steps
    start = time.perf_counter()
    submit(engine, jobs)
    num_tokens, first = 0, 0.0
    while engine.has_work:
        outputs = engine.step().get(None)
        if outputs is None:
            continue
        num_tokens += len(outputs.tokens)
        first = first or time.perf_counter() - start
        for finish in outputs.finished.values():
            if finish.reason != "length":
                raise RuntimeError(f"a request failed: {finish.message or finish.reason}")
    seconds = time.perf_counter() - start
    if num_tokens != sum(job.output_len for job in jobs):
        raise RuntimeError(f"{num_tokens} tokens came, not what was asked for")
    steps = engine.stats().steps - before
    return {"seconds": seconds, "first_token": first, "steps": steps, "tokens": num_tokens}


def describe(name: str, jobs: list[Job], figures: dict[str, float]) -> list[Any]:
    seconds = figures["seconds"]
    prompts = sum(len(job.prompt) for job in jobs)
    per_token = 1000 * seconds / jobs[0].output_len if name.startswith("lat") else None
    return [
        name,
        f"{seconds:.2f}",
        f"{figures['tokens'] / seconds:,.0f}",
        f"{(prompts + figures['tokens']) / seconds:,.0f}",
        "" if per_token is None else f"{per_token:.2f}",
        f"{1000 * figures['first_token']:.0f}",
        f"{figures['steps']:.0f}",
    ]


def profile(engine: Engine, jobs: list[Job], skip: int, count: int) -> dict[str, float]:
    """Milliseconds a step on the GPU by kind of kernel, over `count` steps after `skip`."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as trace

    submit(engine, jobs)
    for _ in range(skip):
        engine.step()
    with trace(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(count):
            engine.step()
    for id in range(len(jobs)):
        engine.abort(id)
    while engine.has_work:
        engine.step()
    spans = [e for e in profiler.events() if e.device_type == DeviceType.CUDA]
    times = dict.fromkeys([*KINDS, "other"], 0.0)
    for span in spans:
        found = (kind for kind, words in KINDS.items() if any(w in span.name for w in words))
        times[next(found, "other")] += span.time_range.elapsed_us() / 1000 / count
    wall = max(s.time_range.end for s in spans) - min(s.time_range.start for s in spans)
    return times | {"gaps": wall / 1000 / count - sum(times.values())}


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench offline", description=__doc__)
    parser.add_argument("--model", required=True, help="a directory with a config.json")
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--config", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--profile", action="store_true")
    add_arguments(parser)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    values: dict[str, Any] = {"load_format": "dummy", "enable_prefix_caching": False}
    for pair in arguments.config:
        key, _, value = pair.partition("=")
        values[key] = int(value) if value.isdigit() else float(value) if "." in value else value
    start = time.perf_counter()
    engine = Engine(make_config({"model": arguments.model} | values))
    figures: dict[str, Any] = {"start_s": time.perf_counter() - start}
    print(f"ready after {figures['start_s']:.1f} s, {engine.info.num_pages} pages", flush=True)
    rows = []
    for name in arguments.workloads.split(","):
        jobs = make_jobs(name, engine.info.vocab_size)
        run(engine, [Job(job.prompt, min(job.output_len, 8)) for job in jobs[:4]])  # warm
        figures[name] = run(engine, jobs)
        rows.append(describe(name, jobs, figures[name]))
        print(rows[-1], flush=True)
        if arguments.profile:
            figures[f"{name} profile"] = times = profile(engine, jobs, SKIPPED.get(name, 60), 20)
            print({kind: round(ms, 3) for kind, ms in times.items()}, flush=True)
    header = ["workload", "s", "out tok/s", "tok/s", "ms/token", "first ms", "steps"]
    print_table(f"{arguments.model}, ours", header, rows)
    record("offline", figures, arguments.save)
    engine.close()


if __name__ == "__main__":
    main()
