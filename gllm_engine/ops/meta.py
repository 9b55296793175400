"""The operations of a GPU without their numbers, on torch's meta device.

Tensors there have shapes and dtypes and no memory. So a step's memory can be known without a GPU:
every operation allocates its results, and the intermediate results that the GPU's kernels store,
and computes nothing. The operations that are imported from `reference` allocate as a GPU does.
Plans hold nothing, and arguments without effect on memory are not read.
`Ops` documents the functions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gllm_engine.attention_shape import AttentionShape, LatentShape
from gllm_engine.ops.batch import Batch
from gllm_engine.ops.kernels import (
    ABSORBED_TOKENS,
    BLOCK,
    EXPANDED_BYTES,
    EXTRA_PARTS,
    FACTORS,
    INT8_ROWS_AT_ONCE,
    PARTIALS_BYTES,
    SCORE_BYTES,
    has_chunk_kernels,
    padded_head,
    rounds_chunks,
)
from gllm_engine.ops.latent_rows import Expansion, expansion
from gllm_engine.ops.protocol import (
    AttentionInputs,
    AttentionPlan,
    HeadNorm,
    IndexQueries,
    Norm,
    RecurrentState,
    RotaryInputs,
)
from gllm_engine.ops.reference import compile_attention as compile_attention
from gllm_engine.ops.reference import make_one_shot_allreduce as make_one_shot_allreduce
from gllm_engine.ops.reference import prepare_inputs as prepare_inputs
from gllm_engine.ops.reference import sample_plain as sample_plain
from gllm_engine.ops.segments import SegmentPlanner
from gllm_engine.ops.weight import Int8Weight, PackedWeight, Rows, Weight
from gllm_engine.routing import Clamp, Routing


@dataclass
class LatentPlan(AttentionPlan):
    """A plan of latent attention."""

    top_k: int | None  # tokens that are chosen for each row; None: all are
    num_absorbed: int  # tokens
    at_once: int = 0  # heads of the expanded form


class MetaPlanner:
    """An AttentionPlanner with the memory of FlashInfer's planner, from the first plan on."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype
        self._memory: dict[str, Tensor] = {}  # by what it is for

    def plan(
        self,
        batch: Batch,
        cache: Tensor,
        shape: AttentionShape,
        group: int = 0,
    ) -> AttentionPlan:
        """See AttentionPlanner.plan."""
        return self._plan()

    def plan_recurrent(self, batch: Batch) -> AttentionPlan:
        """See AttentionPlanner.plan_recurrent."""
        return self._plan()

    def plan_latent(
        self,
        batch: Batch,
        cache: Tensor,
        shape: LatentShape,
        group: int = 0,
    ) -> AttentionPlan:
        """See AttentionPlanner.plan_latent."""
        self._plan()
        top_k = shape.top_k
        if top_k is not None and batch.context_lens_cpu.max() > top_k:
            self._keep("scores", SCORE_BYTES)
            return LatentPlan(top_k, sum(batch.query_lens))
        rows: Expansion | None = None
        if has_chunk_kernels(shape.key_dim, self._dtype, shape.value_dim):
            rows = expansion(batch, shape, cache.shape[4], self._dtype.itemsize)
        if rows is None:
            return LatentPlan(None, sum(batch.query_lens))
        self._keep("expanded keys", EXPANDED_BYTES)
        return LatentPlan(None, sum(batch.query_lens[: rows.first]), rows.at_once)

    def _plan(self) -> AttentionPlan:
        self._keep("partial results", PARTIALS_BYTES)
        return AttentionPlan()

    def _keep(self, what: str, num_bytes: int) -> None:
        """Have this memory from now on."""
        if what not in self._memory:
            self._memory[what] = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)


make_planner = MetaPlanner


