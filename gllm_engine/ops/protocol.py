"""The operations: what they are called, what they take and what they give, on every kind of device.

`reference` (plain torch) and `flashinfer` (an NVIDIA GPU) are modules with these functions; mypy
checks both against `Ops`. Knows shapes and dtypes; no models, no scheduling.

Three values pass from one operation to another: an AttentionPlan, RotaryInputs, AttentionInputs.
Whoever holds one hands it on, to the same implementation, and never looks into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gllm_engine.ops.batch import Batch, TensorGroup

# Gain [dim] and epsilon of an RMS norm.
Norm = tuple[Tensor, float]
# The positions of a step's tokens as `rotate_and_store` takes them.
RotaryInputs = tuple[Tensor, ...]


class AttentionPlan:
    """How one batch attends over the pages; the same for all layers that it was made for."""


class AttentionInputs(NamedTuple):
    """A step's heads, normed and rotated: what `attend` takes.

    `kv`: the keys, then the values, before the cache rounded them; None: `attend` reads the cache.
    """

    q: Tensor  # [tokens, heads, head_dim]
    kv: Tensor | None = None  # [tokens, 2 * kv_heads, head_dim]


class PlainSampling(NamedTuple):
    """What plain sampling reads and writes of the runner's state, one row a slot."""

    temperature: Tensor  # [slots] float64; 0: the most likely token
    seeds: Tensor  # [slots] int64
    prompt_lens: Tensor  # [slots] int64
    lengths: Tensor  # [slots] int64, tokens in the cache
    last_tokens: Tensor  # [slots] int64; where sampled tokens go


class AttentionPlanner(Protocol):
    """Plans attention of one step after another; may keep memory in between.

    A plan with chunks is valid until the next one for layers that are alike; steps run in the order
    of their plans. A plan without chunks stays valid, and may be made in a CUDA graph.
    """

    def plan(
        self, batch: Batch, cache: Tensor, num_heads: int, window: int | None
    ) -> AttentionPlan:
        """Plan attention of one step, for layers whose query heads, cache and window are alike.

        `cache`: any such layer's [num_pages, 2, page_size, kv_heads, head_dim]; only its shape and
        dtype are used. `num_heads`: query heads. `window`: a token sees itself and the window - 1
        tokens before it; None: all before it.
        """
        ...


class AllReduceKernel(Protocol):
    """Sums all ranks' parts, adds them to the residual stream and norms it, in one kernel."""

    def takes(self, part: Tensor) -> bool:
        """Whether it sums a part of this shape."""
        ...

    def __call__(self, part: Tensor, total: Tensor, norm: Norm | None) -> Tensor | None:
        """Add the ranks' parts [rows, dim] to `total`; returns that after `norm`, if given."""
        ...


