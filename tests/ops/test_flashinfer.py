"""The FlashInfer backend as far as it needs no GPU: a stand-in takes the place of the library."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import replace
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from test_latent_attention import mixed_step, plan_reference
from torch import Tensor

from gllm_engine import ops
from gllm_engine.attention_shape import AttentionShape, LatentShape
from gllm_engine.ops import latent_rows, prefill_rows, reference
from gllm_engine.ops.batch import made_up_step

pytest.importorskip("triton")
from gllm_engine.ops import triton  # noqa: E402

NAME = "gllm_engine.ops.flashinfer"
FLOAT8 = torch.float8_e4m3fn


class Wrapper:
    """Of FlashInfer's, as far as it is used here."""

    def __init__(self, partials: Tensor, backend: str) -> None:
        self._pin_memory_int_workspace_buffer = torch.empty(8, dtype=torch.uint8)
        self.backend = backend

    def reset_workspace_buffer(self, partials: Tensor, memory: Tensor) -> None:
        self.memory = memory


class Ragged(Wrapper):
    """Computes what FlashInfer's does: the last query of causal attention is at the last key."""

    def plan(self, q_starts: Tensor, k_starts: Tensor, **shape: Any) -> None:
        self.q_starts, self.k_starts, self.shape = q_starts.tolist(), k_starts.tolist(), shape

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, *scales: float, out: Tensor | None = None
    ) -> Tensor:
        assert (len(q), len(k)) == (self.q_starts[-1], self.k_starts[-1])
        assert q.shape[1] == k.shape[1] == v.shape[1] == self.shape["num_qo_heads"]
        key_dim = self.shape["head_dim_qk"]
        assert (k.shape[2], v.shape[2]) == (key_dim, self.shape.get("head_dim_vo", key_dim))
        number = self.shape["q_data_type"]
        assert q.dtype == number and k.dtype == v.dtype == self.shape.get("kv_data_type", number)
        assert scales == ((1.0, 1.0, 1.0) if number == FLOAT8 else ())
        if number == FLOAT8:
            assert out is not None and out.dtype == self.shape["o_data_type"] == torch.float16
        results = []
        for rows, seen in zip(pairwise(self.q_starts), pairwise(self.k_starts), strict=True):
            queries = q[slice(*rows)].transpose(0, 1).float()
            keys, values = (x[slice(*seen)].transpose(0, 1).float() for x in (k, v))
            pairs = queries.shape[1], keys.shape[1]
            mask = torch.ones(pairs, dtype=torch.bool)
            mask = mask.tril(pairs[1] - pairs[0]) if self.shape["causal"] else mask
            results.append(
                torch.nn.functional.scaled_dot_product_attention(
                    queries, keys, values, mask, scale=self.shape["sm_scale"]
                ).transpose(0, 1)
            )
        result = torch.cat(results)
        return result if out is None else out.copy_(result)


class Paged(Ragged):
    """As Ragged, for K and V in pages."""

    def plan(  # type: ignore[override]
        self, q_starts: Tensor, starts: Tensor, listed: Tensor, lasts: Tensor, **shape: Any
    ) -> None:
        size = shape["page_size"]
        lens = (starts.diff() - 1) * size + lasts
        super().plan(q_starts, torch.tensor([0, *lens]).cumsum(0), **shape)
        # Of each token in `listed` pages, but those after the last tokens of rows.
        keys = torch.arange(len(listed) * size).split((starts.diff() * size).tolist())
        self.keys = torch.cat([own[:n] for own, n in zip(keys, lens, strict=True)])
        self.listed = listed.long()

    def run(  # type: ignore[override]
        self, q: Tensor, cache: Tensor, *scales: float, out: Tensor | None = None
    ) -> Tensor:
        pages = cache.float()[self.listed].transpose(0, 1)
        k, v = pages.flatten(1, 2)[:, self.keys].to(cache.dtype)
        return super().run(q, k, v, *scales, out=out)


class Renamed(Wrapper):
    """As it might be in a later version."""

    def __init__(self, partials: Tensor, backend: str) -> None:
        self._pinned_workspace = torch.empty(8, dtype=torch.uint8)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    library: Any = ModuleType("flashinfer")
    library.__version__ = "9.9"
    library.BatchPrefillWithPagedKVCacheWrapper = Paged
    library.BatchPrefillWithRaggedKVCacheWrapper = Ragged
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
    planner._dtype, planner._scores, planner._expanded = torch.float32, None, None
    return planner


