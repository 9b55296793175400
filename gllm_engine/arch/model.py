"""A decoder as data: a tuple of (mixer, ffn) layers. No tensors, no checkpoint formats.

Canonical weight names are those of Hugging Face's Llama, one weight per projection; names.py
translates them for checkpoints with other names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeVar

from gllm_engine.arch.formats import Formats, Formatted, Fp8, Shapes, format_name
from gllm_engine.arch.rope import Rope

T = TypeVar("T")


def _linear(name: str, out: int, width: int, bias: bool) -> Shapes:
    weight: Shapes = {f"{name}.weight": (out, width)}
    return weight | {f"{name}.bias": (out,)} if bias else weight


@dataclass(frozen=True)
class AttentionShape:
    """The parameters of an attention plan. Mixers with equal parameters share a plan."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None


@dataclass(frozen=True)
class Gqa(Formatted):
    """Softmax attention in which heads // kv_heads query heads share one key/value head."""

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False  # RMS norm of each query and key head before the rotation
    window: int | None = None  # a token sees itself and the window - 1 tokens before it

    def shapes(self, dim: int) -> Shapes:
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
class Dense(Formatted):
    """down(silu(gate(x)) * up(x))."""

    hidden: int
    bias: bool = False  # bias of gate and up
    out_bias: bool = False

    def shapes(self, dim: int) -> Shapes:
        shapes = _linear("mlp.gate_proj", self.hidden, dim, self.bias)
        shapes |= _linear("mlp.up_proj", self.hidden, dim, self.bias)
        return shapes | _linear("mlp.down_proj", dim, self.hidden, self.out_bias)


@dataclass(frozen=True)
class Moe(Formatted):
    """Mixture of experts: sum of p[e] * expert[e](x) over the `top_k` largest p = softmax(gate x).

    An expert is a Dense. A rank may hold only some experts, or a slice of each expert's `hidden`.
    Every rank routes over all experts and computes a partial sum; the ranks' partial sums add up to
    the result.
    """

    num_experts: int
    top_k: int
    hidden: int  # hidden size of one expert
    renorm: bool  # divide the chosen p by their sum
    # Hidden size of the shared expert, which every token uses; its output is multiplied by
    # sigmoid(shared_expert_gate x). 0: no shared expert.
    shared: int = 0
    local_experts: tuple[int, int] | None = None  # (first, count) on this rank; None: all

    @property
    def experts(self) -> range:
        """The experts whose weights this rank holds."""
        first, count = self.local_experts or (0, self.num_experts)
        return range(first, first + count)

    def shapes(self, dim: int) -> Shapes:
        shapes: Shapes = {"mlp.gate.weight": (self.num_experts, dim)}
        for expert in self.experts:
            shapes |= within(f"experts.{expert}", Dense(self.hidden).shapes(dim))
        if self.shared:
            shapes |= within("shared_expert", Dense(self.shared).shapes(dim))
            shapes["mlp.shared_expert_gate.weight"] = (1, dim)
        return shapes

    def formats_within(self, part: str) -> Formats:
        """The formats of the Dense that is `part` of this Moe: "experts" or "shared_expert"."""
        prefix = f"mlp.{part}."
        return tuple(
            (name.replace(prefix, "mlp.", 1), kind)
            for name, kind in self.formats
            if name.startswith(prefix)
        )


def within(part: str, weights: dict[str, T]) -> dict[str, T]:
    """Rename a Dense's weights to their names as `part` of a Moe."""
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
    """A decoder's description: everything except the values of its weights."""

    dim: int
    vocab: int
    layers: tuple[Layer, ...]
    eps: float  # epsilon of every RMS norm
    tie: bool  # the output projection is the embedding
    max_len: int  # tokens, with RoPE scaling
    eos_token_ids: tuple[int, ...] = ()
    names: str = "hf"  # the table in names.py for its checkpoints
    quantization: Fp8 | None = None  # the format that the config promises for matrices of layers

    def each(self, **parts: Callable[[int, Layer], Any]) -> Model:
        """A copy with `mixer=f(i, layer)` and/or `ffn=f(i, layer)` applied to every layer."""
        layers = (
            replace(layer, **{key: f(i, layer) for key, f in parts.items()})
            for i, layer in enumerate(self.layers)
        )
        return replace(self, layers=tuple(layers))

    def weights(self, first: int = 0) -> Shapes:
        """Canonical name -> shape of every weight, in the order of the forward pass.

        `first`: the index of the first layer.
        """
        shapes: Shapes = {"model.embed_tokens.weight": (self.vocab, self.dim)}
        for i, layer in enumerate(self.layers, first):
            shapes |= {f"model.layers.{i}.{k}": v for k, v in layer.weights(self.dim).items()}
        shapes["model.norm.weight"] = (self.dim,)
        return shapes if self.tie else shapes | {"lm_head.weight": (self.vocab, self.dim)}

    def matrices(self) -> Shapes:
        """Canonical name -> shape of the weights that may have a format."""
        return {
            name: shape
            for name, shape in self.weights().items()
            if name.startswith("model.layers.") and name.endswith(".weight") and len(shape) == 2
        }

    def with_formats(self, formats: Mapping[str, Fp8]) -> Model:
        """A copy with the formats of weights, by canonical name; for a model of plain weights.

        All experts of a layer have the format of any one.
        """
        by_layer: dict[int, dict[str, Fp8]] = defaultdict(dict)
        for name, kind in formats.items():
            layer, weight = name.removeprefix("model.layers.").split(".", 1)
            by_layer[int(layer)][format_name(weight)] = kind
        return self.each(
            mixer=lambda i, layer: layer.mixer.with_formats(by_layer[i], self.dim),
            ffn=lambda i, layer: layer.ffn.with_formats(by_layer[i], self.dim),
        )

    def formats(self) -> set[Fp8]:
        """The formats of weights that are not plain."""
        parts = (part for layer in self.layers for part in (layer.mixer, layer.ffn))
        return {kind for part in parts for _, kind in part.formats}

    def quantized(self) -> Model:
        """A copy in which all matrices that usually are quantised have the promised format.

        Routers and gates of shared experts usually are not.
        """
        if self.quantization is None:
            return self
        names = (name for name in self.matrices() if not name.endswith("gate.weight"))
        return self.with_formats(dict.fromkeys(names, self.quantization))

    def num_params(self) -> int:
        return sum(prod(shape) for shape in self.with_formats({}).weights().values())

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of KV cache per token over all layers, at `itemsize` bytes per number."""
        return itemsize * sum(layer.mixer.kv_elements_per_token() for layer in self.layers)
