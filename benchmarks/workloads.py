"""What the offline benchmarks compute: lengths of prompts and outputs, always the same.

Knows no engine. Prompts are random token ids, so that nothing is shared between them.
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple


class Job(NamedTuple):
    """One request, all queued at once; the output has exactly `output_len` tokens."""

    prompt: list[int]
    output_len: int


def lengths(name: str) -> list[tuple[int, int]]:
    """(prompt tokens, output tokens) of each request of a workload of WORKLOADS."""
    if name == "share":
        return _share()
    count, prompt_len, output_len = _FIXED[name]
    return [(prompt_len, output_len)] * count


def make_jobs(name: str, vocab: int) -> list[Job]:
    """The requests of a workload, with prompts of ids below `vocab`."""
    ids = random.Random(1)
    return [Job(ids.choices(range(vocab), k=p), n) for p, n in lengths(name)]


def _share() -> list[tuple[int, int]]:
    """2,000 requests whose lengths are spread like those of conversations."""
    draws = random.Random(0)

    def draw(mean: float, sigma: float, high: int) -> int:
        length = int(draws.lognormvariate(math.log(mean) - sigma**2 / 2, sigma))
        return min(max(length, 4), high)

    return [(draw(220, 1.0, 2048), draw(200, 0.8, 1024)) for _ in range(2000)]


_FIXED = {
    "1k1k": (512, 1024, 1024),
    "prefill": (96, 8192, 16),
    "lat1": (1, 128, 256),
    "lat64": (64, 512, 256),
}
WORKLOADS = ("share", *_FIXED)
