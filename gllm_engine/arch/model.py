"""A decoder as data: a tuple of (mixer, ffn) layers. No tensors, no checkpoint formats.

Canonical weight names are those of Hugging Face's Llama, one weight per projection; names.py
translates them for checkpoints with other names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeVar

from gllm_engine.arch.rope import Rope
from gllm_engine.routing import Clamp, Routing

Shapes = dict[str, tuple[int, ...]]  # weight name -> shape
T = TypeVar("T")
# The bias that a Moe's routing adds to scores; float32, whatever the dtype of the model.
SELECTION_BIAS = "mlp.gate.e_score_correction_bias"


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
    bias: bool = False  # bias of gate and up
    out_bias: bool = False

    def weights(self, dim: int) -> Shapes:
        shapes = _linear("mlp.gate_proj", self.hidden, dim, self.bias)
        shapes |= _linear("mlp.up_proj", self.hidden, dim, self.bias)
        return shapes | _linear("mlp.down_proj", dim, self.hidden, self.out_bias)


@dataclass(frozen=True)
class Moe:
    """Mixture of experts: sum of w[e] * expert[e](x) over the experts that `routing` chooses.

    An expert is a Dense; the logits are gate x. A rank may hold only some experts, or a slice of
    each expert's `hidden`. Every rank routes over all experts and computes a partial sum; the
    ranks' partial sums add up to the result.
    """

    num_experts: int
    hidden: int  # hidden size of one expert
    routing: Routing
    shared: int = 0  # hidden size of the shared expert, which every token uses; 0: none
    shared_gate: bool = False  # its output is multiplied by sigmoid(shared_expert_gate x)
    on_input: bool = False  # w[e] multiplies x, not the expert's output
    router_bias: bool = False
    bias: bool = False  # biases of every expert's gate and up, as in Dense
    out_bias: bool = False
    clamp: Clamp | None = None  # what the experts compute of gate and up; None: silu(gate) * up
    local_experts: tuple[int, int] | None = None  # (first, count) on this rank; None: all

    @property
    def experts(self) -> range:
        """The experts whose weights this rank holds."""
        first, count = self.local_experts or (0, self.num_experts)
        return range(first, first + count)

    def weights(self, dim: int) -> Shapes:
        shapes = _linear("mlp.gate", self.num_experts, dim, self.router_bias)
        if self.routing.biased:
            shapes[SELECTION_BIAS] = (self.num_experts,)
        dense = Dense(self.hidden, self.bias, self.out_bias)
        for expert in self.experts:
            shapes |= within(f"experts.{expert}", dense.weights(dim))
        if self.shared:
            shapes |= within("shared_expert", Dense(self.shared).weights(dim))
        if self.shared_gate:
            shapes["mlp.shared_expert_gate.weight"] = (1, dim)
        return shapes


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
    # Layers after these that its checkpoints may have, for multi-token prediction; not loaded.
    extra_layers: int = 0

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

    def num_params(self) -> int:
        return sum(prod(shape) for shape in self.weights().values())

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of KV cache per token over all layers, at `itemsize` bytes per number."""
        return itemsize * sum(layer.mixer.kv_elements_per_token() for layer in self.layers)