def test_a_buffer_is_used_again_once_it_is_copied(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []

    class Event:
        def __init__(self) -> None:
            self.number = len(told)
            told.append(self)

        def synchronize(self) -> None:
            told.append(("await", self.number))

        def record(self) -> None:
            told.append(("record", self.number))

    class Planned:
        _pin_memory_int_workspace_buffer: Any = None

        def plan(self) -> None:
            told.append(self._pin_memory_int_workspace_buffer)

    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda n, dtype, pin_memory: empty(n, dtype=dtype))
    stages = backend._Stages(2)
    del told[:]
    for _ in range(3):
        stages.plan(Planned())
    assert told[::3] == [("await", 0), ("await", 1), ("await", 0)]
    assert told[2::3] == [("record", 0), ("record", 1), ("record", 0)]
    first, second, third = told[1::3]
    assert first is third is not second and first.numel() == second.numel() == 8 << 20


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
        shape = AttentionShape(heads, kv_heads, dim, window, scale, softcap)
        return planner._wrapper(kind, backend._options(shape, torch.float16), "fa2", group)

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
    monkeypatch.setattr(backend, "SCORE_BYTES", 4 * 2 * 128)  # of two rows
    rows = [(40, 1), (9, 1), (12, 1), (13, 1), (100, 1)]
    batch = made_up_step(rows, torch.arange(8)[None], 16).of_group(0)
    cache = torch.empty(8, 1, 16, 1, 48)

    def plan(top_k: int | None, **changes: Any) -> Any:
        shape = LatentShape(4, 64, 64, 0.1, 48, top_k)
        return planner.plan_latent(replace(batch, **changes), cache, shape)

    def lens(plan: Any) -> list[int]:
        ((rows, splits),) = plan.absorbed
        assert rows.start == 0 and plan.num_absorbed == len(splits.lens)
        return splits.lens.tolist()

    for top_k in (None, 100, 2048):
        dense = plan(top_k)
        assert dense.choice is None and lens(dense) == [40, 9, 12, 13, 100]
    unknown = {"context_lens_cpu": np.zeros(0, np.int64)}
    assert plan(128, **unknown).choice is None  # the table has no room for more
    for made in (plan(12), plan(12, **unknown)):
        assert lens(made) == [12, 9, 12, 12, 12]
        choice = made.choice
        assert choice.top_k == 12 and choice.scores.shape == (2, 128)
        scanned = [scan.lens.tolist() for scan in choice.scans]
        assert scanned == [[40, 0], [0, 13], [100]]
        assert choice.scores.data_ptr() == planner._scores.data_ptr()  # the same for all plans


class Unstaged:
    def __init__(self, number: int = 1) -> None:
        self.number = number

    def plan(self, wrapper: Any, *args: Any, **options: Any) -> None:
        wrapper.plan(*args, **options)


