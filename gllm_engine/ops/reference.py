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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gllm_engine.ops.batch import Batch, TensorGroup
from gllm_engine.ops.protocol import (
    AttentionInputs,
    AttentionPlan,
    Norm,
    PlainSampling,
    RotaryInputs,
)
from gllm_engine.ops.weight import Weight, dequantized

# Most K and V elements gathered at once: 1 MiB of float32, which fits a CPU's cache.
_GATHER_NUMBERS = 1 << 18
# The inverse CDF first finds a group of GROUP_LEN tokens, then the token in it. A scan of the whole
# vocabulary in float64 would take several times as long as the rest of the sampler.
GROUP_LEN = 128
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def rms_norm(x: Tensor, gain: Tensor, eps: float, add_to: Tensor | None = None) -> Tensor:
    """See Ops.rms_norm; x of any shape."""
    if x.dtype == torch.float32:
        normed = F.rms_norm(x, x.shape[-1:], None, eps).mul_(gain)
    else:
        normed = F.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype).mul_(gain)
    return normed if add_to is None else add_to.add_(normed)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See Ops.silu_mul; gate_up of any shape."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See Ops.linear."""
    x = x if norm is None else rms_norm(x, *norm)
    y = F.linear(x, dequantized(weight, x.dtype), bias)
    return y if out is None else out.copy_(y)


def gated_linear(x: Tensor, weight: Weight, bias: Tensor | None, norm: Norm | None) -> Tensor:
    """See Ops.gated_linear."""
    return silu_mul(linear(x, weight, bias, norm))


def add_linear(total: Tensor, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """See Ops.add_linear."""
    return total.add_(linear(x, weight, bias))


def make_one_shot_allreduce(ranks: TensorGroup, dim: int, dtype: torch.dtype) -> None:
    """See Ops.make_one_shot_allreduce; a CPU has no such kernel."""
    del ranks, dim, dtype


def route(logits: Tensor, top_k: int, renorm: bool) -> tuple[Tensor, Tensor]:
    """See Ops.route."""
    chances, experts = logits.float().softmax(-1).sort(stable=True, descending=True)
    weights = chances[:, :top_k]
    scale = weights.sum(-1, keepdim=True) if renorm else 1.0
    return weights / scale, experts[:, :top_k].int()


def sum_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Weight,
    down: Weight,
    first: int,
    num_experts: int,
    total: Tensor | None = None,
) -> Tensor:
    """See Ops.sum_experts."""
    del num_experts
    dtype = torch.promote_types(x.dtype, torch.float32)
    parts = x.new_zeros(*experts.shape, x.shape[1], dtype=dtype)
    for i in range(len(gate_up)):
        chosen = experts == first + i
        tokens = chosen.nonzero()[:, 0]
        if len(tokens):
            hidden = gated_linear(x[tokens], gate_up[i], None, None)
            parts[chosen] = linear(hidden, down[i]).to(dtype)
    summed = torch.einsum("tkd,tk->td", parts, weights.to(dtype)).to(x.dtype)
    return summed if total is None else total.add_(summed)


def rotary_inputs(
    cos: Tensor, sin: Tensor, positions: Tensor, dtype: torch.dtype, interleaved: bool
) -> RotaryInputs:
    """See Ops.rotary_inputs; returns (cos, sin) for `rotate`."""
    return expand_rotation(cos[positions].to(dtype), sin[positions].to(dtype), interleaved)


