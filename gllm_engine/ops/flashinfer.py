"""The operations of an NVIDIA GPU: attention by FlashInfer, the rest by our Triton kernels.

Knows shapes and arithmetic; no models, no scheduling. FlashInfer divides a step's attention among
the multiprocessors ahead, on the host (`plan`); what it then launches is the same for all layers.
Decode rows go to its tensor-core decode kernel, chunks to its FlashAttention-3 kernel; chunks at
the beginning of a sequence read K and V as they come, not from pages, which is a fifth faster.

Over a float8 cache queries keep their dtype, which FlashInfer's FlashAttention-3 kernel cannot do:
chunks that read pages go to its FlashAttention-2 kernel there. Chunks at the beginning of a
sequence attend to K and V before they are rounded, where the reference attends to the cache.

What FlashInfer has no kernel for (float32, unusual head sizes) attends as on a CPU, in plain torch:
right, but slow, and not in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flashinfer import (
    BatchDecodeWithPagedKVCacheWrapper,
    BatchPrefillWithPagedKVCacheWrapper,
    BatchPrefillWithRaggedKVCacheWrapper,
)
from torch import Tensor

from gllm_engine.ops import reference, triton
from gllm_engine.ops.batch import Batch, HostInts
from gllm_engine.ops.triton import add_rms_norm, lay_out, rms_norm, sample, silu_mul

__all__ = [
    "Planner", "add_rms_norm", "attend", "lay_out", "rms_norm", "rotate_and_store", "rotation",
    "sample", "silu_mul",
]  # fmt: skip

_HEAD_DIMS = (64, 128, 256)
_DTYPES = (torch.bfloat16, torch.float16)
# Bytes for the partial results of rows that several multiprocessors share.
_PARTIALS_BYTES = 384 << 20
# Bytes of one plan; FlashInfer's own figure.
_PLAN_BYTES = 8 << 20
# Plans on their way to the device at once. More than a runner has steps in flight: then the host
# never waits for a copy.
_NUM_STAGES = 8


@dataclass(frozen=True)
class Turn:
    """Where to find each token's cosines and sines."""

    tables: tuple[Tensor, Tensor]  # [positions, dim / 2] float32
    positions: Tensor  # [tokens] int64


@dataclass(frozen=True)
class Heads:
    """Normed and rotated heads of a step's tokens."""

    q: Tensor  # [tokens, heads, head_dim]
    kv: Tensor | None  # [tokens, 2 * kv_heads, head_dim], as in the cache; None: nobody asks


@dataclass
class AttentionPlan:
    """Attention of one batch, the same for all layers that share a window.

    Rows are decode rows, then chunks with K and V in the cache already, then `fresh` ones: wrappers
    for the tokens up to `num_decode`, `first_fresh`, and the rest. With `slow`, that alone.
    """

    cache_index: Tensor  # [tokens] where K and V go
    num_decode: int
    first_fresh: int = 0
    decode: BatchDecodeWithPagedKVCacheWrapper | None = None
    chunks: BatchPrefillWithPagedKVCacheWrapper | None = None
    fresh: BatchPrefillWithRaggedKVCacheWrapper | None = None
    slow: reference.AttentionPlan | None = None


def rotation(
    cos: Tensor, sin: Tensor, positions: Tensor, dtype: torch.dtype, interleaved: bool
) -> Turn:
    """As reference.rotation; nothing is computed ahead."""
    del dtype, interleaved
    return Turn((cos, sin), positions)


def rotate_and_store(
    qkv: Tensor,
    heads: int,
    norm: Tensor | None,
    eps: float,
    turn: Turn,
    interleaved: bool,
    cache: Tensor,
    plan: AttentionPlan,
) -> Heads:
    """As reference.rotate_and_store."""
    tables, positions, keeps_kv = turn.tables, turn.positions, plan.fresh is not None
    q, kv = triton.rotate_and_store(
        qkv, heads, norm, eps, tables, positions, interleaved, cache, plan.cache_index, keeps_kv
    )
    return Heads(q, kv)


def attend(heads: Heads, cache: Tensor, plan: AttentionPlan) -> Tensor:
    """softmax(q k' / sqrt(head_dim)) v over each row's pages: [tokens, heads * head_dim]."""
    q = heads.q
    if plan.slow is not None:
        return reference.attend(q, cache, plan.slow)
    out = torch.empty_like(q)
    n, f = plan.num_decode, plan.first_fresh
    if plan.decode is not None:
        plan.decode.run(q[:n], cache, out=out[:n])
    if plan.chunks is not None:
        plan.chunks.run(q[n:f], cache, out=out[n:f])
    if plan.fresh is not None and heads.kv is not None:
        k, v = heads.kv[f:].chunk(2, 1)
        plan.fresh.run(q[f:], k, v, out=out[f:])
    return out.flatten(1)