# (context after the step, tokens in the step): decode rows, chunks with a context, fresh chunks.
STEP = [(40, 1), (3, 1), (21, 4), (40, 17), (30, 30), (8, 8)]
KEYS, FRESH_KEYS, NUMBERS = 99, 38, 4 * (12 + 10)  # of a token: K and V of 4 heads


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET=1")
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")
@pytest.mark.parametrize(
    ("num_absorbed", "at_once", "limits"),
    [
        (2, 4, {}),
        (2, 2, {"EXPANDED_BYTES": 4 * KEYS * (40 + NUMBERS) - 4}),
        (23, 4, {"_LEAST_TOKENS": 18}),
        (23, 1, {"EXPANDED_BYTES": 4 * FRESH_KEYS * (40 + NUMBERS // 4)}),
        (61, 0, {"EXPANDED_BYTES": 4 * FRESH_KEYS * (40 + NUMBERS // 4) - 4}),
    ],
)
def test_both_forms_of_latent_attention_are_equal(
    backend: ModuleType,
    planner: Any,
    monkeypatch: pytest.MonkeyPatch,
    num_absorbed: int,
    at_once: int,
    limits: dict[str, int],
) -> None:
    """Which form computes a row depends on the length of chunks and on the memory for K and V."""
    monkeypatch.setattr(latent_rows, "_LEAST_TOKENS", 4)
    for name, limit in limits.items():
        monkeypatch.setattr(latent_rows, name, limit)
    monkeypatch.setattr(backend, "has_chunk_kernels", lambda *_: True)
    monkeypatch.setattr(backend, "EXPANDED_BYTES", 1 << 20)
    monkeypatch.setattr(backend, "ABSORBED_TOKENS", 16)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    planner._stages = Unstaged()
    torch.manual_seed(0)
    rank, rope_dim = 32, 8
    batch = mixed_step(STEP, 16)
    cache = torch.randn(int(batch.page_table.max()) + 1, 1, 16, 1, rank + rope_dim)
    q = torch.randn(len(batch.tokens), 4, 12)
    kv_up = torch.randn(4, 4 + 10, rank) / rank**0.5

    plan = planner.plan_latent(batch, cache, LatentShape(4, 12, 10, 0.3, 40))
    assert plan.num_absorbed == num_absorbed
    pieces = [(rows.start, rows.stop) for rows, _ in plan.absorbed]
    assert pieces == [(at, min(at + 16, num_absorbed)) for at in range(0, num_absorbed, 16)]
    chunks = plan.expanded
    assert at_once == (0 if chunks is None else chunks.at_once)
    if chunks is not None:
        assert len(chunks.places) == (KEYS if num_absorbed == 2 else FRESH_KEYS)
        assert chunks.wrapper.backend == "fa3"
        planner._expanded.view(torch.float32).fill_(float("nan"))
    out = torch.empty(len(q), 4 * 10)
    found = backend.attend_latent(q, kv_up, cache, plan, out=out)
    assert found.data_ptr() == out.data_ptr()
    expected = reference.attend_latent(q, kv_up, cache, plan_reference(batch, cache, 0.3))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET=1")
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize(
    ("is_hopper", "softcap", "rows"),
    [(True, None, STEP), (True, None, STEP[2:4]), (True, 30.0, STEP[2:]), (False, None, STEP)],
)
@pytest.mark.parametrize("kind", [FLOAT8, torch.float16])
@pytest.mark.parametrize("short", [False, True])
def test_chunks_over_pages(
    backend: ModuleType,
    planner: Any,
    monkeypatch: pytest.MonkeyPatch,
    is_hopper: bool,
    softcap: float | None,
    rows: list[tuple[int, int]],
    kind: torch.dtype,
    short: bool,
) -> None:
    """Wrappers check the dtypes of what they get. Rounding changes none of these numbers; the
    stand-in knows no softcap.
    """
    for module in (backend, triton.qkv_rope_store):
        monkeypatch.setattr(module, "on_hopper", lambda _: is_hopper)
    monkeypatch.setattr(backend, "has_chunk_kernels", lambda *_: True)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(backend, "are_short", lambda *_: short)
    planner._stages, planner._dtype = Unstaged(), torch.float16
    torch.manual_seed(0)
    batch = mixed_step(rows, 16)
    cache = torch.randn(int(batch.page_table.max()) + 1, 2, 16, 3, 16).to(FLOAT8).to(kind)
    plan = planner.plan(batch, cache, AttentionShape(3, 3, 16, None, softcap=softcap))
    plain = is_hopper and softcap is None
    rounds = plain and kind == FLOAT8
    fresh = len(rows) > 2
    assert (plan.rounds, plan.rounds_paged) == (rounds, rounds and not short)
    assert plan.keeps == (plan.rounds_paged or fresh)
    as_cache = is_hopper and kind == torch.float16
    splits = short if plain else not as_cache
    assert plan.chunks.backend == ("fa2" if splits else "fa3")
    assert (plan.fresh is not None) == fresh
    if plan.fresh is not None:
        assert plan.fresh.backend == ("fa3" if is_hopper else "fa2")
    qkv = torch.randn(len(batch.tokens), 9, 16).to(FLOAT8).half()
    found = backend.rotate_and_store(qkv, 3, None, None, cache, plan)
    expected = qkv.to(FLOAT8) if is_hopper and kind == FLOAT8 else qkv[:, 3:]
    assert (found.kept is not None) == plan.keeps
    if found.kept is not None:
        assert found.kept.dtype == expected.dtype
        assert torch.equal(found.kept.half(), expected.half())
    out = torch.empty(len(qkv), 3 * 16, dtype=torch.float16)
    assert backend.attend(found, cache, plan, out=out).data_ptr() == out.data_ptr()
    slow = reference.plan_attention(batch, wide := cache.float(), None)
    exact = reference.attend(ops.AttentionInputs(qkv[:, :3].float()), wide, slow)
    torch.testing.assert_close(out.float(), exact, rtol=2e-3, atol=2e-3)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET=1")
@pytest.mark.parametrize("is_hopper", [False, True])
def test_kernels_over_pages_are_compiled_once(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, is_hopper: bool
) -> None:
    """One for long chunks, and one for short ones unless a window or a softcap is not worth it; and
    a tower's, which has no pages.
    """
    jobs: list[tuple[bool, Any]] = []

    def keep(what: str, plan: Any, wanted: list[Any]) -> None:
        for chunk, layer in wanted:
            rows = prefill_rows.prefill_rows(chunk, None)
            short = prefill_rows.are_short(rows, layer.shape.heads, layer.cache.element_size())
            assert short == bool(rows.num_paged)
            jobs.append((short, layer.shape))

    monkeypatch.setattr(backend, "compile_all", keep)
    monkeypatch.setattr(backend, "on_hopper", lambda _: is_hopper)
    float8, half = (torch.empty(1, 2, 16, 2, 64, dtype=kind) for kind in (FLOAT8, torch.float16))
    tower, plain = (AttentionShape(heads, 2, 64, None) for heads in (2, 4))
    capped, windowed = replace(plain, softcap=30.0), replace(plain, window=20)
    layers = [(half[:0], tower), (float8, plain), (float8, capped)]
    backend.compile_attention([ops.AttentionLayer(*layer) for layer in layers], torch.float16)
    both = [(False, plain), (True, plain), (False, capped), (True, capped)]
    assert jobs == ([(False, tower)] if is_hopper else []) + both
    jobs.clear()
    layers = [(half[:0], tower), (half, capped), (half, windowed)]
    backend.compile_attention([ops.AttentionLayer(*layer) for layer in layers], torch.float16)
    assert jobs == [(False, tower), (False, capped), (False, windowed)]
    jobs.clear()
    layers = [(half[:0], tower), (half, plain)]
    backend.compile_attention([ops.AttentionLayer(*layer) for layer in layers], torch.float16)
    assert jobs == both[: 1 + is_hopper]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET=1")
def test_kernels_of_latent_attention_are_compiled_once(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over pages of any dtype, whatever the number of heads; none if FlashInfer has none."""
    jobs: list[tuple[int, Any]] = []

    def keep(what: str, plan: Any, wanted: list[Any]) -> None:
        jobs.extend((int(chunk.context_lens_cpu[0]), layer.shape) for chunk, layer in wanted)

    monkeypatch.setattr(backend, "compile_all", keep)
    cache = torch.empty(1, 1, 16, 1, 576, dtype=torch.float8_e4m3fn)
    deepseek = LatentShape(16, 192, 128, 0.1, 576)
    glm = LatentShape(20, 256, 256, 0.1, 576)
    others = replace(deepseek, heads=8), LatentShape(4, 192, 64, 0.1, 576)
    layers = [ops.AttentionLayer(cache, shape) for shape in (deepseek, glm, *others)]
    backend.compile_attention(layers, torch.float32)
    assert not jobs
    backend.compile_attention(layers, torch.bfloat16)
    assert jobs == [(2, replace(deepseek, heads=8)), (2, glm)]


@pytest.mark.parametrize("head_dim", [12, 16])
def test_long_segments(backend: ModuleType, monkeypatch: pytest.MonkeyPatch, head_dim: int) -> None:
    """In pass after pass; of each, layer after layer. Heads of 12 channels are padded."""
    monkeypatch.setattr(backend, "padded_head", lambda *_: 16)
    monkeypatch.setattr(backend, "_Stages", Unstaged)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    plan = backend.make_segment_planner(3, head_dim, torch.float32, torch.device("cpu"))
    assert plan.shape == AttentionShape(3, 3, 16, None, scale=head_dim**-0.5)
    assert plan._plan_long.func.__self__._stages.number == 2  # of 8 MiB of the host's memory
    ran: list[int] = []
    run = Ragged.run
    monkeypatch.setattr(Ragged, "run", lambda self, *a: ran.append(len(a[0])) or run(self, *a))
    torch.manual_seed(0)
    for lengths in ([700], [20, 513, 30], [30, 20]):
        attend = plan(lengths)
        for _ in range(2):
            q, k, v = torch.randn(3, sum(lengths), 3, head_dim)
            expected = ops.Segments(lengths, torch.device("cpu")).attend(q, k, v)
            torch.testing.assert_close(attend(q, k, v), expected, rtol=1e-5, atol=1e-5)
    assert ran == [700, 700, 563, 563]


def test_other_gpus_and_dtypes_have_no_kernel_for_long_segments(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cpu")
    assert backend.make_segment_planner(3, 72, torch.float32, device).shape is None
    assert backend.make_segment_planner(3, 300, torch.bfloat16, device).shape is None
    monkeypatch.setattr(backend, "on_hopper", lambda _: False)
    assert backend.make_segment_planner(3, 72, torch.bfloat16, device).shape is None