def rotate_and_store(
    qkv: Tensor,
    num_heads: int,
    norm: Tensor | None,
    eps: float,
    rotary: RotaryInputs,
    interleaved: bool,
    cache: Tensor,
    plan: AttentionPlan,
) -> AttentionInputs:
    """See Ops.rotate_and_store; K and V are always read from the cache."""
    assert isinstance(plan, ReferencePlan)
    kv_heads = (qkv.shape[1] - num_heads) // 2
    qk = qkv[:, : num_heads + kv_heads]
    if norm is not None:
        qk.copy_(rms_norm(qk, norm, eps))
    cos, sin = rotary
    rotate(qk, cos, sin, interleaved)
    write_kv(cache, qkv[:, num_heads:].unflatten(1, (2, kv_heads)), plan)
    return AttentionInputs(qkv[:, :num_heads])


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """Rotate the first channels of every head of x [tokens, heads, head_dim], in place.

    `cos`, `sin`: [tokens, 1, dim] from `expand_rotation`.
    """
    x = x[..., : cos.shape[-1]]
    if interleaved:
        partner = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        partner = x.roll(x.shape[-1] // 2, -1)
    x.mul_(cos).addcmul_(partner, sin)


def expand_rotation(cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Expand [tokens, dim / 2] to [tokens, 1, dim] for `rotate`; sin gets the channel's sign."""
    if interleaved:
        cos = cos.repeat_interleave(2, -1)
        sin = torch.stack((-sin, sin), -1).flatten(-2)
    else:
        cos = torch.cat((cos, cos), -1)
        sin = torch.cat((-sin, sin), -1)
    return cos[:, None], sin[:, None]


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


@dataclass(frozen=True)
class ReferencePlan(AttentionPlan):
    """Where the cache stores a batch's K and V, and what attention gathers from it."""

    write: Tensor  # [2 * tokens] rows of the flat cache, K then V of each token
    padded: list[_Padded]
    chunks: list[_Chunk]


class ReferencePlanner:
    """An AttentionPlanner without memory between steps."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """`dtype`: of the queries."""
        del device
        self._dtype = dtype

    def plan(
        self, batch: Batch, cache: Tensor, num_heads: int, window: int | None, group: int = 0
    ) -> ReferencePlan:
        """See AttentionPlanner.plan."""
        del num_heads, group
        return plan_attention(batch, cache, window, self._dtype)


def make_planner(device: torch.device, dtype: torch.dtype) -> ReferencePlanner:
    """See Ops.make_planner."""
    return ReferencePlanner(device, dtype)


def compile_attention(layers: Sequence[tuple[Tensor, int, int | None]], dtype: torch.dtype) -> None:
    """See Ops.compile_attention; torch needs no compilation."""
    del layers, dtype


def plan_attention(
    batch: Batch, cache: Tensor, window: int | None, dtype: torch.dtype | None = None
) -> ReferencePlan:
    """As AttentionPlanner.plan. `dtype`: of the queries; None: the dtype of the cache."""
    page_size = cache.shape[2]
    kv_width = cache.shape[3] * cache.shape[4]
    lens = batch.context_lens_cpu.tolist()
    num_pages = -(-max(lens) // page_size)
    table = batch.page_table[:, :num_pages].index_select(0, batch.slots)
    key = batch.cache_index // page_size * page_size + batch.cache_index  # page * 2 * page_size + o
    write = torch.stack((key, key + page_size), 1).flatten()
    spans = [min(n, window or n) for n in lens[: batch.num_decode]]
    padded = [
        _plan_padded(batch, table, rows, spans[rows[0]], cache, window, dtype)
        for rows in _group_rows(spans, _GATHER_NUMBERS // (2 * kv_width))
    ]
    chunks = []
    first = batch.num_decode
    for row in range(batch.num_decode, len(batch.query_lens)):
        num = batch.query_lens[row]
        pages = table[row : row + 1]
        chunks.append(_plan_chunk(pages, first, num, lens[row], page_size, window))
        first += num
    return ReferencePlan(write, padded, chunks)


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


def _gather_index(pages: Tensor, positions: Tensor, page_size: int) -> Tensor:
    """[2 * n * len] rows of the flat cache, K before V, of positions [n, len] in pages [n, _]."""
    key = pages.gather(1, positions // page_size) * (2 * page_size) + positions % page_size
    return torch.stack((key, key + page_size)).flatten()


def _plan_padded(
    batch: Batch,
    table: Tensor,
    row_ids: list[int],
    span: int,
    cache: Tensor,
    window: int | None,
    dtype: torch.dtype | None,
) -> _Padded:
    rows = torch.tensor(row_ids, device=batch.context_lens.device)
    lens = batch.context_lens[rows, None]
    start = (lens - window).clamp_(min=0) if window else torch.zeros_like(lens)
    positions = start + torch.arange(span, device=rows.device)
    mask = cache.new_zeros(positions.shape, dtype=dtype)
    mask.masked_fill_(positions >= lens, float("-inf"))
    gather = _gather_index(table[rows], positions.minimum(lens - 1), cache.shape[2])
    return _Padded(rows, gather, mask[:, None, None])


def _plan_chunk(
    pages: Tensor, first: int, num: int, context: int, page_size: int, window: int | None
) -> _Chunk:
    start = max(0, context - num - window + 1) if window else 0
    keys = torch.arange(start, context, device=pages.device)
    gather = _gather_index(pages, keys[None], page_size)
    if context == num and (window is None or window >= num):
        return _Chunk(slice(first, first + num), gather, None)
    ahead = keys[context - num - start :, None] - keys  # [num, len] positions from key to query
    mask = ahead >= 0
    if window:
        mask &= ahead < window
    return _Chunk(slice(first, first + num), gather, mask)


def write_kv(cache: Tensor, kv: Tensor, plan: ReferencePlan) -> None:
    """Store kv [tokens, 2, kv_heads, head_dim] (0: K, 1: V) at the rows plan.write."""
    if kv.dtype != cache.dtype:  # float8_e4m3fn has no infinity: 448 is its largest number
        limit = torch.finfo(cache.dtype).max
        kv = kv.clamp(-limit, limit).to(cache.dtype)
    cache.flatten(0, 2)[plan.write] = kv.flatten(0, 1)


def _read(flat: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """`rows` of the flat cache, converted to `dtype`."""
    if flat.dtype == dtype:
        return flat.index_select(0, rows)
    # Gather bytes: not every device can gather float8.
    return flat.view(torch.uint8).index_select(0, rows).view(flat.dtype).to(dtype)


def attend(
    inputs: AttentionInputs, cache: Tensor, plan: AttentionPlan, tokens: Tensor | None = None
) -> Tensor:
    """See Ops.attend."""
    assert isinstance(plan, ReferencePlan)
    q = inputs.q if tokens is None else inputs.q[tokens]
    kv_heads, head_dim = cache.shape[3:]
    flat = cache.flatten(0, 2).flatten(1)  # [num_pages * 2 * page_size, kv_heads * head_dim]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    grouped = (-1, kv_heads, q.shape[1] // kv_heads, head_dim)
    for part in plan.padded:
        n = len(part.rows)
        k, v = _read(flat, part.gather, q.dtype).view(2, n, -1, kv_heads, head_dim).transpose(2, 3)
        # Query heads that share a K/V head take the place of SDPA's query positions.
        o = F.scaled_dot_product_attention(q[part.rows].view(grouped), k, v, attn_mask=part.mask)
        out[part.rows] = o.flatten(1, 2)
    for chunk in plan.chunks:
        k, v = _read(flat, chunk.gather, q.dtype).view(2, 1, -1, kv_heads, head_dim).transpose(2, 3)
        o = F.scaled_dot_product_attention(
            q[None, chunk.tokens].transpose(1, 2),
            k,
            v,
            attn_mask=chunk.mask,
            is_causal=chunk.mask is None,
            enable_gqa=True,
        )
        out[chunk.tokens] = o[0].transpose(0, 1)
    return out.flatten(1)


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
) -> Tensor:
    """See Ops.sample_plain; the random number is uniforms(seed, output length)."""
    scores = scores if ranks is None else ranks.gather(scores)
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
