"""Both implementations against Ops, where mypy does not look: names of parameters, and defaults.

mypy checks the types; it lets an implementation name its parameters as it likes.
"""

from __future__ import annotations

import inspect
import sys
from importlib import import_module
from types import ModuleType

import pytest
from devices import INTERPRETED

from gllm_engine import ops
from gllm_engine.ops import Ops, reference

OPERATIONS = [name for name in vars(Ops) if not name.startswith("_")]


def parameters(function: object) -> list[tuple[str, object]]:
    signature = inspect.signature(function)
    return [(one.name, one.default) for one in signature.parameters.values() if one.name != "self"]


def without_flashinfer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module for GPUs, with names for what it takes from FlashInfer and nothing behind them."""
    library = ModuleType("flashinfer")
    library.BatchPrefillWithPagedKVCacheWrapper = library.BatchPrefillWithRaggedKVCacheWrapper = (
        None
    )
    monkeypatch.setitem(sys.modules, "flashinfer", library)
    monkeypatch.delitem(sys.modules, "gllm_engine.ops.flashinfer", raising=False)
    monkeypatch.setattr(ops, "flashinfer", None, raising=False)  # put back with the rest
    module = import_module("gllm_engine.ops.flashinfer")
    monkeypatch.delitem(sys.modules, "gllm_engine.ops.flashinfer")
    return module


@pytest.mark.parametrize("name", OPERATIONS)
def test_reference(name: str) -> None:
    assert parameters(getattr(reference, name)) == parameters(getattr(Ops, name))


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton and its interpreter")
def test_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    module = without_flashinfer(monkeypatch)
    for name in OPERATIONS:
        assert parameters(getattr(module, name)) == parameters(getattr(Ops, name)), name
    assert set(OPERATIONS) == set(module.__all__)
