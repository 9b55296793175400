"""One run of vLLM for offline.py, in a separate process; ours.py does the same for our engine.

The script is run by its path with only vLLM's packages on PYTHONPATH, so it imports nothing of this
project.
"""

from __future__ import annotations

import json
import sys
import time
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from typing import Any


def run(llm: Any, jobs: list[tuple[list[int], int, list[str]]], vocab: int) -> dict[str, Any]:
    """Serve the jobs, all queued at once; returns ours.py's figures, None if vLLM lacks a figure.

    Raises RuntimeError if a request did not get all its output tokens.
    """
    from PIL import Image
    from vllm import SamplingParams

    prompts = []
    for prompt, _, files in jobs:
        # Images are decoded when their pixels are needed.
        images = [Image.open(BytesIO(b64decode(file))) for file in files]
        data = {"multi_modal_data": {"image": images}} if files else {}
        prompts.append({"prompt_token_ids": prompt, **data})
    sampling = [
        SamplingParams(temperature=1.0, max_tokens=n, ignore_eos=True, detokenize=False)
        for _, n, _ in jobs
    ]
    start = time.perf_counter()
    answers = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    tokens = [list(answer.outputs[0].token_ids) for answer in answers]
    if [len(each) for each in tokens] != [n for _, n, _ in jobs]:
        raise RuntimeError("a request got more or fewer tokens than it asked for")
    if not all(0 <= min(each) <= max(each) < vocab for each in tokens):
        raise RuntimeError("a token is outside the vocabulary")
    count = sum(map(len, tokens))
    return {"seconds": seconds, "first_token": None, "steps": None, "tokens": count}


def main() -> None:
    # vLLM's packages must not import modules from the script's own directory.
    here = Path(__file__).resolve().parent
    sys.path[:] = [each for each in sys.path if Path(each).resolve() != here]
    task: dict[str, Any] = json.loads(sys.argv[1])
    import vllm

    llm = vllm.LLM(model=task["model"], **task["config"])
    ready = time.monotonic() - task["started"]
    cache = llm.llm_engine.vllm_config.cache_config
    figures: dict[str, Any] = {
        "version": vllm.__version__,
        "start_s": ready,
        "kv_tokens": (cache.num_gpu_blocks or 0) * cache.block_size or None,
    }
    print(f"ready: {figures}", flush=True)
    for work in json.loads(Path(task["work"]).read_text()):
        run(llm, work["warm_up"], task["vocab"])
        runs = [run(llm, work["jobs"], task["vocab"]) for _ in range(task["repeat"])]
        figures[work["name"]] = runs
        print(f"{work['name']}: {runs}", flush=True)
    Path(task["figures"]).write_text(json.dumps(figures))


if __name__ == "__main__":  # vLLM's worker processes import this file
    main()
