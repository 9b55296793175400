"""CUDA graphs on a CPU: tapes of torch's operations, replayed into the memory of their results.

What a capture takes from the host, a tape repeats for ever, as a graph does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from gllm_engine.ops import reference


class TapedGraph:
    """In place of torch.cuda.CUDAGraph. `made`: all of them, in the order of their captures."""

    made: list[TapedGraph] = []
    current: TapedGraph | None = None

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[..., Any], Any, Any, list[Tensor]]] = []
        self.replays = 0
        self._mode = _Tape(self)

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        assert TapedGraph.current is None and pool == "pool"
        TapedGraph.current = self
        TapedGraph.made.append(self)
        self._mode.__enter__()

    def capture_end(self) -> None:
        assert TapedGraph.current is self and self.calls
        self._mode.__exit__(None, None, None)
        TapedGraph.current = None

    def note(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        self.calls.append((call, args, kwargs, _tensors(result)))
        return result

    def replay(self) -> None:
        assert TapedGraph.current is None
        self.replays += 1
        for call, args, kwargs, results in self.calls:
            for old, new in zip(results, _tensors(call(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


class _Tape(TorchDispatchMode):
    def __init__(self, graph: TapedGraph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._graph.note(func, args, kwargs or {})


def _tensors(result: Any) -> list[Tensor]:
    found = result if isinstance(result, (tuple, list)) else [result]
    return [x for x in found if isinstance(x, Tensor)]


def tape_graphs(monkeypatch: pytest.MonkeyPatch) -> type[TapedGraph]:
    """Graphs are tapes from now on, on a CPU."""
    summed = reference.sum_experts

    def sum_experts(*args: Any, **kwargs: Any) -> Tensor:
        """One operation: the reference's own follow from the numbers, a GPU's do not."""
        if TapedGraph.current is None:
            return summed(*args, **kwargs)
        graph = TapedGraph.current
        with _disable_current_modes():
            return graph.note(summed, args, kwargs)

    monkeypatch.setattr(reference, "sum_experts", sum_experts)
    monkeypatch.setattr(TapedGraph, "made", [])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", TapedGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 1 << 30))
    return TapedGraph
