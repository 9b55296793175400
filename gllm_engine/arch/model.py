"""A decoder as data: a tuple of (mixer, ffn) layers. No tensors, no checkpoint formats.

Canonical weight names are those of Hugging Face's Llama, one weight per projection; names.py
translates them for checkpoints with other names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal, TypeVar

from gllm_engine.arch.rope import Rope

Shapes = dict[str, tuple[int, ...]]  # weight name -> shape
T = TypeVar("T")
# Where a layer has norms: before the mixer and the ffn, after them, or both. "parallel": both read
# the same stream, each through a norm of its own; "parallel_shared": through one norm.
Place = Literal["pre", "post", "sandwich", "parallel", "parallel_shared"]
# RMS norm of queries and keys: of each head before or after the rotation, or of all heads together.
QkNorm = Literal["head", "head_after", "whole"]
# "rms_plus_one": the gain is 1 + weight. "layer": the mean is subtracted, and there is a bias.
NormKind = Literal["rms", "rms_plus_one", "layer", "layer_without_bias"]
Activation = Literal["silu", "gelu", "gelu_tanh"]

_INPUT_NORMS = ("input_layernorm", "post_attention_layernorm")
_OUTPUT_NORMS = ("post_self_attn_layernorm", "post_mlp_layernorm")
_NORMS: dict[Place, tuple[str, ...]] = {
    "pre": _INPUT_NORMS,
    "post": _OUTPUT_NORMS,
    "sandwich": (*_INPUT_NORMS, *_OUTPUT_NORMS),
    "parallel": _INPUT_NORMS,
    "parallel_shared": _INPUT_NORMS[:1],
}


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
    scale: float | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class QueryTemperature:
    """Queries at position p are multiplied by 1 + beta * ln(1 + floor(p / length))."""

    beta: float
    length: int  # tokens


@dataclass(frozen=True)
class Gqa:
    """Softmax attention in which heads // kv_heads query heads share one key/value head."""

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope | None  # None: no position embedding
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: QkNorm | None = None
    window: int | None = None  # a token sees itself and the window - 1 tokens before it
    scale: float | None = None  # factor of the scores; None: head_dim ** -0.5
    softcap: float | None = None  # scores become softcap * tanh(score / softcap)
    temperature: QueryTemperature | None = None

    def weights(self, dim: int) -> Shapes:
        q = self.heads * self.head_dim
        kv = self.kv_heads * self.head_dim
        shapes = _linear("self_attn.q_proj", q, dim, self.qkv_bias)
        shapes |= _linear("self_attn.k_proj", kv, dim, self.qkv_bias)
        shapes |= _linear("self_attn.v_proj", kv, dim, self.qkv_bias)
        shapes |= _linear("self_attn.o_proj", dim, q, self.out_bias)
        if self.qk_norm:
            whole = self.qk_norm == "whole"
            shapes["self_attn.q_norm.weight"] = (q if whole else self.head_dim,)
            shapes["self_attn.k_norm.weight"] = (kv if whole else self.head_dim,)
        return shapes

    @property
    def attention(self) -> AttentionShape:
        return AttentionShape(
            self.heads, self.kv_heads, self.head_dim, self.window, self.scale, self.softcap
        )

    def kv_elements_per_token(self) -> int:
        return 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Dense:
    """down(act(gate(x)) * up(x)), or down(act(up(x))) if not `gated`."""

    hidden: int
    bias: bool = False  # bias of gate and up
    out_bias: bool = False
    act: Activation = "silu"
    gated: bool = True

    def weights(self, dim: int) -> Shapes:
        shapes: Shapes = {}
        if self.gated:
            shapes = _linear("mlp.gate_proj", self.hidden, dim, self.bias)
        shapes |= _linear("mlp.up_proj", self.hidden, dim, self.bias)
        return shapes | _linear("mlp.down_proj", dim, self.hidden, self.out_bias)


