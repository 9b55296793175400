"""How long a computation takes on a device; on a GPU without the host that launches it.

Knows nothing of what is computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def times(run: Callable[[], object], device: torch.device, count: int) -> list[float]:
    """Seconds of each of `count` runs, after one that is not measured.

    On a GPU they are replayed from a CUDA graph, so `run` may not wait for the device.
    """
    run()  # compiles, which must not happen while a graph is recorded
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
    """`run` as a CUDA graph; gives the seconds that the GPU took for it."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay() -> float:
        graph.replay()  # the GPU is busy while the host prepares what is timed
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    return replay
