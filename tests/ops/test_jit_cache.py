from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
import torch

from gllm_engine.attention_shape import AttentionShape
from gllm_engine.ops import AttentionInputs, Batch, reference
from gllm_engine.ops.jit_cache import cache_dirs, compile_all, tiny_chunk

CPU = torch.device("cpu")


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("page_size", [1, 16])
def test_a_tiny_chunk_can_be_planned_and_attended(start: int, page_size: int) -> None:
    batch = tiny_chunk(start, page_size, CPU)
    assert (batch.query_lens[0] == batch.context_lens_cpu[0]) == (start == 0)
    cache, q = torch.ones(4, 2, page_size, 2, 8), torch.ones(2, 4, 8)
    plan = reference.make_planner(CPU, torch.float32).plan(
        batch, cache, AttentionShape(4, 2, 8, None)
    )
    torch.testing.assert_close(reference.attend(AttentionInputs(q), cache, plan), torch.ones(2, 32))


def test_all_are_planned_at_the_same_time(caplog: pytest.LogCaptureFixture) -> None:
    together = threading.Barrier(4, timeout=10)
    planned: set[tuple[int, int | None]] = set()

    def plan(batch: Batch, window: int | None) -> None:
        together.wait()  # raises unless the others are under way
        planned.add((batch.context_lens_cpu[0], window))

    jobs = [(tiny_chunk(start, 16, CPU), window) for start in (0, 2) for window in (None, 20)]
    with caplog.at_level(logging.INFO):
        compile_all("attention", plan, jobs)
    assert planned == {(2, None), (2, 20), (4, None), (4, 20)}
    before, after = caplog.messages
    assert before.startswith(f"attention: what is not in {cache_dirs()[0]} yet is compiled now")
    assert after.startswith("attention: ready after ")


def test_an_error_comes_out_when_all_have_ended() -> None:
    ended = set()

    def plan(batch: Batch, window: int | None) -> None:
        if window is None:
            raise RuntimeError("Ninja build failed.")
        ended.add(window)

    with pytest.raises(RuntimeError, match="Ninja build failed"):
        compile_all(
            "attention", plan, [(tiny_chunk(0, 16, CPU), window) for window in (None, 20, 30)]
        )
    assert ended == {20, 30}


def test_cache_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FLASHINFER_WORKSPACE_BASE", "TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/a")
    assert cache_dirs() == (Path("/home/a/.cache/flashinfer"), Path("/home/a/.triton/cache"))
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", "/b")
    monkeypatch.setenv("TRITON_HOME", "/c")
    assert cache_dirs() == (Path("/b/.cache/flashinfer"), Path("/c/.triton/cache"))
    monkeypatch.setenv("TRITON_CACHE_DIR", "/d")
    assert cache_dirs()[1] == Path("/d")
