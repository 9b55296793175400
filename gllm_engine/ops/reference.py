"""Every operation in plain torch: the CPU backend, and the oracle that kernels are tested against.

Knows shapes and arithmetic; no models, no scheduling. `Ops` documents the functions.

Paged attention gathers the K and V of several rows into one padded tensor, then computes all these
rows at once. The padding of a row repeats a token of that row, so unused cache places (which may
hold NaN) are never read: a masked NaN in V would still reach the output as 0 * NaN.

A cache may be float8_e4m3fn whatever the dtype of q, k and v. Then every token attends to rounded K
and V, also to those of its own step, so that the result does not depend on the cut of a prompt into
chunks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gllm_engine.attention_shape import AttentionShape, LatentShape
from gllm_engine.ops.batch import Batch, TensorGroup
from gllm_engine.ops.protocol import (
    AttentionInputs,
    AttentionLayer,
    AttentionPlan,
    HeadNorm,
    IndexQueries,
    Norm,
    PagedPlan,
    PlainSampling,
    RecurrentState,
    RotaryInputs,
)
from gllm_engine.ops.segments import SegmentPlanner
from gllm_engine.ops.weight import Rows, Weight, dequantized
from gllm_engine.routing import Clamp, Routing

# Most K and V elements gathered at once: 1 MiB of float32, which fits a CPU's cache.
_GATHER_NUMBERS = 1 << 18
# The inverse CDF first finds a group of GROUP_LEN tokens, then the token in it. A scan of the whole
# vocabulary in float64 would take several times as long as the rest of the sampler.
GROUP_LEN = 128
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def rms_norm(
    x: Tensor,
    gain: Tensor,
    eps: float,
    add_to: Tensor | None = None,
    plus_one: bool = False,
    add_after: Tensor | None = None,
) -> Tensor:
    """See Ops.rms_norm; x of any shape."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    normed = F.rms_norm(wide, x.shape[-1:], None, eps)
    normed = _times_gain(normed, gain, plus_one, x.dtype)
    if add_after is not None:
        x += add_after
    return normed if add_to is None else add_to.add_(normed)


def _times_gain(normed: Tensor, gain: Tensor, plus_one: bool, dtype: torch.dtype) -> Tensor:
    if plus_one:
        return (normed * (1 + gain.to(normed.dtype))).to(dtype)
    return normed.to(dtype).mul_(gain)


def layer_norm(
    x: Tensor, gain: Tensor, bias: Tensor | None, eps: float, add_after: Tensor | None = None
) -> Tensor:
    """See Ops.layer_norm."""
    wide = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(wide)
    normed = F.layer_norm(x.to(wide), x.shape[-1:], gain.to(wide), bias, eps).to(x.dtype)
    if add_after is not None:
        x += add_after
    return normed


def activate(x: Tensor, act: str, gated: bool, then: Weight | None = None) -> Tensor:
    """See Ops.activate; x of any shape."""
    del then
    if gated:
        gate, up = x.chunk(2, dim=-1)
        return activate(gate, act, gated=False).mul_(up)
    if act == "silu":
        return F.silu(x)
    if act == "gelu_quick":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")