class _Stages:
    """Pinned memory that plans are written to before they are copied to the device.

    The copy waits its turn behind earlier steps, so the next plan must be written elsewhere.
    """

    def __init__(self) -> None:
        self._buffers = [
            torch.empty(_PLAN_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(_NUM_STAGES)
        ]
        self._copied = [torch.cuda.Event() for _ in range(_NUM_STAGES)]
        self._next = 0

    def plan(self, wrapper: Any, *args: Any, **options: Any) -> None:
        """wrapper.plan(...), by way of a buffer that no copy under way reads."""
        stage = self._next
        self._next = (stage + 1) % _NUM_STAGES
        self._copied[stage].synchronize()
        # FlashInfer has one such buffer a wrapper and expects each plan to be complete before the
        # next; it offers no other way to change it.
        wrapper._pin_memory_int_workspace_buffer = self._buffers[stage]
        wrapper.plan(*args, **options)
        self._copied[stage].record()


class Planner:
    """Prepares attention of one step after another. Owns FlashInfer's workspaces and wrappers.

    A plan is valid until the next one for the same window; steps run in the order of their plans.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """`dtype`: of the queries, and of the cache unless that is float8."""
        self._device, self._dtype = device, dtype
        self._stages = _Stages()
        self._partials = torch.zeros(_PARTIALS_BYTES, dtype=torch.uint8, device=device)
        self._decode: dict[int | None, BatchDecodeWithPagedKVCacheWrapper] = {}
        self._chunks: dict[int | None, BatchPrefillWithPagedKVCacheWrapper] = {}
        self._fresh: dict[int | None, BatchPrefillWithRaggedKVCacheWrapper] = {}
        self._plans: dict[tuple[str, int | None], Tensor] = {}
        self._listed = torch.empty(0, dtype=torch.int32, device=device)

    def plan(self, batch: Batch, cache: Tensor, heads: int, window: int | None) -> AttentionPlan:
        """Prepare attention for one step.

        `cache`: any layer's; only its shape and dtype are used. `heads`: query heads.
        `window`: a token sees itself and the window - 1 tokens before it; None: all before it.
        """
        plan = AttentionPlan(batch.cache_index, batch.num_decode)
        if not self.has_fixed(cache):
            plan.slow = reference.plan_attention(batch, cache, window, self._dtype)
            return plan
        pages, shape = _Pages(batch, cache.shape[2]), _shape(cache, heads, window, self._dtype)
        n, end = batch.num_decode, len(batch.query_lens)
        first = end
        while first > n and batch.query_lens[first - 1] == batch.context_lens_cpu[first - 1]:
            first -= 1
        plan.first_fresh = sum(batch.query_lens[:first])
        if n:
            plan.decode = self._decode_wrapper(window)
            arguments = (pages.starts_cpu[: n + 1], pages.listed, pages.lasts_cpu[:n])
            self._stages.plan(plan.decode, *arguments, **shape)
        if first > n:
            plan.chunks = self._chunk_wrapper(window, cache.dtype)
            self._plan_chunks(plan.chunks, batch.query_lens[n:first], pages, n, shape)
        if end > first:
            plan.fresh = self._fresh_wrapper(window)
            starts = _starts(batch.query_lens[first:])
            # Without a dtype of their own, keys and values have the queries'.
            paged = ("page_size", "kv_data_type")
            shape = _for_chunks({k: v for k, v in shape.items() if k not in paged})
            self._stages.plan(plan.fresh, starts, starts, causal=True, **shape)
        return plan

    def has_fixed(self, cache: Tensor) -> bool:
        """Whether FlashInfer attends over this cache, so that `fixed` may be used for it."""
        return self._dtype in _DTYPES and cache.shape[4] in _HEAD_DIMS

    def fixed(self, num_rows: int, max_pages: int, window: int | None) -> FixedDecode:
        """Decode of always `num_rows` rows on memory that stays where it is, for a CUDA graph.

        Such plans share memory, so each must be refreshed before use; ask for the largest first.
        """
        size = num_rows * max_pages
        if len(self._listed) < size:
            self._listed = self._listed.new_zeros(size)
        plans = self._plan_memory("decode", window)
        memory = self._partials, plans, self._listed[:size]
        return FixedDecode(num_rows, max_pages, window, self._dtype, memory, self._stages)

    def _plan_chunks(
        self, wrapper: Any, lens: list[int], pages: _Pages, row: int, shape: dict[str, Any]
    ) -> None:
        """Plan chunks of `lens` tokens, which are the rows from `row` on."""
        starts = pages.starts_cpu[row : row + len(lens) + 1]
        self._stages.plan(
            wrapper,
            _starts(lens),
            (starts - starts[0]).pin_memory(),
            pages.listed[int(starts[0]) : int(starts[-1])],
            pages.lasts_cpu[row : row + len(lens)],
            causal=True,
            **_for_chunks(shape),
        )

    def _decode_wrapper(self, window: int | None) -> BatchDecodeWithPagedKVCacheWrapper:
        if window not in self._decode:
            wrapper = BatchDecodeWithPagedKVCacheWrapper(
                self._partials, use_tensor_cores=True, backend="fa2"
            )
            wrapper.reset_workspace_buffer(self._partials, self._plan_memory("decode", window))
            self._decode[window] = wrapper
        return self._decode[window]

    def _chunk_wrapper(
        self, window: int | None, dtype: torch.dtype
    ) -> BatchPrefillWithPagedKVCacheWrapper:
        """`dtype`: the cache's, always the same."""
        if window not in self._chunks:
            backend = "fa3" if dtype == self._dtype else "fa2"
            wrapper = BatchPrefillWithPagedKVCacheWrapper(self._partials, backend=backend)
            wrapper.reset_workspace_buffer(self._partials, self._plan_memory("chunks", window))
            self._chunks[window] = wrapper
        return self._chunks[window]

    def _fresh_wrapper(self, window: int | None) -> BatchPrefillWithRaggedKVCacheWrapper:
        if window not in self._fresh:
            wrapper = BatchPrefillWithRaggedKVCacheWrapper(self._partials, backend="fa3")
            wrapper.reset_workspace_buffer(self._partials, self._plan_memory("fresh", window))
            self._fresh[window] = wrapper
        return self._fresh[window]

    def _plan_memory(self, kind: str, window: int | None) -> Tensor:
        """Device memory for plans of one kind: each is used up before the next overwrites it."""
        key = kind, window
        if key not in self._plans:
            self._plans[key] = torch.empty(_PLAN_BYTES, dtype=torch.uint8, device=self._device)
        return self._plans[key]


class _Pages:
    """The pages of a batch's rows in FlashInfer's form: one list, and where each row begins."""

    def __init__(self, batch: Batch, page_size: int) -> None:
        self.starts_cpu, self.lasts_cpu, longest = count_pages(batch.context_lens_cpu, page_size)
        device = batch.page_table.device
        total = int(self.starts_cpu[-1])
        self.listed = torch.empty(total, dtype=torch.int32, device=device)
        starts = self.starts_cpu.to(device, non_blocking=True)
        triton.list_pages(batch.page_table, batch.slots, starts, longest, self.listed)


def count_pages(context_lens: HostInts, page_size: int) -> tuple[Tensor, Tensor, int]:
    """(where each row's pages start [rows + 1], tokens in its last page [rows], most pages of a
    row). Both int32 in pinned memory, so that copying them to the device waits for nothing.
    """
    lens = np.asarray(context_lens, np.int32)
    counts = (lens + (page_size - 1)) // page_size
    packed = np.zeros(2 * len(lens) + 1, np.int32)
    counts.cumsum(out=packed[1 : len(lens) + 1])
    packed[len(lens) + 1 :] = lens - (counts - 1) * page_size
    pinned = torch.from_numpy(packed).pin_memory()
    return pinned[: len(lens) + 1], pinned[len(lens) + 1 :], int(counts.max())


def _shape(cache: Tensor, heads: int, window: int | None, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "num_qo_heads": heads,
        "num_kv_heads": cache.shape[3],
        "head_dim": cache.shape[4],
        "page_size": cache.shape[2],
        "q_data_type": dtype,
        "kv_data_type": cache.dtype,
        "window_left": -1 if window is None else window - 1,
    }


def _for_chunks(shape: dict[str, Any]) -> dict[str, Any]:
    """The same in the words of FlashInfer's prefill."""
    return {"head_dim_qk" if key == "head_dim" else key: value for key, value in shape.items()}


def _starts(lens: list[int]) -> Tensor:
    """Where each of some rows of `lens` tokens begins, and where the last ends; pinned int32."""
    return torch.from_numpy(np.array([0, *lens]).cumsum(dtype=np.int32)).pin_memory()


class FixedDecode:
    """A decode plan whose tensors keep their addresses, so that a graph may have them inside.

    `listing` belongs inside the graph, `refresh` before each replay.
    """

    def __init__(
        self,
        num_rows: int,
        max_pages: int,
        window: int | None,
        dtype: torch.dtype,
        memory: tuple[Tensor, Tensor, Tensor],
        stages: _Stages,
    ) -> None:
        partials, plans, self._listed = memory
        integers = {"dtype": torch.int32, "device": partials.device}
        self._starts = torch.zeros(num_rows + 1, **integers)
        self._max_pages, self._window, self._dtype = max_pages, window, dtype
        self._stages = stages
        self.wrapper = BatchDecodeWithPagedKVCacheWrapper(
            partials,
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=self._starts,
            paged_kv_indices_buffer=self._listed,
            paged_kv_last_page_len_buffer=torch.zeros(num_rows, **integers),
            backend="fa2",
        )
        self.wrapper.reset_workspace_buffer(partials, plans)

    def refresh(self, context_lens: HostInts, cache: Tensor, heads: int) -> None:
        """Plan for rows of these lengths; as many as the graph has."""
        starts, lasts, _ = count_pages(context_lens, cache.shape[2])
        shape = _shape(cache, heads, self._window, self._dtype)
        self._stages.plan(self.wrapper, starts, self._listed[:0], lasts, **shape)

    def listing(self, page_table: Tensor, slots: Tensor, cache_index: Tensor) -> AttentionPlan:
        """List the rows' pages; the plan to attend with."""
        triton.list_pages(page_table, slots, self._starts, self._max_pages, self._listed)
        return AttentionPlan(cache_index, slots.shape[0], decode=self.wrapper)
