"""Captures work as CUDA graphs that share the memory of one pool. Knows nothing of steps.

A graph overwrites what other graphs of the pool have computed, but for the tensors that someone
holds. So the graphs of one piece of work must run in their order, with no other graph in between.

Captured work may be cut, where something must be launched anew each time:

    captured    | graph 0 ..... | cut | graph 1 ..... | cut | graph 2 ..... |
    each run    | replay graph 0 | calls | replay graph 1 | calls | replay graph 2 |

A graph starts when all work before it in the stream has ended, and what follows it when the whole
graph has. So kernels never overlap across a cut, whatever pdl.py lets them do elsewhere.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
# Begins another graph. Returns tensors with the memory of the given ones, for calls in the cut.
Cut = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]

_log = logging.getLogger(__name__)


class GraphPool:
    """Memory of the graphs of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def told(self, what: str) -> Iterator[None]:
        """Log the seconds and the memory that the captures of `what` in this context take.

        Garbage is not collected meanwhile: a graph that dies breaks a capture.
        """
        start = time.perf_counter()
        free = torch.cuda.mem_get_info(self._device)[0]
        gc.collect()
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()
        seconds = time.perf_counter() - start
        gib = (free - torch.cuda.mem_get_info(self._device)[0]) / 2**30
        _log.info("captured graphs of %s in %.1f s, %.2f GiB", what, seconds, gib)

    def capture(self, work: Callable[[Cut], T]) -> tuple[list[torch.cuda.CUDAGraph], T]:
        """The graphs of work(cut), and its result.

        The same work must have run before: no kernel may be compiled in a capture, nor a handle be
        created. Nothing is computed.
        """
        graphs: list[torch.cuda.CUDAGraph] = []

        def begin() -> None:
            graphs.append(torch.cuda.CUDAGraph())
            graphs[-1].capture_begin(self._pool, capture_error_mode="thread_local")

        def cut(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            graphs[-1].capture_end()
            lent = tuple(_borrowed(x) for x in tensors)
            begin()
            return lent

        # As torch.cuda.graph() does, with one difference: that function first waits for the device
        # and returns all unused memory to the driver, and the next step has to allocate it again.
        with torch.cuda.stream(self._stream):
            begin()
            try:
                result = work(cut)
            finally:
                graphs[-1].capture_end()
        return graphs, result


def _borrowed(x: Tensor) -> Tensor:
    """A tensor with the memory of x that does not keep it: later graphs of the pool may use it."""
    size = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    memory = torch._C._construct_storage_from_data_pointer(
        x.data_ptr(), x.device, size * x.itemsize
    )
    return x.new_empty(0).set_(memory, 0, x.shape, x.stride())
