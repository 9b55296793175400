"""A decoder is data: a tuple of (mixer, ffn) layers. No tensors, no checkpoint quirks.

Weights carry Hugging Face's Llama names, one per projection ("canonical"); names.py translates
for checkpoints that say otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeVar

from gllm_engine.arch.rope import Rope

Shapes = dict[str, tuple[int, ...]]  # weight name -> shape
T = TypeVar("T")


def _linear(name: str, out: int, width: int, bias: bool) -> Shapes:
    weight: Shapes = {f"{name}.weight": (out, width)}
    return weight | {f"{name}.bias": (out,)} if bias else weight


@dataclass(frozen=True)
class AttentionShape:
    """What attention over the cache is planned for: mixers that agree in this share a plan."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None


@dataclass(frozen=True)
class Gqa:
    """Softmax attention in which heads // kv_heads query heads share one key/value head."""

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False  # RMS norm of each query and key head before the rotation
    window: int | None = None  # a token sees itself and the window - 1 tokens before it

    def weights(self, dim: int) -> Shapes:
        q = self.heads * self.head_dim
        kv = self.kv_heads * self.head_dim
        shapes = _linear("self_attn.q_proj", q, dim, self.qkv_bias)
        shapes |= _linear("self_attn.k_proj", kv, dim, self.qkv_bias)
        shapes |= _linear("self_attn.v_proj", kv, dim, self.qkv_bias)
        shapes |= _linear("self_attn.o_proj", dim, q, self.out_bias)
        if self.qk_norm:
            shapes["self_attn.q_norm.weight"] = (self.head_dim,)
            shapes["self_attn.k_norm.weight"] = (self.head_dim,)
        return shapes

    @property
    def attention(self) -> AttentionShape:
        return AttentionShape(self.heads, self.kv_heads, self.head_dim, self.window)

    def kv_elements_per_token(self) -> int:
        return 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Dense:
    """down(silu(gate(x)) * up(x))."""

    hidden: int
    bias: bool = False  # of gate and up
    out_bias: bool = False

    def weights(self, dim: int) -> Shapes:
        shapes = _linear("mlp.gate_proj", self.hidden, dim, self.bias)
        shapes |= _linear("mlp.up_proj", self.hidden, dim, self.bias)
        return shapes | _linear("mlp.down_proj", dim, self.hidden, self.out_bias)


@dataclass(frozen=True)
class Moe:
    """Mixture of experts: sum of p[e] * expert[e](x) over the `top_k` largest p = softmax(gate x).

    An expert is a Dense. A rank that holds some experts alone, or a slice of every `hidden`, routes
    over all of them, and gives the part of the sum that it holds: ranks' parts sum to the whole.
    """

    num_experts: int
    top_k: int
    hidden: int  # of one expert
    renorm: bool  # divide the chosen p by their sum
    # Hidden size of an expert for every token, times sigmoid(shared_expert_gate x); 0: none.
    shared: int = 0
    local_experts: tuple[int, int] | None = None  # first expert here, and how many are; None: all

    @property
    def experts(self) -> range:
        """Those whose weights are here."""
        first, count = self.local_experts or (0, self.num_experts)
        return range(first, first + count)

    def weights(self, dim: int) -> Shapes:
        shapes: Shapes = {"mlp.gate.weight": (self.num_experts, dim)}
        for expert in self.experts:
            shapes |= within(f"experts.{expert}", Dense(self.hidden).weights(dim))
        if self.shared:
            shapes |= within("shared_expert", Dense(self.shared).weights(dim))
            shapes["mlp.shared_expert_gate.weight"] = (1, dim)
        return shapes


def within(part: str, weights: dict[str, T]) -> dict[str, T]:
    """A Dense's weights, by the names they have as `part` of a Moe."""
    return {name.replace("mlp.", f"mlp.{part}.", 1): value for name, value in weights.items()}


@dataclass(frozen=True)
class Layer:
    """x += mixer(norm(x)); x += ffn(norm(x))."""

    mixer: Gqa
    ffn: Dense | Moe

    def weights(self, dim: int) -> Shapes:
        norms: Shapes = {
            "input_layernorm.weight": (dim,),
            "post_attention_layernorm.weight": (dim,),
        }
        return norms | self.mixer.weights(dim) | self.ffn.weights(dim)


@dataclass(frozen=True)
class SandwichLayer(Layer):
    """x += norm(mixer(norm(x))); x += norm(ffn(norm(x)))."""

    def weights(self, dim: int) -> Shapes:
        norms: Shapes = {
            "post_self_attn_layernorm.weight": (dim,),
            "post_mlp_layernorm.weight": (dim,),
        }
        return norms | super().weights(dim)


@dataclass(frozen=True)
class Model:
    """A decoder, all of it but the numbers in its weights."""

    dim: int
    vocab: int
    layers: tuple[Layer, ...]
    eps: float  # of every RMS norm
    tie: bool  # the output projection is the embedding
    max_len: int  # tokens it was trained for, with its RoPE scaling
    eos_token_ids: tuple[int, ...] = ()
    names: str = "hf"  # which table of names.py its checkpoints follow

    def each(self, **parts: Callable[[int, Layer], Any]) -> Model:
        """A copy with `mixer=f(i, layer)` and/or `ffn=f(i, layer)` applied to every layer."""
        layers = (
            replace(layer, **{key: f(i, layer) for key, f in parts.items()})
            for i, layer in enumerate(self.layers)
        )
        return replace(self, layers=tuple(layers))

    def weights(self, first: int = 0) -> Shapes:
        """Every weight's canonical name and shape, in the order of the forward pass.

        `first`: the number of the first layer.
        """
        shapes: Shapes = {"model.embed_tokens.weight": (self.vocab, self.dim)}
        for i, layer in enumerate(self.layers, first):
            shapes |= {f"model.layers.{i}.{k}": v for k, v in layer.weights(self.dim).items()}
        shapes["model.norm.weight"] = (self.dim,)
        return shapes if self.tie else shapes | {"lm_head.weight": (self.vocab, self.dim)}

    def num_params(self) -> int:
        return sum(prod(shape) for shape in self.weights().values())

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of KV cache one token takes over all layers, at `itemsize` bytes a number."""
        return itemsize * sum(layer.mixer.kv_elements_per_token() for layer in self.layers)
