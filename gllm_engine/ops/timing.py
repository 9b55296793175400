"""Measures how long a computation takes on a device; on a GPU without the host's launch time.

Knows nothing of the computation.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def times(run: Callable[[], object], device: torch.device, count: int) -> list[float]:
    """Seconds of each of `count` runs, after one unmeasured run.

    On a GPU the runs are replays of a CUDA graph, so `run` must not wait for the device.
    """
    run()  # compiles kernels, which must not happen in a capture
    if device.type == "cuda":
        replay = _record(run)
        return [replay() for _ in range(count)]
    found = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return found


def _record(run: Callable[[], object]) -> Callable[[], float]:
    """Capture `run` in a CUDA graph; return a function that replays it and returns GPU seconds."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay() -> float:
        graph.replay()  # keeps the GPU busy while the host launches the timed replay
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    return replay
