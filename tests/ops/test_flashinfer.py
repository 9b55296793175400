"""The FlashInfer backend as far as it needs no GPU: a stand-in takes the place of the library."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gllm_engine import ops
from gllm_engine.ops.batch import made_up_step

pytest.importorskip("triton")
NAME = "gllm_engine.ops.flashinfer"


class Wrapper:
    """Of FlashInfer's, as far as it is used here."""

    def __init__(self, partials: Tensor, backend: str) -> None:
        self._pin_memory_int_workspace_buffer = torch.empty(8, dtype=torch.uint8)
        self.backend = backend

    def reset_workspace_buffer(self, partials: Tensor, memory: Tensor) -> None:
        self.memory = memory


class Renamed(Wrapper):
    """As it might be in a later version."""

    def __init__(self, partials: Tensor, backend: str) -> None:
        self._pinned_workspace = torch.empty(8, dtype=torch.uint8)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    library: Any = ModuleType("flashinfer")
    library.__version__ = "9.9"
    library.BatchPrefillWithPagedKVCacheWrapper = Wrapper
    library.BatchPrefillWithRaggedKVCacheWrapper = type("Ragged", (Wrapper,), {})
    monkeypatch.setitem(sys.modules, "flashinfer", library)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    monkeypatch.setattr(ops, "flashinfer", None, raising=False)  # put back with the rest
    module = importlib.import_module(NAME)
    monkeypatch.delitem(sys.modules, NAME)
    return module


@pytest.fixture
def planner(backend: ModuleType) -> Any:
    """Without the memory that only a GPU has."""
    planner = object.__new__(backend.FlashInferPlanner)
    planner._device, planner._partials, planner._wrappers = torch.device("cpu"), torch.empty(1), {}
    return planner


def test_a_version_that_keeps_plans_elsewhere_is_refused(planner: Any) -> None:
    with pytest.raises(RuntimeError, match=r"^flashinfer 9\.9: its Renamed has no _pin_memory_int"):
        planner._wrapper(Renamed, {"num_qo_heads": 4}, "fa2", 0)
    assert planner._wrapper(Wrapper, {"num_qo_heads": 4}, "fa2", 0).memory.numel() == 8 << 20


def test_each_shape_of_attention_has_a_wrapper_of_its_own(
    backend: ModuleType, planner: Any
) -> None:
    """For a wrapper holds one plan, and a step has one for each shape and group."""

    def wrapper(
        kind: type,
        heads: int,
        kv_heads: int,
        dim: int,
        window: int | None,
        group: int = 0,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> Any:
        cache = torch.empty(1, 2, 16, kv_heads, dim)
        shape = backend._shape(cache, heads, window, torch.float16, scale, softcap)
        return planner._wrapper(kind, shape, "fa2", group)

    ragged = backend.BatchPrefillWithRaggedKVCacheWrapper
    base = (Wrapper, 8, 2, 64, None)
    others = [
        (ragged, 8, 2, 64, None),
        (Wrapper, 4, 2, 64, None),
        (Wrapper, 8, 4, 64, None),
        (Wrapper, 8, 2, 128, None),
        (Wrapper, 8, 2, 64, 512),
        (Wrapper, 8, 2, 64, None, 1),
        (Wrapper, 8, 2, 64, None, 0, 0.5),
        (Wrapper, 8, 2, 64, None, 0, None, 30.0),
    ]
    made = [wrapper(*shape) for shape in (base, *others)]
    assert len(set(map(id, made))) == len(made) == len({id(one.memory) for one in made})
    assert [wrapper(*shape) for shape in (base, *others)] == made


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET=1")
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
def test_a_plan_of_sparse_attention(
    backend: ModuleType, planner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is chosen if the host knows that no row has more tokens; in a graph it knows none."""
    monkeypatch.setattr(backend, "_SCORE_BYTES", 4 * 2 * 128)  # of two rows
    planner._scores = None
    rows = [(40, 1), (9, 1), (12, 1), (13, 1), (100, 1)]
    batch = made_up_step(rows, torch.arange(8)[None], 16).of_group(0)
    cache = torch.empty(8, 1, 16, 1, 48)

    def plan(top_k: int | None, **changes: Any) -> Any:
        return planner.plan_latent(replace(batch, **changes), cache, 4, top_k)

    for top_k in (None, 100, 2048):
        dense = plan(top_k)
        assert dense.choice is None and dense.splits.lens.tolist() == [40, 9, 12, 13, 100]
    unknown = {"context_lens_cpu": np.zeros(0, np.int64)}
    assert plan(128, **unknown).choice is None  # the table has no room for more
    for made in (plan(12), plan(12, **unknown)):
        assert made.splits.lens.tolist() == [12, 9, 12, 12, 12]
        choice = made.choice
        assert choice.top_k == 12 and choice.scores.shape == (2, 128)
        scanned = [scan.lens.tolist() for scan in choice.scans]
        assert scanned == [[40, 0], [0, 13], [100]]
        assert choice.scores.data_ptr() == planner._scores.data_ptr()  # the same for all plans
