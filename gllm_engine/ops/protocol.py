"""The interface of the operations: names, arguments and results, the same on every kind of device.

`reference` (plain torch) and `flashinfer` (an NVIDIA GPU) are modules with these functions; mypy
checks both against `Ops`. Knows shapes and dtypes; no models, no scheduling.

An operation may return an AttentionPlan, RotaryInputs, AttentionInputs or Rows as an argument for
another operation. Callers pass these values to the same implementation and never look into them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gllm_engine.attention_shape import AttentionShape, LatentShape
from gllm_engine.ops.batch import Batch, TensorGroup
from gllm_engine.ops.segments import SegmentPlanner
from gllm_engine.ops.weight import Rows, Weight
from gllm_engine.routing import Clamp, Routing

# Gain [dim] and epsilon of an RMS norm.
Norm = tuple[Tensor, float]


class RotaryInputs(NamedTuple):
    """The rotary angles of a step's tokens, in the form that an implementation reads."""

    cos: Tensor
    sin: Tensor
    interleaved: bool  # pairs of channels are (2i, 2i + 1), not (i, i + dim / 2)
    positions: Tensor | None = None  # [tokens] rows of cos and sin; None: they have a row per token


class HeadNorm(NamedTuple):
    """RMS norm of query and key heads. It divides a head by the root of the mean of its squares."""

    gain: Tensor  # [num_heads + kv_heads, head_dim]
    eps: float
    plus_one: bool = False  # the factors are 1 + gain
    after: bool = False  # after the rotation, not before it
    # [tokens, 2] float32, the mean squares of all queries and of all keys, which replace the mean
    # of each head; from `mean_squares`.
    means: Tensor | None = None


class AttentionPlan:
    """How one batch attends over the pages; valid for all layers of one shape and window."""


@dataclass
class PagedPlan(AttentionPlan):
    """A plan of layers with pages. The operations that store need no more of a plan than this, and
    what they return may be attended to with any plan of the same tokens.

    `keeps`: whether `rotate_and_store` returns `kept`, too, because `attend` may read it.
    """

    cache_index: Tensor  # [tokens] cache place of what a token stores, as in Batch.of_group
    keeps: bool = field(default=False, kw_only=True)


class AttentionInputs(NamedTuple):
    """A step's heads after norm and rotation: the input of `attend`.

    `kept`: the K heads, then the V heads, in the dtype of q; or, if chunks attend with rounded
    heads, the heads of q and these, as the cache would hold them. None: `attend` reads q and the
    cache only.
    """

    q: Tensor  # [tokens, heads, head_dim]
    kept: Tensor | None = None  # [tokens, 2 * kv_heads or all heads, head_dim]


class PlainSampling(NamedTuple):
    """The part of the runner's state that plain sampling reads and writes, one row per slot."""

    temperature: Tensor  # [slots] float64; 0: greedy
    seeds: Tensor  # [slots] int64
    prompt_lens: Tensor  # [slots] int64
    lengths: Tensor  # [slots] int64, tokens in the cache
    last_tokens: Tensor  # [slots] int64; receives the sampled tokens


class RecurrentState(NamedTuple):
    """The states of one layer with the gated delta rule. Rows are slots, then snapshots."""

    conv: Tensor  # [rows, width, conv - 1] the last inputs of the convolution
    matrix: Tensor  # [rows, v_heads, k_dim, v_dim] float32


class IndexQueries(NamedTuple):
    """Queries of the indexer of sparse attention, and the weights of its heads."""

    q: Tensor  # [tokens, heads, dim]
    weights: Tensor  # [tokens, heads]


class AttentionLayer(NamedTuple):
    """What chooses a compiled kernel: a cache's shape and dtype, and the parameters of plans."""

    cache: Tensor
    shape: AttentionShape | LatentShape


