"""One run of our engine for offline.py, in a separate process; peer.py does the same for vLLM.

This module drives and profiles our engine. It knows nothing of tables or comparisons.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from base64 import b64decode
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from msgspec import to_builtins

from gllm_engine import IN_PROCESS, Engine, Request, SamplingParams, make_config
from gllm_engine.images import place, read_processor

# A kernel belongs to the first kind whose pattern is found in the kernel's name.
KINDS = {
    "indexer": "_score_tokens|_choose_tokens|_store_index_key",
    "attention": "PrefillWith|DecodeWith|PersistentVariableLength|MergeState|_decode_attention|"
    "_split$|_list_pages|_copy_pages|_apply_sinks|_gather_latents|_absorb|_attend_latent|_project",
    "gated delta rule": "_recur|_convolve|_solve_blocks|_gated_norm",
    "norms": "_rms_norm|_layer_norm|_mean_squares",
    "rotation and KV store": "_rotate_and_store|_store_latent",
    "activation": "_activate",
    "sampling": "_look|_choose|_record",
    "rounding to float8": "_quantize|_dequantize$",
    "experts": "_grouped|_few|_route|_place|_count|_sum",
    "GEMM": "gemm|nvjet|cutlass|gemv|skinny|_packed|_rescale|splitK|cublas",
    "sums over ranks": "_join|nccl",
    "inputs": "_prepare_inputs",
    "copies": "Memcpy|Memset|copy",
}
NUM_LONGEST = 15  # kernels that a profile tells by name

# Steps before the profile (default 60), so that it covers the workload's typical steps.
SKIPPED = {"prefill": 20, "1k1k": 500}
Jobs = list[tuple[list[int], int, list[str]]]  # prompts, output tokens, images in base64
THREADS = 8  # that prepare images, as those of a front end


def submit(engine: Engine, jobs: Jobs, processor: Any) -> Iterator[Request]:
    """Add the jobs to the engine. If they have images, return them instead, as they get ready.

    `processor`: the model's ImageProcessor, if it takes images.
    """

    def make(id: int) -> Request:
        prompt, output_len, files = jobs[id]
        images: Any = ()
        if files:
            prepared = [processor.prepare(b64decode(file)) for file in files]
            prompt, images = place(processor, prompt, prepared)
        sampling = SamplingParams(max_tokens=output_len, ignore_eos=True)
        return Request(id, prompt, sampling, id, images=images)

    numbers = range(len(jobs))
    if jobs[0][2]:
        return ThreadPoolExecutor(THREADS).map(make, numbers)
    for request in map(make, numbers):
        engine.add(request)
    return iter(())


def run(engine: Engine, jobs: Jobs, processor: Any) -> dict[str, float]:
    """Serve the jobs; returns total seconds, seconds to the first token, steps and output tokens.

    Raises RuntimeError if a request did not get all its output tokens.
    """
    before = engine.stats().steps
    start = time.perf_counter()
    waiting = submit(engine, jobs, processor)
    ids: list[int] = []
    tokens: list[int] = []
    first = 0.0
    while (request := next(waiting, None)) or engine.has_work:
        if request:
            engine.add(request)
        outputs = engine.step().get(IN_PROCESS)
        if outputs is None:
            continue
        ids += outputs.ids
        tokens += outputs.tokens
        first = first or time.perf_counter() - start
        for finish in outputs.finished.values():
            if finish.reason != "length":
                raise RuntimeError(f"a request failed: {finish.message or finish.reason}")
    seconds = time.perf_counter() - start
    if Counter(ids) != {id: job[1] for id, job in enumerate(jobs)}:
        raise RuntimeError("a request got more or fewer tokens than it asked for")
    if not 0 <= min(tokens) <= max(tokens) < engine.info.vocab_size:
        raise RuntimeError("a token is outside the vocabulary")
    steps = engine.stats().steps - before
    return {"seconds": seconds, "first_token": first, "steps": steps, "tokens": len(tokens)}


def kind_of(kernel: str) -> str:
    """The kind of a kernel, by its name; "other" if it has none."""
    return next((kind for kind, names in KINDS.items() if re.search(names, kernel)), "other")


def profile(engine: Engine, jobs: Jobs, processor: Any, skip: int, count: int) -> dict[str, Any]:
    """GPU milliseconds per step by kind of kernel, over `count` steps after `skip` steps.

    "longest": the kernels that take longest, each with milliseconds and launches per step.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as trace

    for request in submit(engine, jobs, processor):
        engine.add(request)
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
    kernels: Counter[str] = Counter()
    for span in spans:
        kernels[span.name] += span.time_range.elapsed_us() / 1000 / count
    times = dict.fromkeys([*KINDS, "other"], 0.0)
    for name, ms in kernels.items():
        times[kind_of(name)] += ms
    wall = max(s.time_range.end for s in spans) - min(s.time_range.start for s in spans)
    gaps = wall / 1000 / count - sum(times.values())
    launches = Counter(span.name for span in spans)
    longest = [[k, ms, launches[k] / count] for k, ms in kernels.most_common(NUM_LONGEST)]
    return times | {"gaps": gaps, "longest": longest}


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    task: dict[str, Any] = json.loads(sys.argv[1])
    try:
        engine = Engine(make_config({"model": task["model"]} | task["config"]))
    except ValueError as error:  # of a configuration or a checkpoint, which the user gave
        raise SystemExit(str(error)) from None
    figures: dict[str, Any] = {
        "start_s": time.monotonic() - task["started"],
        "kv_tokens": engine.info.num_pages * engine.info.page_size,
    }
    print(f"ready: {figures}", flush=True)
    processor = read_processor(Path(task["model"]))
    for work in json.loads(Path(task["work"]).read_text()):
        name = work["name"]
        run(engine, work["warm_up"], processor)
        figures[name] = []
        for _ in range(task["repeat"]):
            began = time.monotonic_ns()
            figures[name].append(run(engine, work["jobs"], processor))
            ended = time.monotonic_ns()
        print(f"{name}: {figures[name]}", flush=True)
        if "timeline" in task["config"]:
            figures[f"{name} timeline"] = to_builtins(engine.timeline().summary((began, ended)))
        if task["profile"]:
            times = profile(engine, work["jobs"], processor, SKIPPED.get(name, 60), 20)
            figures[f"{name} profile"] = times
            for kernel, ms, launches in times["longest"]:
                print(f"{ms:9.3f} ms {launches:7.1f} launches  {kernel[:100]}")
            print({k: round(ms, 3) for k, ms in times.items() if k != "longest"}, flush=True)
    engine.close()
    Path(task["figures"]).write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
