"""Host cost of scheduling: `python tests/sched/step_cost.py` prints it as one JSON line.

A step is one schedule() and one commit(), all sequences decoding, no runner in between.
"""

from __future__ import annotations

import gc
import json
import time

from gllm_engine.config import EngineConfig
from gllm_engine.sampling import SamplingParams
from gllm_engine.sched import Scheduler, Sequence
from gllm_engine.types import StepResult


def step_cost(num_sequences: int, num_steps: int = 400, depth: int = 1) -> dict[str, float]:
    """Microseconds a step, as {"median", "mean"}, with prefix caching on and `depth` plans."""
    config = EngineConfig(
        model=".", max_num_seqs=num_sequences, max_num_batched_tokens=max(2048, num_sequences)
    )
    length = 64 + num_steps + 2 * depth
    num_pages = num_sequences * (length // config.page_size + 2)
    scheduler = Scheduler(config, num_pages, max_model_len=4096, eos_token_ids=(1, 2))
    sampling = SamplingParams(max_tokens=None, stop_token_ids=(3,))
    for i in range(num_sequences):
        prompt = [10 + i % 1000] * (32 + i % 16)  # so that pages do not all end at once
        scheduler.add(Sequence(i, prompt, sampling, seed=i))
    results: list[StepResult] = []

    def plan() -> bool:
        made = scheduler.schedule()
        if made is None:
            return False
        num_rows = len(made.decode_slots) + sum(chunk.samples for chunk in made.chunks)
        results.append(StepResult(made.step, [100] * num_rows))
        return True

    while scheduler.stats().waiting:
        plan()
        scheduler.commit(results.pop(0))
    for _ in range(depth - 1):
        plan()
    times = []
    gc.collect()
    for _ in range(num_steps):
        begin = time.perf_counter()
        plan()
        middle = time.perf_counter()
        result = results.pop(0)
        committing = time.perf_counter()
        scheduler.commit(result)
        times.append((time.perf_counter() - committing + middle - begin) * 1e6)
    times.sort()
    return {"median": round(times[len(times) // 2], 1), "mean": round(sum(times) / len(times), 1)}


if __name__ == "__main__":
    print(json.dumps({"us_per_step": {n: step_cost(n) for n in (16, 256, 1024)}}))