@dataclass(frozen=True)
class Moe:
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

    def weights(self, dim: int) -> Shapes:
        shapes: Shapes = {"mlp.gate.weight": (self.num_experts, dim)}
        for expert in self.experts:
            shapes |= within(f"experts.{expert}", Dense(self.hidden).weights(dim))
        if self.shared:
            shapes |= within("shared_expert", Dense(self.shared).weights(dim))
            shapes["mlp.shared_expert_gate.weight"] = (1, dim)
        return shapes


def within(part: str, weights: dict[str, T]) -> dict[str, T]:
    """Rename a Dense's weights to their names as `part` of a Moe."""
    return {name.replace("mlp.", f"mlp.{part}.", 1): value for name, value in weights.items()}


@dataclass(frozen=True)
class Layer:
    """Adds the outputs of a mixer and of an ffn to the residual stream x, with norms as `place`.

    pre: x += mixer(norm(x)); x += ffn(norm(x)). post: x += norm(mixer(x)); x += norm(ffn(x)).
    sandwich: x += norm(mixer(norm(x))); x += norm(ffn(norm(x))).
    parallel: x += mixer(norm(x)) + ffn(norm(x)).
    """

    mixer: Gqa
    ffn: Dense | Moe
    place: Place = "pre"

    @property
    def norms(self) -> tuple[str, ...]:
        return _NORMS[self.place]

    def weights(self, dim: int, norm: NormKind = "rms") -> Shapes:
        shapes: Shapes = {}
        for name in self.norms:
            shapes |= norm_weights(name, dim, norm)
        return shapes | self.mixer.weights(dim) | self.ffn.weights(dim)


def norm_weights(name: str, dim: int, kind: NormKind) -> Shapes:
    weight: Shapes = {f"{name}.weight": (dim,)}
    return weight | {f"{name}.bias": (dim,)} if kind == "layer" else weight


@dataclass(frozen=True)
class Model:
    """A decoder's description: everything except the values of its weights."""

    dim: int
    vocab: int
    layers: tuple[Layer, ...]
    eps: float  # epsilon of every norm
    tie: bool  # the output projection is the embedding
    max_len: int  # tokens, with RoPE scaling
    eos_token_ids: tuple[int, ...] = ()
    names: str = "hf"  # the table in names.py for its checkpoints
    norm: NormKind = "rms"  # of the residual stream; queries and keys have the RMS kinds only
    positions: int = 0  # rows of a table of learned positions, added to embeddings; 0: no table
    embed_scale: float = 1.0  # factor of the embeddings, rounded to the model's dtype first
    residual_scale: float = 1.0  # factor of every output that is added to the residual stream
    logit_scale: float = 1.0
    logit_softcap: float | None = None  # logits become softcap * tanh(logit / softcap)

    def __post_init__(self) -> None:
        if self.residual_scale != 1 and any(layer.place == "post" for layer in self.layers):
            raise ValueError("residual_scale needs layers that normalise their input")

    def each(self, **parts: Callable[[int, Layer], Any]) -> Model:
        """A copy with `mixer=f(i, layer)`, or another field so, applied to every layer."""
        layers = (
            replace(layer, **{key: f(i, layer) for key, f in parts.items()})
            for i, layer in enumerate(self.layers)
        )
        return replace(self, layers=tuple(layers))

    def weights(self, first: int = 0) -> Shapes:
        """Canonical name -> shape of every weight, in the order of the forward pass.

        `first`: the index of the first layer.
        """

        def own(layer: Layer) -> Shapes:
            return layer.weights(self.dim, self.norm)

        shapes: Shapes = {"model.embed_tokens.weight": (self.vocab, self.dim)}
        if self.positions:
            shapes["model.embed_positions.weight"] = (self.positions, self.dim)
        for i, layer in enumerate(self.layers, first):
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in own(layer).items()}
        shapes |= norm_weights("model.norm", self.dim, self.norm)
        return shapes if self.tie else shapes | {"lm_head.weight": (self.vocab, self.dim)}

    def num_params(self) -> int:
        return sum(prod(shape) for shape in self.weights().values())

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of KV cache per token over all layers, at `itemsize` bytes per number."""
        return itemsize * sum(layer.mixer.kv_elements_per_token() for layer in self.layers)