class Ops(Protocol):
    """All operations. Tensors are on one device; weights, activations and results of one dtype."""

    def rms_norm(self, x: Tensor, gain: Tensor, eps: float, add_to: Tensor | None = None) -> Tensor:
        """x / rms(x) * gain over the last dimension of x [rows, dim], the mean taken in float32.

        With `add_to`, that is added to, and returned.
        """
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up, [rows, width], of [gate, up], [rows, 2 * width]."""
        ...

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        norm: Norm | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """x W' + b: [rows, width] of x [rows, depth], weight [width, depth] and bias [width].

        `norm`: what x goes through first. `out`: where the result goes.
        """
        ...

    def gated_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None
    ) -> Tensor:
        """silu(gate) * up, [rows, width / 2], where [gate, up] = linear(x, weight, bias, norm)."""
        ...

    def add_linear(self, total: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Add linear(x, weight, bias) to `total` [rows, width], in place, and return that."""
        ...

    def make_one_shot_allreduce(
        self, ranks: TensorGroup, dim: int, dtype: torch.dtype
    ) -> AllReduceKernel | None:
        """A kernel for parts [rows, dim] of `ranks`, all of which make one at the same time.

        None where there is none: on a CPU, for a single rank, ranks of several nodes, float32.
        """
        ...

    def route(self, logits: Tensor, top_k: int, renorm: bool) -> tuple[Tensor, Tensor]:
        """The `top_k` experts of each token, most likely first: (weights float32, experts int32),
        both [tokens, top_k] and contiguous, from a router's logits [tokens, experts].

        Weights are the softmax over all experts, divided by their sum with `renorm`. Of equally
        likely experts the first is taken.
        """
        ...

    def sum_experts(
        self,
        x: Tensor,
        weights: Tensor,
        experts: Tensor,
        gate_up: Tensor,
        down: Tensor,
        first: int,
        num_experts: int,
        total: Tensor | None = None,
    ) -> Tensor:
        """Sum of weights * down(silu(gate(x)) * up(x)) over each token's experts: [tokens, dim] of
        x [tokens, dim]; added to `total`, in place, if given.

        weights, experts: [tokens, top_k] as `route` gives them. gate_up: [local, 2 * hidden, dim]
        and down: [local, dim, hidden], of the experts from `first` on; others add nothing.
        `num_experts`: all of them, for kernels that expect their share of the tokens.
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
        """The angles of a step's tokens, for all layers that rotate alike.

        cos, sin: [max_model_len, dim / 2] float32. positions: [tokens] int64. `dtype`: of the
        heads. `interleaved`: pairs of channels are (2i, 2i + 1), not (i, i + dim / 2).
        """
        ...

    def rotate_and_store(
        self,
        qkv: Tensor,
        num_heads: int,
        norm: Tensor | None,
        eps: float,
        rotary: RotaryInputs,
        interleaved: bool,
        cache: Tensor,
        plan: AttentionPlan,
    ) -> AttentionInputs:
        """Norm and rotate the q and k heads of qkv, and store k and v in the cache.

        qkv: [tokens, num_heads + 2 * kv_heads, head_dim], contiguous; its contents are used up.
        norm: [num_heads + kv_heads, head_dim], the gain for every head, or None; `eps` is its
        epsilon. cache: [num_pages, 2, page_size, kv_heads, head_dim], in the dtype of qkv or in
        float8_e4m3fn, where numbers beyond 448 become 448.
        """
        ...

    def attend(
        self,
        inputs: AttentionInputs,
        cache: Tensor,
        plan: AttentionPlan,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """softmax(q k' / sqrt(head_dim)) v over each row's pages: [tokens, heads * head_dim].

        `tokens`: [n] int64, which of the inputs' tokens the plan is for; None: all of them.
        """
        ...

    def make_planner(self, device: torch.device, dtype: torch.dtype) -> AttentionPlanner:
        """`dtype`: of the queries."""
        ...

    def compile_attention(
        self, layers: Sequence[tuple[Tensor, int, int | None]], dtype: torch.dtype
    ) -> None:
        """Compile what attention needs for queries of `dtype`, unless that has been done; may take
        minutes. `layers`: (cache, num_heads, window), as in AttentionPlanner.plan, of one layer of
        each kind.
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
        """The tokens of a step, and where they go: (tokens, positions, cache_index [tokens],
        context_lens [rows]) of a Batch. All tensors are int64.

        State, one row a slot: page_table [slots, pages], lengths [slots] tokens in the cache, which
        become the rows' context_lens, and last_tokens [slots]. Rows are `slots` [rows], none twice:
        decode rows, which compute the slot's last token, then chunks. Chunk c computes
        known[ends[c - 1] : ends[c]], where ends[-1] is 0, at positions starts[c] onward; starts,
        ends [chunks]. No chunk is longer than `longest`.
        """
        ...

    def sample_plain(
        self,
        scores: Tensor,
        slots: Tensor,
        state: PlainSampling,
        out: Tensor | None = None,
        ranks: TensorGroup | None = None,
    ) -> Tensor:
        """One token for each row of scores [rows, vocab], the logits of `slots` [rows], into `out`
        [rows] int64 if given: drawn with its softmax at the slot's temperature, or the most likely
        one where that is 0. The random number is a function of the slot's seed and output length.

        `ranks`: those that have a share of the logits each, [rows, vocab / ranks]. All of them get
        the same tokens, even if they would not choose the same.
        """
        ...
