"""The interface of the operations: names, arguments and results, the same on every kind of device.

`reference` (plain torch) and `flashinfer` (an NVIDIA GPU) are modules with these functions; mypy
checks both against `Ops`. Knows shapes and dtypes; no models, no scheduling.

An operation may return an AttentionPlan, RotaryInputs or AttentionInputs as an argument for another
operation. Callers pass these values to the same implementation and never look into them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gllm_engine.ops.batch import Batch, TensorGroup
from gllm_engine.ops.weight import Weight

# Gain [dim] and epsilon of an RMS norm.
Norm = tuple[Tensor, float]
# What `rotate_and_store` needs to know of the positions of a step's tokens.
RotaryInputs = tuple[Tensor, ...]


class AttentionPlan:
    """How one batch attends over the pages; valid for all layers of one shape and window."""


class AttentionInputs(NamedTuple):
    """A step's heads after norm and rotation: the input of `attend`.

    `kv`: the K heads, then the V heads, not rounded to the cache's dtype; None: `attend` reads K
    and V from the cache.
    """

    q: Tensor  # [tokens, heads, head_dim]
    kv: Tensor | None = None  # [tokens, 2 * kv_heads, head_dim]


class PlainSampling(NamedTuple):
    """The part of the runner's state that plain sampling reads and writes, one row per slot."""

    temperature: Tensor  # [slots] float64; 0: greedy
    seeds: Tensor  # [slots] int64
    prompt_lens: Tensor  # [slots] int64
    lengths: Tensor  # [slots] int64, tokens in the cache
    last_tokens: Tensor  # [slots] int64; receives the sampled tokens


class AttentionPlanner(Protocol):
    """Plans the attention of one step after another; may keep memory between steps.

    A plan with prefill chunks is valid until the next plan for layers of the same group, shape and
    window; steps run in the order of their plans. A plan without chunks stays valid, and may be
    made inside a CUDA graph.
    """

    def plan(
        self, batch: Batch, cache: Tensor, num_heads: int, window: int | None, group: int = 0
    ) -> AttentionPlan:
        """Plan the attention of one step for all layers of a group with these query heads, cache
        and window. `batch`: from Batch.of_group.

        `cache`: of any such layer, [num_pages, 2, page_size, kv_heads, head_dim]; only its shape
        and dtype are used. `num_heads`: query heads. `window`: a token attends to itself and to the
        window - 1 tokens before it; None: to all tokens before it.
        """
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

    def rms_norm(self, x: Tensor, gain: Tensor, eps: float, add_to: Tensor | None = None) -> Tensor:
        """x / rms(x) * gain over the last dimension of x [rows, dim], with the mean in float32.

        With `add_to`, the result is added to `add_to`, which is returned.
        """
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up, [rows, width]. `gate_up`: [rows, 2 * width], gate first."""
        ...

    def linear(
        self,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None = None,
        norm: Norm | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """x W' + b: [rows, width], for x [rows, depth], weight [width, depth] and bias [width].

        `norm`: an RMS norm applied to x first. `out`: [rows, width] receives the result.
        """
        ...

    def gated_linear(
        self, x: Tensor, weight: Weight, bias: Tensor | None, norm: Norm | None
    ) -> Tensor:
        """silu(gate) * up, [rows, width / 2], where [gate, up] = linear(x, weight, bias, norm)."""
        ...

    def add_linear(self, total: Tensor, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        """Add linear(x, weight, bias) to `total` [rows, width] in place; return `total`."""
        ...

    def make_one_shot_allreduce(
        self, ranks: TensorGroup, dim: int, dtype: torch.dtype
    ) -> AllReduceKernel | None:
        """The one-shot all-reduce for parts [rows, dim]; all `ranks` must call this together.

        None if it is not supported: on a CPU, for a single rank, ranks on several nodes, float32.
        """
        ...

    def route(self, logits: Tensor, top_k: int, renorm: bool) -> tuple[Tensor, Tensor]:
        """The `top_k` experts of each token, most likely first: (weights float32, experts int32),
        both [tokens, top_k] and contiguous. `logits`: the router's, [tokens, experts].

        Weights are the softmax over all experts; with `renorm` they are divided by the sum of the
        chosen ones. Among equally likely experts the one of lower index is chosen.
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
    ) -> Tensor:
        """Sum of weights * down(silu(gate(x)) * up(x)) over each token's experts: [tokens, dim].

        x: [tokens, dim]. weights, experts: [tokens, top_k] from `route`. gate_up: [local, 2 *
        hidden, dim] and down: [local, dim, hidden], the matrices of this rank's experts, `first` to
        first + local - 1; other experts add nothing. `num_experts`: of all ranks; kernels estimate
        the tokens per expert from it. `total`: [tokens, dim]; the sum is added to it in place.
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

        qkv: [tokens, num_heads + 2 * kv_heads, head_dim], contiguous; may be overwritten. norm:
        [num_heads + kv_heads, head_dim], the gain of every head, or None; eps: the norm's epsilon.
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
    ) -> Tensor:
        """softmax(q k' / sqrt(head_dim)) v over each row's pages: [tokens, heads * head_dim].

        `tokens`: [n] int64, the indices of the input tokens that the plan covers; None: all tokens.
        """
        ...

    def make_planner(self, device: torch.device, dtype: torch.dtype) -> AttentionPlanner:
        """A planner for queries of `dtype`."""
        ...

    def compile_attention(
        self, layers: Sequence[tuple[Tensor, int, int | None]], dtype: torch.dtype
    ) -> None:
        """Compile the attention kernels for queries of `dtype` that are not compiled yet; may take
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
    ) -> Tensor:
        """Sample one token for each row: [rows] int64, also recorded in state.last_tokens.

        scores: [rows, vocab] logits of `slots` [rows]. A token is drawn from the softmax at the
        slot's temperature; at temperature 0 it is the most likely token. The random number is a
        function of the slot's seed and output length. `out`: [rows] int64 receives the tokens.
        `ranks`: every rank has a shard of the logits, [rows, vocab / ranks]. All ranks get the same
        tokens, even if rounding would make their own choices differ.
        """
        ...
