"""The operations of an NVIDIA GPU: FlashInfer for attention of prefill chunks, else Triton kernels.

Knows shapes and arithmetic; no models, no scheduling. `Ops` documents the functions; docstrings
here only add what is particular to this implementation.

Attention uses one kernel for each kind of row:

    decode rows              our split-KV kernel, which needs no plan from the host
    chunks from position 0   FlashInfer, over the K and V of the step itself, not from pages: a
                             tenth to a fifth faster
    other chunks             FlashInfer, over pages
    all chunks, if FlashInfer lacks a kernel (float32, unusual head sizes)
                             plain torch, as on a CPU: right, but slow

FlashInfer plans on the host (`plan`): it divides a step's attention among the multiprocessors
before the launch, and the plan serves all layers. FlashInfer's FlashAttention-3 kernels run on
Hopper, its FlashAttention-2 kernels on other GPUs.

FlashAttention-2 is faster for short chunks after long contexts; `are_short` tells which. It takes
minutes to compile, and layers with a window or a softcap do without it if they can.

Over float8 pages FlashAttention-3 needs float8 queries, and rounds the weights of values too. So
`rotate_and_store` keeps all heads of a step with chunks as pages hold K and V: with a scale of 1.
Queries are far below 448, the largest number of float8, and what is beyond becomes 448. Queries of
decode rows are not rounded. Nor are those of short chunks, nor of layers with a softcap, which
float8 kernels lack: there chunks over pages use FlashAttention-2, in twice the time. On other GPUs
nothing is rounded but what is read from pages.

Long segments of a vision tower have FlashAttention-3 too, on Hopper. It takes heads of 64, 128 and
256 channels, so that others are padded with zeros.

Latent attention has two forms. The absorbed one is our kernel over latents; each token is a row of
it. In the expanded one, latents are read back from the cache and multiplied by W_UK and W_UV, and
FlashInfer attends to the K and V of all heads. See latent_rows.py for which rows have which form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import Any

import flashinfer
import numpy as np
import torch
import torch.nn.functional as F
from flashinfer import BatchPrefillWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper
from torch import Tensor

from gllm_engine.attention_shape import AttentionShape, LatentShape
from gllm_engine.ops import fp8_product, int8_product, reference, triton
from gllm_engine.ops.batch import Batch, HostInts
from gllm_engine.ops.jit_cache import compile_all, tiny_chunk
from gllm_engine.ops.kernels import (
    ABSORBED_TOKENS,
    EXPANDED_BYTES,
    PARTIALS_BYTES,
    SCORE_BYTES,
    chunk_backend,
    has_chunk_kernels,
    has_short_chunks,
    on_hopper,
    padded_head,
    rounds_chunks,
)
from gllm_engine.ops.latent_rows import Expansion, expansion, places, split_memory
from gllm_engine.ops.prefill_rows import ListedPages, PrefillRows, are_short, prefill_rows
from gllm_engine.ops.protocol import (
    AttentionInputs,
    AttentionLayer,
    AttentionPlan,
    IndexQueries,
    Norm,
    PagedPlan,
    RotaryInputs,
)
from gllm_engine.ops.segments import Attend, SegmentPlanner
from gllm_engine.ops.triton import (
    RowPlan,
    gated_delta,
    gated_norm,
    gemv,
    is_single,
    layer_norm,
    make_one_shot_allreduce,
    mean_squares,
    prepare_inputs,
    rms_norm,
    rotate,
    rotate_and_store,
    sample_plain,
    store_index_key,
    store_latent,
)
from gllm_engine.ops.triton.moe import route, sum_experts
from gllm_engine.ops.weight import Fp8Weight, Int8Weight, PackedWeight, Rows, Weight

__all__ = [
    "activate",
    "add_linear",
    "attend",
    "attend_latent",
    "choose_tokens",
    "compile_attention",
    "gated_delta",
    "gated_linear",
    "gated_norm",
    "layer_norm",
    "linear",
    "make_one_shot_allreduce",
    "make_planner",
    "make_segment_planner",
    "mean_squares",
    "prepare_inputs",
    "rms_norm",
    "rotary_inputs",
    "rotate",
    "rotate_and_store",
    "route",
    "sample_plain",
    "store_index_key",
    "store_latent",
    "sum_experts",
]

# Bytes of one plan: FlashInfer's own default.
_PLAN_BYTES = 8 << 20
# Plans on their way to the device at once. It exceeds a runner's steps in flight, so that the host
# never waits for a copy.
_NUM_STAGES = 8
# The wrapper's attribute for its host buffer, from which it copies a plan to the device.
PINNED_BUFFER = "_pin_memory_int_workspace_buffer"


@dataclass
class FlashInferPlan(PagedPlan):
    """A plan for each kind of row; None if the step has no such row.

    Tokens are ordered: `decode` covers tokens 0 .. num_decode - 1; `chunks`, over pages, tokens
    num_decode .. first_fresh - 1; `fresh`, chunks from position 0, all tokens after them. If `slow`
    is given, it covers all tokens, and the other plans are None. `rounds`: whether the queries of
    fresh chunks are rounded to the dtype of pages; `rounds_paged`: those of other chunks.
    """

    num_decode: int
    first_fresh: int = 0
    decode: triton.KvSplits | None = None
    chunks: BatchPrefillWithPagedKVCacheWrapper | None = None
    fresh: BatchPrefillWithRaggedKVCacheWrapper | None = None
    rounds: bool = False
    rounds_paged: bool = False
    slow: reference.ReferencePlan | None = None
    scale: float | None = None
    softcap: float | None = None


@dataclass
class ExpandedChunks:
    """The chunks of a step whose K and V are made, `at_once` heads at a time."""

    wrapper: BatchPrefillWithRaggedKVCacheWrapper
    places: Tensor  # [keys] cache place of each latent, row after row
    at_once: int
    memory: Tensor  # [EXPANDED_BYTES] uint8, for latents, K and V


@dataclass
class LatentPlan(PagedPlan):
    """A plan of latent attention. Tokens are ordered: first those of the absorbed form, then those
    of `expanded`.
    """

    scale: float
    num_absorbed: int
    absorbed: list[tuple[slice, triton.KvSplits]]  # pieces of tokens, and what these attend to
    choice: triton.Choice | None = None  # None: tokens attend to their contexts; else all absorbed
    expanded: ExpandedChunks | None = None


def activate(x: Tensor, act: str, gated: bool, then: Weight | None = None) -> Rows:
    """See Ops.activate."""
    if isinstance(then, Fp8Weight):
        return fp8_product.activate(x, act, gated, then)
    return triton.activate(x, act, gated)


def _own_product(
    x: Tensor, weight: Tensor | PackedWeight, norm: Norm | None = None, gated: bool = False
) -> Callable[..., Tensor] | None:
    """Our kernel for products with x [rows, depth] if it beats the library's, else None."""
    if isinstance(weight, PackedWeight):
        return triton.packed_linear if triton.is_packed_product(weight, x) else None
    if is_single(x, weight):
        return gemv
    adjoining = norm is not None or x.is_contiguous()  # a norm runs first, and takes rows apart
    is_best = adjoining and triton.is_skinny(x, weight, gated) and on_hopper(x.device)
    return triton.skinny if is_best else None