def linear(
    x: Rows,
    weight: Weight,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See Ops.linear."""
    assert isinstance(x, Tensor)
    x = x if norm is None else rms_norm(x, *norm)
    y = F.linear(x, dequantized(weight, x.dtype), bias)
    return y if out is None else out.copy_(y)


def gated_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    norm: Norm | None,
    then: Weight | None = None,
) -> Tensor:
    """See Ops.gated_linear."""
    del then
    return activate(linear(x, weight, bias, norm), "silu", gated=True)


def add_linear(total: Tensor, x: Rows, weight: Weight, bias: Tensor | None) -> Tensor:
    """See Ops.add_linear."""
    return total.add_(linear(x, weight, bias))


def make_one_shot_allreduce(ranks: TensorGroup, dim: int, dtype: torch.dtype) -> None:
    """See Ops.make_one_shot_allreduce; a CPU has no such kernel."""
    del ranks, dim, dtype


def route(logits: Tensor, routing: Routing, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """See Ops.route."""
    logits = logits.float()
    scores = logits.sigmoid() if routing.scoring == "sigmoid" else logits.softmax(-1)
    choices = _known(logits if bias is None else scores + bias)
    if routing.groups > 1:
        choices = _keep_groups(choices, routing, best=1 if bias is None else 2)
    experts = choices.sort(stable=True, descending=True).indices[:, : routing.top_k]
    weights = scores.gather(1, experts)
    if routing.renorm:
        total = weights.sum(-1, keepdim=True) + routing.sum_eps
        weights = weights / total.clamp(min=routing.least_sum)
    return weights * routing.scale, experts.int()


def _known(choices: Tensor) -> Tensor:
    """`choices` with the least finite number for NaN and -inf, so that they have an order."""
    least = torch.finfo(choices.dtype).min
    return torch.where(choices > least, choices, least)


def _keep_groups(choices: Tensor, routing: Routing, best: int) -> Tensor:
    """`choices` with -inf outside the kept groups. A group is ranked by its `best` largest."""
    tokens, experts = choices.shape
    grouped = choices.view(tokens, routing.groups, experts // routing.groups)
    ranks = _known(grouped.topk(best).values.sum(-1))
    order = ranks.sort(stable=True, descending=True).indices
    dropped = torch.ones_like(ranks, dtype=torch.bool)
    dropped.scatter_(1, order[:, : routing.kept_groups], False)
    return grouped.masked_fill(dropped.unsqueeze(-1), -inf).flatten(1)


def _clamped(gate_and_up: Tensor, clamp: Clamp) -> Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    gate = gate.clamp(max=clamp.limit)
    up = up.clamp(-clamp.limit, clamp.limit)
    return (up + 1) * gate * torch.sigmoid(clamp.slope * gate)


def sum_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Weight,
    down: Weight,
    first: int,
    num_experts: int,
    total: Tensor | None = None,
    on_input: bool = False,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
    clamp: Clamp | None = None,
) -> Tensor:
    """See Ops.sum_experts."""
    del num_experts
    dtype = torch.promote_types(x.dtype, torch.float32)
    parts = x.new_zeros(*experts.shape, x.shape[1], dtype=dtype)
    for i in range(len(gate_up)):
        chosen = experts == first + i
        rows = x[chosen.nonzero()[:, 0]]
        if on_input:
            rows = (rows * weights[chosen].unsqueeze(1)).to(x.dtype)
        if len(rows):
            first_bias, last_bias = (None if b is None else b[i] for b in biases)
            gate_and_up = linear(rows, gate_up[i], first_bias)
            hidden = (
                _clamped(gate_and_up, clamp) if clamp else activate(gate_and_up, "silu", gated=True)
            )
            parts[chosen] = linear(hidden, down[i], last_bias).to(dtype)
    weights = torch.ones_like(weights) if on_input else weights
    summed = torch.einsum("tkd,tk->td", parts, weights.to(dtype)).to(x.dtype)
    return summed if total is None else total.add_(summed)


def rotary_inputs(
    cos: Tensor, sin: Tensor, positions: Tensor, dtype: torch.dtype, interleaved: bool
) -> RotaryInputs:
    """See Ops.rotary_inputs; for `rotate`."""
    return expand_rotation(cos[positions].to(dtype), sin[positions].to(dtype), interleaved)


def mean_squares(qkv: Tensor, num_heads: int) -> Tensor:
    """See Ops.mean_squares."""
    kv_heads = (qkv.shape[1] - num_heads) // 2
    parts = qkv[:, : num_heads + kv_heads].float().square().split((num_heads, kv_heads), 1)
    return torch.stack([part.mean((1, 2)) for part in parts], 1)


def rotate_and_store(
    qkv: Tensor,
    num_heads: int,
    norm: HeadNorm | None,
    rotary: RotaryInputs | None,
    cache: Tensor,
    plan: AttentionPlan,
    query_scale: Tensor | None = None,
) -> AttentionInputs:
    """See Ops.rotate_and_store; K and V are always read from the cache."""
    assert isinstance(plan, PagedPlan)
    kv_heads = (qkv.shape[1] - num_heads) // 2
    qk = qkv[:, : num_heads + kv_heads]
    q = qkv[:, :num_heads]
    if norm is not None and not norm.after:
        qk.copy_(_norm_heads(qk, num_heads, norm))
    if rotary is not None:
        rotate(qk, rotary)
    if norm is not None and norm.after:
        qk.copy_(_norm_heads(qk, num_heads, norm))
    if query_scale is not None:
        q.copy_(q * query_scale[:, None, None])
    write_kv(cache, qkv[:, num_heads:].unflatten(1, (2, kv_heads)), plan)
    return AttentionInputs(q)


def _norm_heads(qk: Tensor, num_heads: int, norm: HeadNorm) -> Tensor:
    if norm.means is None:
        return rms_norm(qk, norm.gain, norm.eps, plus_one=norm.plus_one)
    counts = torch.tensor([num_heads, qk.shape[1] - num_heads], device=qk.device)
    means = norm.means.repeat_interleave(counts, 1, output_size=qk.shape[1])
    normed = qk * torch.rsqrt(means + norm.eps)[..., None]  # in float32
    return _times_gain(normed, norm.gain, norm.plus_one, qk.dtype)


def rotate(x: Tensor, rotary: RotaryInputs) -> Tensor:
    """See Ops.rotate. Of every head the first channels are rotated, in place.

    `rotary`: from `expand_rotation`, whose cos and sin are [tokens, 1, dim].
    """
    turned = x[..., : rotary.cos.shape[-1]]
    wide = turned.to(rotary.cos.dtype)
    if rotary.interleaved:
        partner = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        partner = wide.roll(wide.shape[-1] // 2, -1)
    turned.copy_(wide.mul_(rotary.cos).addcmul_(partner, rotary.sin))
    return x


def expand_rotation(cos: Tensor, sin: Tensor, interleaved: bool) -> RotaryInputs:
    """Expand [tokens, dim / 2] to [tokens, 1, dim] for `rotate`; sin gets the channel's sign."""
    if interleaved:
        cos = cos.repeat_interleave(2, -1)
        sin = torch.stack((-sin, sin), -1).flatten(-2)
    else:
        cos = torch.cat((cos, cos), -1)
        sin = torch.cat((-sin, sin), -1)
    return RotaryInputs(cos[:, None], sin[:, None], interleaved)


@dataclass(frozen=True)
class _Padded:
    """Decode rows whose attention is computed at once, padded to the same length."""

    rows: Tensor  # [n]
    gather: Tensor  # [2 * n * len] row indices of the flat cache: all K, then all V
    mask: Tensor  # [n, 1, 1, len] 0 or -inf, in the queries' dtype


@dataclass(frozen=True)
class _Chunk:
    """One prefill chunk."""

    tokens: slice
    gather: Tensor  # [2 * len]
    mask: Tensor | None  # [tokens, len]; None: causal from position 0


@dataclass
class ReferencePlan(PagedPlan):
    """What attention gathers from the cache for a batch."""

    padded: list[_Padded]
    chunks: list[_Chunk]
    scale: float | None = None
    softcap: float | None = None
    top_k: int | None = None  # tokens that an indexer chooses; None: no row has more of them


@dataclass(frozen=True)
class RowPlan(AttentionPlan):
    """The rows of a batch: decode rows, then chunks."""

    slots: Tensor  # [rows]
    query_lens: list[int]
    num_decode: int


class ReferencePlanner:
    """An AttentionPlanner without memory between steps."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """`dtype`: of the queries."""
        del device
        self._dtype = dtype

    def plan(
        self,
        batch: Batch,
        cache: Tensor,
        shape: AttentionShape,
        group: int = 0,
    ) -> ReferencePlan:
        """See AttentionPlanner.plan."""
        del group
        return plan_attention(
            batch, cache, shape.window, self._dtype, shape.scale, shape.softcap, shape.chunked
        )

    def plan_recurrent(self, batch: Batch) -> RowPlan:
        """See AttentionPlanner.plan_recurrent."""
        return RowPlan(batch.slots, batch.query_lens, batch.num_decode)

    def plan_latent(
        self,
        batch: Batch,
        cache: Tensor,
        shape: LatentShape,
        group: int = 0,
    ) -> ReferencePlan:
        """See AttentionPlanner.plan_latent."""
        del group
        plan = plan_attention(batch, cache, None, self._dtype, shape.scale)
        if shape.top_k is None or batch.context_lens_cpu.max() <= shape.top_k:
            return plan
        return replace(plan, top_k=shape.top_k)


def make_planner(device: torch.device, dtype: torch.dtype) -> ReferencePlanner:
    """See Ops.make_planner."""
    return ReferencePlanner(device, dtype)


def make_segment_planner(
    heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> SegmentPlanner:
    """See Ops.make_segment_planner."""
    del heads, head_dim, dtype
    return SegmentPlanner(device)


def compile_attention(layers: Sequence[AttentionLayer], dtype: torch.dtype) -> None:
    """See Ops.compile_attention; torch needs no compilation."""
    del layers, dtype


def plan_attention(
    batch: Batch,
    cache: Tensor,
    window: int | None,
    dtype: torch.dtype | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    chunked: bool = False,
) -> ReferencePlan:
    """As AttentionPlanner.plan. `dtype`: of the queries; None: the dtype of the cache."""
    num_planes, page_size = cache.shape[1:3]
    kv_width = cache.shape[3] * cache.shape[4]
    lens = batch.context_lens_cpu.tolist()
    num_pages = -(-max(lens) // page_size)
    table = batch.page_table[:, :num_pages].index_select(0, batch.slots)
    ends = batch.context_lens_cpu[: batch.num_decode]
    spans = (ends - _first_seen(ends - 1, window, chunked)).tolist()
    padded = [
        _plan_padded(batch, table, rows, spans[rows[0]], cache, window, chunked, dtype)
        for rows in _group_rows(spans, _GATHER_NUMBERS // (num_planes * kv_width))
    ]
    chunks = []
    first = batch.num_decode
    for row in range(batch.num_decode, len(batch.query_lens)):
        num = batch.query_lens[row]
        pages = table[row : row + 1]
        chunks.append(_plan_chunk(pages, first, num, lens[row], cache.shape, window, chunked))
        first += num
    return ReferencePlan(batch.cache_index, padded, chunks, scale, softcap)


def _first_seen(positions: Any, window: int | None, chunked: bool) -> Any:
    """The first token that a token at each of the positions sees; of a tensor or an array."""
    if window is None:
        return positions * 0
    if chunked:
        return positions // window * window
    return (positions - window + 1).clip(min=0)


def _group_rows(spans: list[int], max_tokens: int) -> Iterable[list[int]]:
    """Split rows into groups, longest rows first. A group has one row, or at most `max_tokens`
    tokens with padding, in rows at least half as long as its longest row.
    """
    group: list[int] = []
    for row in sorted(range(len(spans)), key=spans.__getitem__, reverse=True):
        longest = spans[group[0]] if group else spans[row]
        if group and (2 * spans[row] < longest or (len(group) + 1) * longest > max_tokens):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _gather_index(pages: Tensor, positions: Tensor, cache_shape: torch.Size) -> Tensor:
    """[planes * n * len] rows of the flat cache, K before V, of positions [n, len] in pages [n, _].

    A cache of latents has one plane.
    """
    num_planes, page_size = cache_shape[1:3]
    page = pages.gather(1, positions // page_size)
    key = page * (num_planes * page_size) + positions % page_size
    return torch.stack([key + plane * page_size for plane in range(num_planes)]).flatten()


def _plan_padded(
    batch: Batch,
    table: Tensor,
    row_ids: list[int],
    span: int,
    cache: Tensor,
    window: int | None,
    chunked: bool,
    dtype: torch.dtype | None,
) -> _Padded:
    rows = torch.tensor(row_ids, device=batch.context_lens.device)
    lens = batch.context_lens[rows, None]
    start = _first_seen(lens - 1, window, chunked)
    positions = start + torch.arange(span, device=rows.device)
    mask = cache.new_zeros(positions.shape, dtype=dtype)
    mask.masked_fill_(positions >= lens, float("-inf"))
    gather = _gather_index(table[rows], positions.minimum(lens - 1), cache.shape)
    return _Padded(rows, gather, mask[:, None, None])


def _plan_chunk(
    pages: Tensor,
    first: int,
    num: int,
    context: int,
    cache_shape: torch.Size,
    window: int | None,
    chunked: bool,
) -> _Chunk:
    queries = torch.arange(context - num, context, device=pages.device)
    seen = _first_seen(queries, window, chunked)
    start = int(_first_seen(np.int64(context - num), window, chunked))
    keys = torch.arange(start, context, device=pages.device)
    gather = _gather_index(pages, keys[None], cache_shape)
    if context == num and (window is None or window >= num):
        return _Chunk(slice(first, first + num), gather, None)
    mask = (keys <= queries[:, None]) & (keys >= seen[:, None])
    return _Chunk(slice(first, first + num), gather, mask)


def write_kv(cache: Tensor, kv: Tensor, plan: PagedPlan) -> None:
    """Store kv [tokens, planes, kv_heads, head_dim] (0: K, 1: V) at plan.cache_index."""
    if kv.dtype != cache.dtype:  # float8_e4m3fn has no infinity: 448 is its largest number
        limit = torch.finfo(cache.dtype).max
        kv = kv.clamp(-limit, limit).to(cache.dtype)
    page_size = cache.shape[2]
    cache[plan.cache_index // page_size, :, plan.cache_index % page_size] = kv


def _read(flat: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """`rows` of the flat cache, converted to `dtype`."""
    if flat.dtype == dtype:
        return flat.index_select(0, rows)
    # Gather bytes: not every device can gather float8.
    return flat.view(torch.uint8).index_select(0, rows).view(flat.dtype).to(dtype)


def attend(
    inputs: AttentionInputs,
    cache: Tensor,
    plan: AttentionPlan,
    tokens: Tensor | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See Ops.attend."""
    assert isinstance(plan, ReferencePlan)
    q = inputs.q if tokens is None else inputs.q[tokens]
    kv_heads, head_dim = cache.shape[3:]
    flat = cache.flatten(0, 2).flatten(1)  # [num_pages * 2 * page_size, kv_heads * head_dim]
    found = q.new_empty(q.shape) if out is None else out.view(q.shape)
    grouped = (-1, kv_heads, q.shape[1] // kv_heads, head_dim)
    of_group = None if sinks is None else sinks.view(kv_heads, -1, 1)
    of_head = None if sinks is None else sinks[:, None, None]
    for part in plan.padded:
        n = len(part.rows)
        k, v = _read(flat, part.gather, q.dtype).view(2, n, -1, kv_heads, head_dim).transpose(2, 3)
        # Query heads that share a K/V head take the place of query positions.
        rows = q[part.rows].view(grouped)
        o = _softmax_attention(rows, k, v, part.mask, plan, sinks=of_group)
        found[part.rows] = o.flatten(1, 2)
    for chunk in plan.chunks:
        k, v = _read(flat, chunk.gather, q.dtype).view(2, 1, -1, kv_heads, head_dim).transpose(2, 3)
        rows = q[None, chunk.tokens].transpose(1, 2)
        o = _softmax_attention(rows, k, v, chunk.mask, plan, causal=True, sinks=of_head)
        found[chunk.tokens] = o[0].transpose(0, 1)
    return found.flatten(1)


def gated_delta(
    qkv: Tensor,
    b: Tensor,
    a: Tensor,
    conv: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    state: RecurrentState,
    plan: AttentionPlan,
    out: Tensor | None = None,
) -> Tensor:
    """See Ops.gated_delta; token by token, all decode rows at once."""
    assert isinstance(plan, RowPlan)
    _, v_heads, k_dim, v_dim = state.matrix.shape
    k_heads = (qkv.shape[1] - v_heads * v_dim) // (2 * k_dim)
    keep = (-a_log.exp() * F.softplus(a.float() + dt_bias)).exp()
    write = b.float().sigmoid()
    shape = (len(qkv), v_heads, v_dim)
    result = qkv.new_empty(shape) if out is None else out.view(shape)
    n = plan.num_decode
    groups = [(plan.slots[:n], slice(0, n), 1)] if n else []
    first = n
    for slot, num in zip(plan.slots[n:], plan.query_lens[n:], strict=True):
        groups.append((slot[None], slice(first, first + num), num))
        first += num
    for slots, tokens, num in groups:
        x = qkv[tokens].view(len(slots), num, -1)
        padded = torch.cat((state.conv[slots], x.transpose(1, 2)), 2)
        state.conv[slots] = padded[:, :, num:]
        mixed = F.silu(F.conv1d(padded, conv[:, None], groups=len(conv))).transpose(1, 2).float()
        q, k, v = mixed.split((k_heads * k_dim, k_heads * k_dim, v_heads * v_dim), 2)
        q, k = (_unit_heads(x, k_heads, v_heads) for x in (q, k))
        v = v.unflatten(2, (v_heads, v_dim))
        g = keep[tokens].view(len(slots), num, v_heads)
        w = write[tokens].view(len(slots), num, v_heads)
        matrix = state.matrix[slots]
        found = torch.empty_like(v)
        for i in range(num):
            matrix = matrix * g[:, i, :, None, None]
            error = v[:, i] - torch.einsum("nhkv,nhk->nhv", matrix, k[:, i])
            matrix = matrix + torch.einsum("nhk,nhv->nhkv", k[:, i], error * w[:, i, :, None])
            found[:, i] = torch.einsum("nhkv,nhk->nhv", matrix, q[:, i])
        state.matrix[slots] = matrix
        result[tokens] = (found * k_dim**-0.5).flatten(0, 1).to(result.dtype)
    return result


def _unit_heads(x: Tensor, heads: int, copies_to: int) -> Tensor:
    """x [rows, tokens, heads * dim] as heads of length 1, each repeated: [.., copies_to, dim]."""
    x = x.unflatten(2, (heads, -1))
    x = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
    return x.repeat_interleave(copies_to // heads, 2)


def gated_norm(x: Tensor, gain: Tensor, eps: float, gate: Tensor) -> Tensor:
    """See Ops.gated_norm."""
    return (rms_norm(x, gain, eps).float() * F.silu(gate.float())).to(x.dtype)


def store_latent(
    q: Tensor,
    latent: Tensor,
    norm: Norm,
    rotary: RotaryInputs,
    cache: Tensor,
    plan: AttentionPlan,
) -> None:
    """See Ops.store_latent."""
    assert isinstance(plan, PagedPlan)
    rank = len(norm[0])
    rope_dim = latent.shape[1] - rank
    compressed = rms_norm(latent[:, :rank], *norm)
    key = latent[:, None, rank:].clone()
    rotate(key, rotary)
    rotate(q[..., -rope_dim:], rotary)
    write_kv(cache, torch.cat((compressed[:, None], key), 2)[:, None], plan)


def attend_latent(
    q: Tensor,
    kv_up: Tensor,
    cache: Tensor,
    plan: AttentionPlan,
    tokens: Tensor | None = None,
    chosen: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See Ops.attend_latent; in the absorbed form."""
    assert isinstance(plan, ReferencePlan)
    q = q if tokens is None else q[tokens]
    if chosen is not None:
        plan = _only_chosen(plan, chosen)
    rank = kv_up.shape[2]
    width = cache.shape[4]
    nope_dim = q.shape[2] - (width - rank)
    w_uk, w_uv = kv_up.tensor_split((nope_dim,), 1)
    q = torch.cat((torch.einsum("thn,hnk->thk", q[..., :nope_dim], w_uk), q[..., nope_dim:]), 2)
    flat = cache.flatten(0, 3)
    means = q.new_empty(*q.shape[:2], rank)
    for part in plan.padded:
        keys = _read(flat, part.gather, q.dtype).view(len(part.rows), 1, -1, width)
        rows = q[part.rows][:, None]  # heads take the place of query positions
        o = F.scaled_dot_product_attention(
            rows, keys, keys[..., :rank], attn_mask=part.mask, scale=plan.scale
        )
        means[part.rows] = o[:, 0]
    for chunk in plan.chunks:
        keys = _read(flat, chunk.gather, q.dtype).view(1, 1, -1, width)
        o = F.scaled_dot_product_attention(
            q[None, chunk.tokens].transpose(1, 2),
            keys,
            keys[..., :rank],
            attn_mask=chunk.mask,
            is_causal=chunk.mask is None,
            enable_gqa=True,
            scale=plan.scale,
        )
        means[chunk.tokens] = o[0].transpose(0, 1)
    found = torch.einsum("thk,hvk->thv", means, w_uv).flatten(1)
    return found if out is None else out.copy_(found)


def store_index_key(
    q: Tensor,
    k: Tensor,
    norm: tuple[Tensor, Tensor, float],
    rotary: RotaryInputs,
    cache: Tensor,
    plan: AttentionPlan,
) -> Tensor:
    """See Ops.store_index_key."""
    assert isinstance(plan, PagedPlan)
    key = layer_norm(k, *norm)[:, None]
    q = q.clone()
    rotate(key, rotary)
    rotate(q, rotary)
    write_kv(cache, key[:, None], plan)
    return q


def choose_tokens(
    queries: IndexQueries, cache: Tensor, plan: AttentionPlan, tokens: Tensor | None = None
) -> Tensor | None:
    """See Ops.choose_tokens."""
    assert isinstance(plan, ReferencePlan)
    if plan.top_k is None:
        return None
    q, weights = queries if tokens is None else (part[tokens] for part in queries)
    flat = cache.flatten(0, 3)
    chosen = q.new_zeros(len(q), plan.top_k, dtype=torch.int32)
    for rows, gather, seen in _seen(plan):
        keys = _read(flat, gather, torch.float32)
        keys = keys.view(-1, seen.shape[1], flat.shape[1])  # of each decode row, or of the chunk
        scores = torch.zeros_like(seen, dtype=torch.float32).view(len(keys), -1, seen.shape[1])
        for head, weight in zip(q[rows].unbind(1), weights[rows].unbind(1), strict=True):
            products = head.float().view(len(keys), -1, flat.shape[1]) @ keys.mT
            scores += weight.float().view(len(keys), -1, 1) * products.relu()
        scores = scores.view_as(seen).masked_fill(~seen, -inf)
        best = scores.sort(stable=True, descending=True).indices[:, : plan.top_k]
        kept = torch.zeros_like(seen).scatter_(1, best, True) & seen
        # Sorting puts the kept tokens first, and does not change their order.
        first = kept.sort(stable=True, descending=True).indices[:, : plan.top_k]
        chosen[rows, : first.shape[1]] = first.int()
    return chosen


def _seen(plan: ReferencePlan) -> Iterator[tuple[Tensor | slice, Tensor, Tensor]]:
    """For all tokens in parts: which tokens, what they gather, and which of it they see [n, len].

    Decode rows gather n times len places, a chunk len places.
    """
    for part in plan.padded:
        yield part.rows, part.gather, part.mask[:, 0, 0] == 0
    for chunk in plan.chunks:
        yield chunk.tokens, chunk.gather, _mask_of(chunk)


def _mask_of(chunk: _Chunk) -> Tensor:
    if chunk.mask is not None:
        return chunk.mask
    return chunk.gather.new_ones(len(chunk.gather), len(chunk.gather), dtype=torch.bool).tril()


def _only_chosen(plan: ReferencePlan, chosen: Tensor) -> ReferencePlan:
    """A plan in which tokens see only those tokens, of those that they saw."""

    def kept(rows: Tensor | slice, seen: Tensor) -> Tensor:
        some = chosen[rows].long()
        defined = torch.arange(some.shape[1], device=some.device) < seen.sum(1, keepdim=True)
        return torch.zeros_like(seen).scatter_(1, some * defined, True) & seen

    padded = [
        replace(
            part,
            mask=part.mask.masked_fill(
                ~kept(part.rows, part.mask[:, 0, 0] == 0)[:, None, None], -inf
            ),
        )
        for part in plan.padded
    ]
    chunks = [replace(chunk, mask=kept(chunk.tokens, _mask_of(chunk))) for chunk in plan.chunks]
    return replace(plan, padded=padded, chunks=chunks)


def _softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    plan: ReferencePlan,
    causal: bool = False,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of q [n, heads, queries, head_dim] over k, v [n, kv_heads, keys, head_dim].

    `mask`: added to the scores, or bool; None: no mask, or if `causal`, that of equal positions.
    `sinks`: [heads, queries or 1, 1].
    """
    if plan.softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=causal and mask is None,
            scale=plan.scale,
            enable_gqa=causal,
        )
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, 1)
    v = v.repeat_interleave(group, 1)
    scores = (q @ k.mT) * (plan.scale or q.shape[-1] ** -0.5)
    if plan.softcap is not None:
        scores = plan.softcap * torch.tanh(scores / plan.softcap)
    if mask is None and causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask
    if sinks is not None:
        scores = torch.cat((scores, sinks.expand(*scores.shape[:-1], 1)), -1)
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return weights[..., : v.shape[2]] @ v


def prepare_inputs(
    page_table: Tensor,
    page_size: int,
    lengths: Tensor,
    last_tokens: Tensor,
    slots: Tensor,
    starts: Tensor,
    ends: Tensor,
    known: Tensor,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See Ops.prepare_inputs."""
    decode, chunked = slots.split([len(slots) - len(starts), len(starts)])
    token_slots = decode
    positions = lengths[decode]
    tokens = last_tokens[decode]
    context_lens = positions + 1
    if len(starts):
        lens = ends.diff(prepend=ends.new_zeros(1))
        assert (lens <= longest).all()
        chunk = torch.arange(len(starts)).repeat_interleave(lens, output_size=len(known))
        chunk_positions = torch.arange(len(known)) + (starts + lens - ends)[chunk]
        positions = torch.cat([positions, chunk_positions])
        context_lens = torch.cat([context_lens, starts + lens])
        tokens = torch.cat([tokens, known])
        token_slots = torch.cat([decode, chunked[chunk]])
    lengths[slots] = context_lens
    pages = page_table[:, token_slots, positions // page_size]
    return tokens, positions, pages * page_size + positions % page_size, context_lens


def list_pages(
    page_table: Tensor, slots: Tensor, starts: Tensor, firsts: Tensor, max_pages: int, out: Tensor
) -> None:
    """Write the pages of row r from index firsts[r] on to out[starts[r] : starts[r + 1]].

    page_table: [slots, width] int64; slots: [rows] int64; starts: [rows + 1] int32; firsts: [rows]
    int32; out: int32. No row has more than `max_pages`.
    """
    begins = starts.tolist()
    for row, slot in enumerate(slots.tolist()):
        count = begins[row + 1] - begins[row]
        assert count <= max_pages
        first = int(firsts[row])
        out[begins[row] : begins[row + 1]] = page_table[slot, first : first + count]


def sample_plain(
    scores: Tensor,
    slots: Tensor,
    state: PlainSampling,
    out: Tensor | None = None,
    ranks: TensorGroup | None = None,
    vocab: int | None = None,
) -> Tensor:
    """See Ops.sample_plain; the random number is uniforms(seed, output length)."""
    scores = scores if ranks is None else ranks.gather(scores)[:, :vocab]
    heat = state.temperature[slots].float()
    greedy = heat <= 0
    if greedy.all():
        tokens = scores.argmax(-1)
    else:
        weights = (scores.float() / torch.where(greedy, 1.0, heat)[:, None]).softmax(-1)
        output_lens = state.lengths[slots] - state.prompt_lens[slots]
        drawn = draw(weights, uniforms(state.seeds[slots], output_lens))
        tokens = torch.where(greedy, scores.argmax(-1), drawn)
    tokens = tokens if ranks is None else ranks.broadcast(tokens)
    state.last_tokens[slots] = tokens
    return tokens if out is None else out.copy_(tokens)


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """[rows] float64 in [0, 1), a function of only (seed, position), both int64.

    Element `position` of the splitmix64 sequence (Steele et al. 2014) started at the mixed seed.
    """
    return (_shift(_mix(_mix(seeds) + (positions + 1) * _GOLDEN), 11)).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shift(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's >> is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """Inverse CDF in vocabulary order: [rows] int64 from weights [rows, vocab] and u [rows].

    Weights are not negative and need not sum to 1; every row has a positive weight. A token of
    weight 0 is never returned.
    """
    rows, vocab = weights.shape
    if vocab % GROUP_LEN:
        weights = F.pad(weights, (0, -vocab % GROUP_LEN))
    groups = weights.view(rows, -1, GROUP_LEN)
    sums = groups.sum(-1).double()
    running = sums.cumsum(-1)
    target = u[:, None] * running[:, -1:]
    group = first_above(sums, running, target)
    rest = target - (running - sums).gather(1, group)  # rounding may move it outside the group
    index = group[:, :, None].expand(-1, -1, GROUP_LEN)
    members = groups.gather(1, index).squeeze(1).double()
    member = first_above(members, members.cumsum(-1), rest)
    return (group * GROUP_LEN + member).squeeze(1)


def first_above(weights: Tensor, running: Tensor, target: Tensor) -> Tensor:
    """[rows, 1]: index of the first positive weight whose running sum exceeds target [rows, 1].

    If rounding moved the target to the total or above, it is the first weight that reaches the
    total. If rounding moved the target below 0, it is the first positive weight.
    """
    reached = running.masked_fill(weights <= 0, -1.0)
    below_total = torch.nextafter(reached.amax(-1, keepdim=True), torch.zeros_like(target))
    above = reached > torch.minimum(target, below_total)
    return above.to(torch.uint8).argmax(-1, keepdim=True)