def make_segment_planner(
    heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> SegmentPlanner:
    """See Ops.make_segment_planner. As on Hopper, where it takes more memory."""
    width = padded_head(head_dim, dtype)
    shape = None if width is None else AttentionShape(heads, heads, width, None)
    return SegmentPlanner(device, shape, lambda _: lambda q, k, v: torch.empty_like(q))


def rms_norm(
    x: Tensor,
    gain: Tensor,
    eps: float,
    add_to: Tensor | None = None,
    plus_one: bool = False,
    add_after: Tensor | None = None,
) -> Tensor:
    """See Ops.rms_norm."""
    return torch.empty_like(x) if add_to is None else add_to


def layer_norm(
    x: Tensor, gain: Tensor, bias: Tensor | None, eps: float, add_after: Tensor | None = None
) -> Tensor:
    """See Ops.layer_norm."""
    return torch.empty_like(x)


def activate(x: Tensor, act: str, gated: bool, then: Weight | None = None) -> Tensor:
    """See Ops.activate. A rounded result would take less."""
    return x.new_empty(len(x), x.shape[1] // (1 + gated))


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
    if isinstance(weight, PackedWeight):
        weight = x.new_empty(weight.shape)
    if isinstance(weight, Tensor):
        y = F.linear(x, weight, bias)
        return y if out is None else out
    y = x.new_empty(len(x), len(weight))
    rounded = torch.empty_like(x, dtype=weight.numbers.dtype)
    if isinstance(weight, Int8Weight):
        rounded.new_empty(min(len(x), INT8_ROWS_AT_ONCE), len(weight), dtype=torch.int32)
    return y if out is None else out


def gated_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    norm: Norm | None,
    then: Weight | None = None,
) -> Tensor:
    """See Ops.gated_linear."""
    return activate(linear(x, weight, bias, norm), "silu", gated=True)


def add_linear(total: Tensor, x: Rows, weight: Weight, bias: Tensor | None) -> Tensor:
    """See Ops.add_linear. A plain product is added as it is computed."""
    if isinstance(weight, Tensor) and isinstance(x, Tensor):
        return total.addmm_(x, weight.T)
    return total.add_(linear(x, weight, bias))


def route(logits: Tensor, routing: Routing, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """See Ops.route."""
    weights = logits.new_empty(len(logits), routing.top_k, dtype=torch.float32)
    return weights, weights.new_empty(weights.shape, dtype=torch.int32)


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
    hidden = x.new_empty(experts.numel(), down.shape[2])
    parts = x.new_empty(len(hidden), down.shape[1])
    return parts.new_empty(x.shape) if total is None else total


def rotary_inputs(
    cos: Tensor, sin: Tensor, positions: Tensor, dtype: torch.dtype, interleaved: bool
) -> RotaryInputs:
    """See Ops.rotary_inputs."""
    return RotaryInputs(cos, sin, interleaved, positions)


def rotate(x: Tensor, rotary: RotaryInputs) -> Tensor:
    """See Ops.rotate."""
    return torch.empty_like(x)


def mean_squares(qkv: Tensor, num_heads: int) -> Tensor:
    """See Ops.mean_squares."""
    return qkv.new_empty(len(qkv), 2, dtype=torch.float32)


def rotate_and_store(
    qkv: Tensor,
    num_heads: int,
    norm: HeadNorm | None,
    rotary: RotaryInputs | None,
    cache: Tensor,
    plan: AttentionPlan,
    query_scale: Tensor | None = None,
) -> AttentionInputs:
    """See Ops.rotate_and_store. As on Hopper."""
    q = torch.empty_like(qkv[:, :num_heads])
    if rounds_chunks(True, qkv.dtype, cache.dtype):
        return AttentionInputs(q, torch.empty_like(qkv, dtype=cache.dtype))
    return AttentionInputs(q, torch.empty_like(qkv[:, num_heads:]))


def attend(
    inputs: AttentionInputs,
    cache: Tensor,
    plan: AttentionPlan,
    tokens: Tensor | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See Ops.attend."""
    q = inputs.q if tokens is None else inputs.q[tokens]
    return torch.empty_like(q).flatten(1) if out is None else out


def store_latent(
    q: Tensor,
    latent: Tensor,
    norm: Norm,
    rotary: RotaryInputs,
    cache: Tensor,
    plan: AttentionPlan,
) -> None:
    """See Ops.store_latent."""


def attend_latent(
    q: Tensor,
    kv_up: Tensor,
    cache: Tensor,
    plan: AttentionPlan,
    tokens: Tensor | None = None,
    chosen: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See Ops.attend_latent. In the absorbed form each part of a context has a result. In the
    expanded one K and V are in the planner's memory.
    """
    assert isinstance(plan, LatentPlan)
    q = q if tokens is None else q[tokens]
    rank = kv_up.shape[2]
    value_dim = kv_up.shape[1] - (q.shape[2] - (cache.shape[4] - rank))
    num_tokens, heads = q.shape[:2]
    found = q.new_empty(num_tokens, heads * value_dim) if out is None else out
    if plan.num_absorbed:
        some = min(plan.num_absorbed, ABSORBED_TOKENS)
        absorbed = q.new_empty(some, heads, rank)
        parts = q.new_empty(some + EXTRA_PARTS, heads, rank)
        del absorbed, parts
    if 0 < plan.at_once < heads:
        q.new_empty(num_tokens - plan.num_absorbed, plan.at_once, value_dim)
    return found


def store_index_key(
    q: Tensor,
    k: Tensor,
    norm: tuple[Tensor, Tensor, float],
    rotary: RotaryInputs,
    cache: Tensor,
    plan: AttentionPlan,
) -> Tensor:
    """See Ops.store_index_key."""
    return torch.empty_like(q)


def choose_tokens(
    queries: IndexQueries, cache: Tensor, plan: AttentionPlan, tokens: Tensor | None = None
) -> Tensor | None:
    """See Ops.choose_tokens."""
    assert isinstance(plan, LatentPlan)
    if plan.top_k is None:
        return None
    rows = len(queries.q) if tokens is None else len(tokens)
    return queries.q.new_empty(rows, plan.top_k, dtype=torch.int32)


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
    """See Ops.gated_delta. As if all rows were long."""
    mixed = torch.empty_like(qkv)
    _, v_heads, _, v_dim = state.matrix.shape
    solved = mixed.new_empty(len(qkv), v_heads, 2 * BLOCK + FACTORS, dtype=torch.float32)
    shape = (len(qkv), v_heads, v_dim)
    return solved.new_empty(shape, dtype=qkv.dtype) if out is None else out.view(shape)


def gated_norm(x: Tensor, gain: Tensor, eps: float, gate: Tensor) -> Tensor:
    """See Ops.gated_norm."""
    return torch.empty_like(x)