class AttentionPlanner(Protocol):
    """Plans the attention of one step after another; may keep memory between steps.

    A plan with prefill chunks is valid until the next plan for layers of the same group, shape and
    window; steps run in the order of their plans. A plan without chunks stays valid, and may be
    made inside a CUDA graph.
    """

    def plan(
        self,
        batch: Batch,
        cache: Tensor,
        shape: AttentionShape,
        group: int = 0,
    ) -> AttentionPlan:
        """Plan the attention of one step for all layers of a group with this shape and cache.
        `batch`: from Batch.of_group.

        `cache`: of any such layer, [num_pages, 2, page_size, kv_heads, head_dim]; only its shape
        and dtype are used.
        """
        ...

    def plan_recurrent(self, batch: Batch) -> AttentionPlan:
        """Plan a step of layers that keep a state per sequence. The plan stays valid."""
        ...

    def plan_latent(
        self,
        batch: Batch,
        cache: Tensor,
        shape: LatentShape,
        group: int = 0,
    ) -> AttentionPlan:
        """As plan, for latent attention: `cache` is [num_pages, 1, page_size, 1, width]."""
        ...


class AllReduceKernel(Protocol):
    """All-reduce, residual sum and RMS norm in one kernel."""

    def takes(self, part: Tensor) -> bool:
        """Whether the kernel supports a part of this shape."""
        ...

    def __call__(self, part: Tensor, total: Tensor, norm: Norm | None) -> Tensor | None:
        """Add all ranks' parts [rows, dim] to `total`; return norm(total) if `norm` is given."""
        ...