def _unpacked(weight: Tensor | PackedWeight, x: Tensor) -> Tensor:
    """A plain matrix for 4-bit numbers, made anew for each product of so many rows."""
    if isinstance(weight, PackedWeight):
        return triton.dequantize_packed(weight, x.dtype)
    return weight


def linear(
    x: Rows,
    weight: Weight,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See Ops.linear."""
    if isinstance(weight, Fp8Weight):
        return fp8_product.linear(x, weight, bias, norm, out)
    assert isinstance(x, Tensor)
    if isinstance(weight, Int8Weight):
        return int8_product.linear(x, weight, bias, norm, out)
    if product := _own_product(x, weight, norm):
        return product(x, weight, bias, norm, out=out)
    weight = _unpacked(weight, x)
    x = x if norm is None else rms_norm(x, *norm)
    if out is None:
        return F.linear(x, weight, bias)
    if bias is None:
        return torch.mm(x, weight.T, out=out)
    return torch.addmm(bias, x, weight.T, out=out)


def gated_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    norm: Norm | None,
    then: Weight | None = None,
) -> Rows:
    """See Ops.gated_linear."""
    if isinstance(weight, Fp8Weight):
        hidden = fp8_product.gated_linear(x, weight, bias, norm)
    elif isinstance(weight, Int8Weight):
        hidden = int8_product.gated_linear(x, weight, bias, norm)
    else:
        product = _own_product(x, weight, norm, gated=True)
        hidden = product and product(x, weight, bias, norm, gated=True)
    if hidden is not None:
        return hidden
    return activate(linear(x, weight, bias, norm), "silu", True, then)


def add_linear(total: Tensor, x: Rows, weight: Weight, bias: Tensor | None) -> Tensor:
    """See Ops.add_linear. Without a bias, the sum with a plain product is rounded only once."""
    if isinstance(weight, Fp8Weight):
        return fp8_product.add_linear(total, x, weight, bias)
    assert isinstance(x, Tensor)
    if isinstance(weight, Int8Weight):
        return int8_product.add_linear(total, x, weight, bias)
    if product := _own_product(x, weight):
        return product(x, weight, bias, out=total, add=True)
    if bias is not None:
        total += bias
    return total.addmm_(x, _unpacked(weight, x).T)


def rotary_inputs(
    cos: Tensor, sin: Tensor, positions: Tensor, dtype: torch.dtype, interleaved: bool
) -> RotaryInputs:
    """See Ops.rotary_inputs; cos and sin are unchanged."""
    del dtype
    return RotaryInputs(cos, sin, interleaved, positions)


def attend(
    inputs: AttentionInputs,
    cache: Tensor,
    plan: AttentionPlan,
    tokens: Tensor | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See Ops.attend."""
    assert isinstance(plan, FlashInferPlan)
    if plan.slow is not None:
        return reference.attend(inputs, cache, plan.slow, tokens, sinks, out)
    q = inputs.q if tokens is None else inputs.q[tokens]
    n = plan.num_decode
    f = plan.first_fresh
    found = torch.empty_like(q) if out is None else out.view(q.shape)
    if plan.decode is not None:
        triton.decode_attention(
            q[:n], cache, plan.decode, found[:n], plan.scale, plan.softcap, sinks
        )
    kept = inputs.kept
    if plan.chunks is not None:
        some = kept[:, : q.shape[1]] if plan.rounds_paged and kept is not None else q
        _run(plan.chunks, some[n:f], cache, out=found[n:f], sinks=sinks)
    if plan.fresh is not None and kept is not None:
        some = kept[:, : q.shape[1]] if plan.rounds else q
        # With a softcap K and V are rounded, and q is not.
        k, v = kept[f:, -2 * cache.shape[3] :].to(some.dtype).chunk(2, 1)
        _run(plan.fresh, some[f:], k, v, out=found[f:], sinks=sinks)
    return found.flatten(1)


def _run(wrapper: Any, *inputs: Tensor, out: Tensor, sinks: Tensor | None) -> None:
    """FlashInfer's own kernels with sinks would have to be compiled besides those without."""
    # Of q, k and v, if these are float8.
    scales = (1.0, 1.0, 1.0) if inputs[0].dtype != out.dtype else ()
    if sinks is None:
        wrapper.run(*inputs, *scales, out=out)
    else:
        _, lse = wrapper.run(*inputs, *scales, out=out, return_lse=True)
        triton.apply_sinks(out, lse, sinks)


def attend_latent(
    q: Tensor,
    kv_up: Tensor,
    cache: Tensor,
    plan: AttentionPlan,
    tokens: Tensor | None = None,
    chosen: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See Ops.attend_latent."""
    assert isinstance(plan, LatentPlan)
    q = q if tokens is None else q[tokens]
    nope_dim = q.shape[2] - (cache.shape[4] - kv_up.shape[2])
    shape = (*q.shape[:2], kv_up.shape[1] - nope_dim)
    found = q.new_empty(shape) if out is None else out.view(shape)
    for rows, splits in plan.absorbed:
        some = None if chosen is None else chosen[rows]
        triton.attend_latent(q[rows], kv_up, cache, splits, plan.scale, found[rows], some)
    if plan.expanded is not None:
        n = plan.num_absorbed
        _attend_expanded(q[n:], kv_up, cache, plan.expanded, found[n:])
    return found.flatten(1)


def _attend_expanded(
    q: Tensor, kv_up: Tensor, cache: Tensor, chunks: ExpandedChunks, out: Tensor
) -> None:
    """As attend_latent, for the tokens of `chunks`: out [tokens, heads, value_dim] receives the
    result.
    """
    _, heads, key_dim = q.shape
    value_dim = out.shape[2]
    nope_dim = kv_up.shape[1] - value_dim
    keys = len(chunks.places)
    at_once = chunks.at_once
    latents, k, v = split_memory(
        chunks.memory.view(q.dtype),
        (keys, kv_up.shape[2]),
        (keys, at_once, key_dim),
        (keys, at_once, value_dim),
    )
    triton.gather_latents(cache, chunks.places, latents, k)
    of_heads = latents.expand(at_once, -1, -1)
    k_nope = k[..., :nope_dim].transpose(0, 1)
    w_uk, w_uv = kv_up.transpose(1, 2).split((nope_dim, value_dim), 2)
    for first in range(0, heads, at_once):
        some = slice(first, first + at_once)
        torch.bmm(of_heads, w_uk[some], out=k_nope)
        torch.bmm(of_heads, w_uv[some], out=v.transpose(0, 1))
        if at_once == heads:
            chunks.wrapper.run(q, k, v, out=out)
        else:  # FlashAttention-2 takes no `out` of some heads
            out[:, some] = chunks.wrapper.run(q[:, some], k, v)


def choose_tokens(
    queries: IndexQueries, cache: Tensor, plan: AttentionPlan, tokens: Tensor | None = None
) -> Tensor | None:
    """See Ops.choose_tokens."""
    assert isinstance(plan, LatentPlan)
    if plan.choice is None:
        return None
    if tokens is not None:
        queries = IndexQueries(queries.q[tokens], queries.weights[tokens])
    return triton.choose_tokens(queries, cache, plan.choice)


def compile_attention(layers: Sequence[AttentionLayer], dtype: torch.dtype) -> None:
    """See Ops.compile_attention; the compiled kernels are in jit_cache.cache_dirs()[0]."""
    # One kernel serves any number of heads; layers with a window, of any size, share another one.
    kinds = {}
    for layer in layers:
        kind = _kernel_kind(layer, dtype)
        if has_chunk_kernels(kind[0], dtype, kind[1]):
            kinds[kind] = layer
    if not kinds:
        return

    def plan(batch: Batch, layer: AttentionLayer) -> None:
        cache, shape = layer
        torch.cuda.set_device(cache.device)
        planner = FlashInferPlanner(cache.device, dtype, num_stages=1)
        if isinstance(shape, LatentShape):
            planner.plan_latent(batch, cache, replace(shape, top_k=None))
        else:
            planner.plan(batch, cache, shape)

    jobs = []
    for layer in kinds.values():
        cache = layer.cache
        # One kernel serves chunks with and without a context, but for short ones and over pages of
        # float8. A tower has no pages.
        starts = [0]
        if len(cache) and not isinstance(layer.shape, LatentShape):
            hopper = on_hopper(cache.device)
            if cache.dtype != dtype or has_short_chunks(hopper, layer.shape, dtype, cache.dtype):
                starts.append(1000)  # after which two tokens are a short chunk
        jobs += [(tiny_chunk(start, cache.shape[2], cache.device), layer) for start in starts]
    dims = sorted({dim for dim, *_ in kinds})
    what = f"attention of chunks, heads of {dims}, {dtype} over {layers[-1].cache.dtype}"
    compile_all(what, plan, jobs)


def _kernel_kind(layer: AttentionLayer, dtype: torch.dtype) -> tuple[int, int, bool, bool, bool]:
    """Channels of a key and of a value; whether there is no window, and no softcap; whether queries
    are rounded.
    """
    cache, shape = layer
    if isinstance(shape, LatentShape):
        return shape.key_dim, shape.value_dim, True, True, False
    rounds = rounds_chunks(on_hopper(cache.device), dtype, cache.dtype, shape.softcap)
    dim = shape.head_dim
    return dim, dim, shape.window is None, shape.softcap is None, rounds


class _Stages:
    """A ring of pinned buffers: FlashInfer writes a plan to one and copies it to the device.

    The copy waits on the stream behind earlier steps, so the next plan needs another buffer.
    """

    def __init__(self, number: int) -> None:
        ring = [torch.empty(_PLAN_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(number)]
        self._ring = cycle([(buffer, torch.cuda.Event()) for buffer in ring])

    def plan(self, wrapper: Any, *args: Any, **options: Any) -> None:
        """Call wrapper.plan(...) with a buffer that no pending copy reads."""
        buffer, copied = next(self._ring)
        copied.synchronize()
        # FlashInfer has one such buffer per wrapper, expects each copy to end before the next plan,
        # and offers no other way to change the buffer.
        setattr(wrapper, PINNED_BUFFER, buffer)
        wrapper.plan(*args, **options)
        copied.record()


def check_pinned_buffer(wrapper: Any) -> None:
    """Raise RuntimeError if the wrapper has no host buffer named PINNED_BUFFER.

    Then the plans of two steps in flight would share a buffer, and one step would attend with the
    other step's plan.
    """
    if not isinstance(getattr(wrapper, PINNED_BUFFER, None), Tensor):
        raise RuntimeError(
            f"flashinfer {flashinfer.__version__}: its {type(wrapper).__name__} has no "
            f"{PINNED_BUFFER}, which keeps the plans of steps in flight apart; version 0.7.2 has it"
        )


class FlashInferPlanner:
    """An AttentionPlanner that owns FlashInfer's workspaces and wrappers."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        partials_bytes: int = PARTIALS_BYTES,
        num_stages: int = _NUM_STAGES,
    ) -> None:
        """`dtype`: of the queries, and of the cache unless the cache is float8. FlashAttention-3
        has no partial results.
        """
        self._device = device
        self._dtype = dtype
        self._stages = _Stages(num_stages)
        self._partials = torch.zeros(partials_bytes, dtype=torch.uint8, device=device)
        self._wrappers: dict[tuple[Any, ...], Any] = {}
        # Of indexers and of latent attention, if a model has them; the layers use them one after
        # the other.
        self._scores: Tensor | None = None
        self._expanded: Tensor | None = None

    def plan(
        self,
        batch: Batch,
        cache: Tensor,
        shape: AttentionShape,
        group: int = 0,
    ) -> FlashInferPlan:
        """See AttentionPlanner.plan."""
        n = batch.num_decode
        plan = FlashInferPlan(batch.cache_index, n, scale=shape.scale, softcap=shape.softcap)
        window = shape.window
        if len(batch.query_lens) > n and not self._is_fast(cache, shape):
            plan.slow = reference.plan_attention(
                batch, cache, window, self._dtype, shape.scale, shape.softcap, shape.chunked
            )
            return plan
        if n:
            lens = batch.context_lens[:n]
            plan.decode = triton.split_kv(
                batch.page_table, batch.slots[:n], lens, shape.kv_heads, window, shape.chunked
            )
        if len(batch.query_lens) > n:
            rows = prefill_rows(batch, window if shape.chunked else None)
            self._plan_prefill(plan, rows, batch.page_table, cache, shape, group)
        return plan

    def _is_fast(self, cache: Tensor, shape: AttentionShape) -> bool:
        """Whether FlashInfer can attend so. Its rows begin with a page."""
        begins_pages = not shape.chunked or not shape.window or shape.window % cache.shape[2] == 0
        return begins_pages and has_chunk_kernels(shape.head_dim, self._dtype)

    def _plan_prefill(
        self,
        plan: FlashInferPlan,
        rows: PrefillRows,
        page_table: Tensor,
        cache: Tensor,
        shape: AttentionShape,
        group: int,
    ) -> None:
        """Add the plans of prefill chunks to `plan`."""
        paged = rows.num_paged
        plan.first_fresh = plan.num_decode + int(rows.query_lens[:paged].sum())
        hopper = on_hopper(self._device)
        plan.rounds = rounds_chunks(hopper, self._dtype, cache.dtype, shape.softcap)
        options = _options(shape, self._dtype)
        rounded = options | {"q_data_type": cache.dtype}
        if paged:
            some = rows.up_to(paged)
            short = has_short_chunks(hopper, shape, self._dtype, cache.dtype)
            short = short and are_short(some, shape.heads, cache.element_size())
            plan.rounds_paged = plan.rounds and not short
            of_pages = rounded if plan.rounds_paged else options
            backend = chunk_backend(hopper and not short, cache.dtype == of_pages["q_data_type"])
            plan.chunks = self._plan_chunks(some, page_table, cache, of_pages, backend, group)
        plan.keeps = plan.rounds_paged or paged < len(rows.ends)
        if paged < len(rows.ends):
            options = rounded if plan.rounds else options
            kind = BatchPrefillWithRaggedKVCacheWrapper
            backend = chunk_backend(hopper, True)
            plan.fresh = self._wrapper(kind, options, backend, group)
            starts = _starts(rows.query_lens[paged:])
            self._stages.plan(plan.fresh, starts, starts, **options)

    def plan_segments(self, lengths: list[int], shape: AttentionShape) -> Attend:
        """Of FlashAttention-3 within segments; valid until the next plan for this shape."""
        options = _options(shape, self._dtype) | {"causal": False}
        kind = BatchPrefillWithRaggedKVCacheWrapper
        wrapper = self._wrapper(kind, options, chunk_backend(True, True), group=0)
        starts = _starts(lengths)
        self._stages.plan(wrapper, starts, starts, **options)
        run: Attend = wrapper.run
        return run

    def plan_recurrent(self, batch: Batch) -> RowPlan:
        """See AttentionPlanner.plan_recurrent."""
        if len(batch.query_lens) == batch.num_decode:
            starts = torch.arange(len(batch.slots) + 1, dtype=torch.int32, device=self._device)
            return RowPlan(batch.slots, starts, None)
        return RowPlan(batch.slots, *triton.plan_rows(batch.query_lens, self._device))

    def plan_latent(
        self,
        batch: Batch,
        cache: Tensor,
        shape: LatentShape,
        group: int = 0,
    ) -> LatentPlan:
        """See AttentionPlanner.plan_latent."""
        page_size = cache.shape[2]
        top_k = shape.top_k
        # In a CUDA graph, no length is known on the host.
        longest = batch.page_table.shape[1] * page_size
        if len(batch.context_lens_cpu):
            longest = int(batch.context_lens_cpu.max())
        chooses = top_k is not None and longest > top_k
        expands: Expansion | None = None
        if not chooses and has_chunk_kernels(shape.key_dim, self._dtype, shape.value_dim):
            expands = expansion(batch, shape, cache.shape[4], self._dtype.itemsize)
        first = len(batch.query_lens) if expands is None else expands.first
        slots, lens = self._token_rows(batch, first)
        choice: triton.Choice | None = None
        if top_k is not None and chooses:
            if self._scores is None:
                self._scores = torch.empty(SCORE_BYTES // 4, device=self._device)
            choice = triton.plan_choice(batch.page_table, slots, lens, longest, top_k, self._scores)
            lens = lens.clamp(max=top_k)
        absorbed = []
        for start in range(0, len(slots), ABSORBED_TOKENS):
            rows = slice(start, min(start + ABSORBED_TOKENS, len(slots)))
            splits = triton.split_latents(batch.page_table, slots[rows], lens[rows], shape.heads)
            absorbed.append((rows, splits))
        plan = LatentPlan(batch.cache_index, shape.scale, len(slots), absorbed, choice)
        if expands is not None:
            plan.expanded = self._plan_expanded(batch, expands, shape, page_size, group)
        return plan

    def _token_rows(self, batch: Batch, end: int) -> tuple[Tensor, Tensor]:
        """Slots and lengths of contexts of all tokens of the rows before row `end`, which are all
        decode rows, and chunks.
        """
        if end == batch.num_decode:
            return batch.slots[:end], batch.context_lens[:end]
        query_lens = np.array(batch.query_lens[:end])
        copies = torch.from_numpy(query_lens).pin_memory().to(self._device, non_blocking=True)
        num_tokens = int(query_lens.sum())
        slots = batch.slots[:end].repeat_interleave(copies, output_size=num_tokens)
        return slots, batch.positions[:num_tokens] + 1

    def _plan_expanded(
        self, batch: Batch, rows: Expansion, shape: LatentShape, page_size: int, group: int
    ) -> ExpandedChunks:
        if self._expanded is None:
            self._expanded = torch.empty(EXPANDED_BYTES, dtype=torch.uint8, device=self._device)
        options = {
            "num_qo_heads": rows.at_once,
            "num_kv_heads": rows.at_once,
            "head_dim_qk": shape.key_dim,
            "head_dim_vo": shape.value_dim,
            "causal": True,
            "q_data_type": self._dtype,
            "sm_scale": shape.scale,
        }
        kind = BatchPrefillWithRaggedKVCacheWrapper
        backend = chunk_backend(on_hopper(self._device), True)
        wrapper = self._wrapper(kind, options, backend, group)
        queries = _starts(batch.query_lens[rows.first :])
        keys = _starts(batch.context_lens_cpu[rows.first :])
        self._stages.plan(wrapper, queries, keys, **options)
        of_keys = places(batch, slice(rows.first, None), page_size)
        return ExpandedChunks(wrapper, of_keys, rows.at_once, self._expanded)

    def _plan_chunks(
        self,
        rows: PrefillRows,
        page_table: Tensor,
        cache: Tensor,
        options: dict[str, Any],
        backend: str,
        group: int,
    ) -> BatchPrefillWithPagedKVCacheWrapper:
        wrapper = self._wrapper(BatchPrefillWithPagedKVCacheWrapper, options, backend, group)
        page_size = cache.shape[2]
        pages = ListedPages(rows, page_size, window=options["window_left"] + 1)
        listed = torch.empty(int(pages.starts[-1]), dtype=torch.int32, device=self._device)
        starts, firsts = pages.to(self._device)
        triton.list_pages(page_table, rows.slots, starts, firsts, pages.longest, listed)
        self._stages.plan(
            wrapper,
            _starts(rows.query_lens),
            pages.starts,
            listed,
            pages.lasts,
            page_size=page_size,
            kv_data_type=cache.dtype,
            **options,
        )
        return wrapper

    def _wrapper(self, kind: type, options: dict[str, Any], backend: str, group: int) -> Any:
        """The wrapper of a kind for `options` from _options, a backend and a group, made at the
        first call.
        """
        key = (kind, backend, group, *options.values())
        if key not in self._wrappers:
            wrapper = kind(self._partials, backend=backend)
            check_pinned_buffer(wrapper)
            # For its plans on the device: the stream overwrites a plan after its last use.
            memory = torch.empty(_PLAN_BYTES, dtype=torch.uint8, device=self._device)
            wrapper.reset_workspace_buffer(self._partials, memory)
            self._wrappers[key] = wrapper
        return self._wrappers[key]


def make_planner(device: torch.device, dtype: torch.dtype) -> FlashInferPlanner:
    """See Ops.make_planner."""
    return FlashInferPlanner(device, dtype)


def make_segment_planner(
    heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> SegmentPlanner:
    """See Ops.make_segment_planner. On Hopper long segments have FlashAttention-3, which is faster
    than torch's FlashAttention-2 even with padded heads.
    """
    width = padded_head(head_dim, dtype)
    if width is None or not on_hopper(device):
        return SegmentPlanner(device)
    # A pass has one plan. While the host waits for the last but one to be copied, the GPU has work.
    planner = FlashInferPlanner(device, dtype, _PLAN_BYTES, num_stages=2)
    shape = AttentionShape(heads, heads, width, None, scale=head_dim**-0.5)
    return SegmentPlanner(device, shape, partial(planner.plan_segments, shape=shape))


def _options(shape: AttentionShape, dtype: torch.dtype) -> dict[str, Any]:
    """The options of FlashInfer's plans for queries of `dtype`. Rows of chunked attention end with
    their chunk, so that these have no window.
    """
    return {
        "num_qo_heads": shape.heads,
        "num_kv_heads": shape.kv_heads,
        "head_dim_qk": shape.head_dim,
        "causal": True,
        "q_data_type": dtype,
        "o_data_type": dtype,
        "window_left": shape.window - 1 if shape.window is not None and not shape.chunked else -1,
        "sm_scale": shape.scale,
        "logits_soft_cap": shape.softcap,
    }


def _starts(lens: Sequence[int] | HostInts) -> Tensor:
    """Offsets of rows of `lens` tokens, and the total: [rows + 1] int32, pinned."""
    return torch.from_numpy(np.array([0, *lens]).cumsum(dtype=np.int32)).pin_memory()