class Ops(Protocol):
    """All operations. Tensors are on one device; plain weights, inputs and results have one dtype.

    Weights of products have formats. `reference` multiplies x by the exact numbers of a weight,
    rounded to the dtype of x. Another implementation may round x too, as the kernels for FP8 do: to
    float8, with a scale per token, or per 128 columns of a token if the weight has blocks.
    """

    def rms_norm(
        self,
        x: Tensor,
        gain: Tensor,
        eps: float,
        add_to: Tensor | None = None,
        plus_one: bool = False,
        add_after: Tensor | None = None,
    ) -> Tensor:
        """x / rms(x) * gain over the last dimension of x [rows, dim], with the mean in float32.

        Rows of x may lie apart. With `add_to`, the result is added to `add_to`, which is returned.
        With `plus_one`, the factor is 1 + gain in float32, and the product is rounded once.
        `add_after`: [dim], is added to x itself afterwards, which saves a pass over x.
        """
        ...

    def layer_norm(
        self,
        x: Tensor,
        gain: Tensor,
        bias: Tensor | None,
        eps: float,
        add_after: Tensor | None = None,
    ) -> Tensor:
        """(x - mean) / sqrt(variance + eps) * gain + bias over the last dimension of x [rows, dim],
        computed in float32 and rounded once. `add_after`: as rms_norm.
        """
        ...

    def activate(self, x: Tensor, act: str, gated: bool, then: Weight | None = None) -> Rows:
        """act(gate) * up, [rows, width], if `gated`: x is [rows, 2 * width], gate first. Else
        act(x). `act`: "silu", "gelu" (with erf), "gelu_tanh" or "gelu_quick" (x sigmoid(1.702 x)).

        `then`: the weight of the only product that takes the result, which may have been rounded as
        that product rounds it; None: the result is a Tensor.
        """
        ...

    def linear(
        self,
        x: Rows,
        weight: Weight,
        bias: Tensor | None = None,
        norm: Norm | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """x W' + b: [rows, width], for x [rows, depth], weight [width, depth] and bias [width].

        Rows of x may lie apart. `norm`: an RMS norm applied to x first, which must be a Tensor
        then. `out`: [rows, width] receives the result.
        """
        ...

    def gated_linear(
        self,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        norm: Norm | None,
        then: Weight | None = None,
    ) -> Rows:
        """silu(gate) * up, [rows, width / 2], where [gate, up] = linear(x, weight, bias, norm).

        `then`: as activate.
        """
        ...

    def add_linear(self, total: Tensor, x: Rows, weight: Weight, bias: Tensor | None) -> Tensor:
        """Add linear(x, weight, bias) to `total` [rows, width] in place; return `total`."""
        ...

    def make_one_shot_allreduce(
        self, ranks: TensorGroup, dim: int, dtype: torch.dtype
    ) -> AllReduceKernel | None:
        """The one-shot all-reduce for parts [rows, dim]; all `ranks` must call this together.

        None if it is not supported: on a CPU, for a single rank, ranks on several nodes, float32.
        """
        ...

    def route(self, logits: Tensor, routing: Routing, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """The experts of each token, largest choice first: (weights float32, experts int32), both
        [tokens, routing.top_k] and contiguous. `logits`: the router's, [tokens, experts].

        `bias`: [experts] float32, given if `routing.biased`. NaN is less than every number; the
        experts of a token with NaN are different ones too, but their weights are undefined.
        """
        ...

    def sum_experts(
        self,
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
        """Sum of weights * down(silu(gate(x)) * up(x)) over each token's experts: [tokens, dim].

        `on_input`: the weights multiply x, and not the outputs of the experts. `biases`: of gate
        and up, [local, 2 * hidden], and of down, [local, dim]. `clamp`: what to compute of gate(x)
        and up(x) instead.

        x: [tokens, dim]. weights, experts: [tokens, top_k] from `route`, a token's experts being
        distinct. gate_up: [local, 2 * hidden, dim] and down: [local, dim, hidden], the matrices of
        this rank's experts, `first` to first + local - 1; other experts add nothing. `num_experts`:
        of all ranks; kernels estimate the tokens per expert from it. `total`: [tokens, dim]; the
        sum is added to it in place.
        """
        ...

    def rotary_inputs(
        self,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        dtype: torch.dtype,
        interleaved: bool,
    ) -> RotaryInputs:
        """The rotary angles of a step's tokens, for all layers with the same rotary embedding.

        cos, sin: [positions, dim / 2] float32. positions: [tokens] int64. `dtype`: in which
        `reference` rotates; kernels rotate in float32. `interleaved`: see RotaryInputs.
        """
        ...

    def rotate(self, x: Tensor, rotary: RotaryInputs) -> Tensor:
        """x with its heads rotated, rounded once. x: [tokens, heads, head_dim], of which each token
        is contiguous; may be overwritten.
        """
        ...

    def mean_squares(self, qkv: Tensor, num_heads: int) -> Tensor:
        """The mean squares of all numbers of the q heads and of the k heads: [tokens, 2] float32.

        qkv: as in `rotate_and_store`.
        """
        ...

    def rotate_and_store(
        self,
        qkv: Tensor,
        num_heads: int,
        norm: HeadNorm | None,
        rotary: RotaryInputs | None,
        cache: Tensor,
        plan: AttentionPlan,
        query_scale: Tensor | None = None,
    ) -> AttentionInputs:
        """Norm and rotate the q and k heads of qkv, and store k and v in the cache.

        qkv: [tokens, num_heads + 2 * kv_heads, head_dim], of which each token is contiguous; may be
        overwritten. rotary: None: nothing is rotated. query_scale: [tokens] float32, a last factor
        of the q heads.
        cache: [num_pages, 2, page_size, kv_heads, head_dim], in the dtype of qkv or in
        float8_e4m3fn, where values are clamped to -448 .. 448.
        """
        ...

    def attend(
        self,
        inputs: AttentionInputs,
        cache: Tensor,
        plan: AttentionPlan,
        tokens: Tensor | None = None,
        sinks: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """softmax(q k' * scale) v over each row's pages, with the plan's scale and softcap:
        [tokens, heads * head_dim].

        `tokens`: [n] int64, the indices of the input tokens that the plan covers; None: all tokens.
        `sinks`: [heads], the score of one more key of each head, whose value is 0; neither the
        scale nor the softcap applies to it. `out`: contiguous, receives the result.
        """
        ...

    def store_latent(
        self,
        q: Tensor,
        latent: Tensor,
        norm: Norm,
        rotary: RotaryInputs,
        cache: Tensor,
        plan: AttentionPlan,
    ) -> None:
        """Norm and rotate the latents of multi-head latent attention, and store them in the cache;
        rotate the last channels of q in place.

        q: [tokens, heads, nope_dim + rope_dim], of which each token is contiguous; latent: [tokens,
        rank + rope_dim], the last channels are the key to rotate; norm: of the first `rank`
        channels. cache: [num_pages, 1, page_size, 1, rank + rope_dim].
        """
        ...

    def attend_latent(
        self,
        q: Tensor,
        kv_up: Tensor,
        cache: Tensor,
        plan: AttentionPlan,
        tokens: Tensor | None = None,
        chosen: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """softmax(scale * q k') v over each row's pages: [tokens, heads * value_dim].

        q: from store_latent. kv_up: [heads, nope_dim + value_dim, rank], W_UK and W_UV, which make
        k and v from the latents in the cache; see LatentShape. `tokens`: [n] int64, the indices of
        the input tokens that the plan covers; None: all tokens. `chosen`: from choose_tokens, of
        the same tokens, whatever the layer. A plan for some tokens may get it where their own rows
        have too few tokens to choose from. `out`: contiguous, receives the result.

        Two forms have the same result up to rounding: the absorbed one computes (W_UK' q) latent'
        and W_UV (weights latent), and no key or value; the expanded one computes k and v.
        """
        ...

    def store_index_key(
        self,
        q: Tensor,
        k: Tensor,
        norm: tuple[Tensor, Tensor, float],
        rotary: RotaryInputs,
        cache: Tensor,
        plan: AttentionPlan,
    ) -> Tensor:
        """Layer norm of an indexer's keys k [tokens, dim], rotation, and storage in the cache.

        q: [tokens, heads, dim], contiguous; its rotated copy or itself is returned. norm: gain and
        bias, [dim], and epsilon. cache: [num_pages, 1, page_size, 1, dim].
        """
        ...

    def choose_tokens(
        self,
        queries: IndexQueries,
        cache: Tensor,
        plan: AttentionPlan,
        tokens: Tensor | None = None,
    ) -> Tensor | None:
        """The positions of the tokens that each query token attends to, [tokens, top_k] int32.

        These are the plan's top_k tokens of the greatest scores, in ascending order of positions;
        of equal scores, the first tokens are chosen. A row with fewer tokens has all of them, and
        its other entries are undefined. None: no row of the plan has more than top_k tokens. A
        score is the sum over heads of weight * relu(q k'), in float32. cache: as store_index_key.
        `tokens`: as attend_latent.
        """
        ...

    def gated_delta(
        self,
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
        """The gated delta rule over each row's tokens, from its slot's state on, which is updated:
        [tokens, v_heads, v_dim].

        qkv: [tokens, width]: q and k of all key heads, then v of all value heads. b, a: [tokens,
        v_heads] before their activations. conv: [width, conv]. a_log, dt_bias: [v_heads] float32.
        q and k are divided by their norms after the convolution and silu. `out`: [tokens,
        v_heads * v_dim], contiguous, receives the result.
        """
        ...

    def gated_norm(self, x: Tensor, gain: Tensor, eps: float, gate: Tensor) -> Tensor:
        """rms_norm(x, gain, eps) * silu(gate), of [tokens, heads, head_dim]."""
        ...

    def make_planner(self, device: torch.device, dtype: torch.dtype) -> AttentionPlanner:
        """A planner for queries of `dtype`."""
        ...

    def make_segment_planner(
        self, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> SegmentPlanner:
        """A planner of attention within segments, without a cache."""
        ...

    def compile_attention(self, layers: Sequence[AttentionLayer], dtype: torch.dtype) -> None:
        """Compile the attention kernels for queries of `dtype` that are not compiled yet; may take
        minutes. `layers`: one of each kind.
        """
        ...

    def prepare_inputs(
        self,
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
        """The (tokens, positions, cache_index, context_lens) of a Batch.

        All tensors are int64.

        State, one row per slot: page_table [groups, slots, pages]; lengths [slots], tokens in the
        cache, updated to the rows' context_lens; last_tokens [slots].

        `slots`: [rows], all different: decode rows, whose input is the slot's last token, then
        prefill chunks. starts, ends: [chunks]. Chunk c has the tokens known[ends[c - 1] : ends[c]],
        where ends[-1] counts as 0, at positions starts[c] onward. `longest`: an upper bound of the
        tokens in a chunk.
        """
        ...

    def sample_plain(
        self,
        scores: Tensor,
        slots: Tensor,
        state: PlainSampling,
        out: Tensor | None = None,
        ranks: TensorGroup | None = None,
        vocab: int | None = None,
    ) -> Tensor:
        """Sample one token for each row: [rows] int64, also recorded in state.last_tokens.

        scores: [rows, vocab] logits of `slots` [rows]. A token is drawn from the softmax at the
        slot's temperature; at temperature 0 it is the most likely token. The random number is a
        function of the slot's seed and output length. `out`: [rows] int64 receives the tokens.
        `ranks`: every rank has a shard of the logits, [rows, width]. All ranks get the same tokens,
        even if rounding would make their own choices differ. `vocab`: the number of tokens, if the
        last rank has fewer than `width`; its other columns are not read.
        """
        ...
