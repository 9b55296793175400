"""A decoder as data: a tuple of (mixer, ffn) layers. No tensors, no checkpoint formats.

Canonical weight names are those of Hugging Face's Llama, one weight per projection; names.py
translates them for checkpoints with other names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from gllm_engine.arch.checkpoint import Names
from gllm_engine.arch.formats import (
    CompressedInt,
    Format,
    Formats,
    Formatted,
    Integers,
    Mxfp4,
    Rounded,
    Shapes,
    format_name,
    held_in,
    stored,
    stored_kind,
    widened,
)
from gllm_engine.arch.rope import Rope
from gllm_engine.attention_shape import AttentionShape as AttentionShape
from gllm_engine.attention_shape import LatentShape as LatentShape
from gllm_engine.routing import Clamp, Routing

if TYPE_CHECKING:
    from gllm_engine.arch.vision import Vision

CacheShapes = tuple[tuple[int, ...], ...]  # of the parts of a layer's page
T = TypeVar("T")
# The bias that a Moe's routing adds to scores; float32, whatever the dtype of the model.
SELECTION_BIAS = "mlp.gate.e_score_correction_bias"
_GATE_AND_UP = ("mlp.experts.gate_proj.weight", "mlp.experts.up_proj.weight")
# Of Mla; always held plain, because its parts are no weights of products.
KV_UP = "self_attn.kv_b_proj.weight"
# Matrices with a row for each token: the embedding, which is always held plain, because rows are
# taken from it, and the output projection.
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# Ends of names of matrices: of the vocabulary, routers, gates of shared experts, decay and update
# rate of GatedDelta, weights of an indexer's heads.
_USUALLY_PLAIN = (
    EMBEDDING,
    HEAD,
    "gate.weight",
    "in_proj_a.weight",
    "in_proj_b.weight",
    "indexer.weights_proj.weight",
)
# Where a layer has norms: before the mixer and the ffn, after them, or both. "parallel": both read
# the same stream, each through a norm of its own; "parallel_shared": through one norm.
Place = Literal["pre", "post", "sandwich", "parallel", "parallel_shared"]
# RMS norm of queries and keys: of each head before or after the rotation, or of all heads together.
# "l2_after": of each head after the rotation, without a gain.
QkNorm = Literal["head", "head_after", "whole", "l2_after"]
# "rms_plus_one": the gain is 1 + weight. "layer": the mean is subtracted, and there is a bias.
NormKind = Literal["rms", "rms_plus_one", "layer", "layer_without_bias"]
# "gelu_quick": x sigmoid(1.702 x).
Activation = Literal["silu", "gelu", "gelu_tanh", "gelu_quick"]

_INPUT_NORMS = ("input_layernorm", "post_attention_layernorm")
_OUTPUT_NORMS = ("post_self_attn_layernorm", "post_mlp_layernorm")
_NORMS: dict[Place, tuple[str, ...]] = {
    "pre": _INPUT_NORMS,
    "post": _OUTPUT_NORMS,
    "sandwich": (*_INPUT_NORMS, *_OUTPUT_NORMS),
    "parallel": _INPUT_NORMS,
    "parallel_shared": _INPUT_NORMS[:1],
}


def linear_weights(name: str, out: int, width: int, bias: bool) -> Shapes:
    weight: Shapes = {f"{name}.weight": (out, width)}
    return weight | {f"{name}.bias": (out,)} if bias else weight


@dataclass(frozen=True)
class QueryTemperature:
    """Queries at position p are multiplied by 1 + beta * ln(1 + floor((p + offset) / length))."""

    beta: float
    length: int  # tokens
    offset: int = 0


@dataclass(frozen=True)
class Gqa(Formatted):
    """Softmax attention in which heads // kv_heads query heads share one key/value head."""

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope | None  # None: no position embedding
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: QkNorm | None = None
    window: int | None = None  # a token sees itself and the window - 1 tokens before it
    # A token at position p sees the tokens from p // window * window on; nothing before.
    chunked: bool = False
    scale: float | None = None  # factor of the scores; None: head_dim ** -0.5
    softcap: float | None = None  # scores become softcap * tanh(score / softcap)
    sinks: bool = False  # every head has one more key, of a learned score and with value 0
    temperature: QueryTemperature | None = None
    output_gate: bool = False  # the heads' results are multiplied by sigmoid(gate_proj x)

    def shapes(self, dim: int) -> Shapes:
        q = self.heads * self.head_dim
        kv = self.kv_heads * self.head_dim
        shapes = linear_weights("self_attn.q_proj", q, dim, self.qkv_bias)
        shapes |= linear_weights("self_attn.k_proj", kv, dim, self.qkv_bias)
        shapes |= linear_weights("self_attn.v_proj", kv, dim, self.qkv_bias)
        if self.output_gate:
            shapes |= linear_weights("self_attn.gate_proj", q, dim, self.qkv_bias)
        shapes |= linear_weights("self_attn.o_proj", dim, q, self.out_bias)
        if self.qk_norm and self.qk_norm != "l2_after":
            whole = self.qk_norm == "whole"
            shapes["self_attn.q_norm.weight"] = (q if whole else self.head_dim,)
            shapes["self_attn.k_norm.weight"] = (kv if whole else self.head_dim,)
        return shapes | {"self_attn.sinks": (self.heads,)} if self.sinks else shapes

    # What a sequence keeps besides pages; see GatedDelta.
    state_shapes = ()

    @property
    def ropes(self) -> tuple[Rope, ...]:
        return () if self.rope is None else (self.rope,)

    @property
    def attention(self) -> AttentionShape:
        return AttentionShape(
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.window,
            self.scale,
            self.softcap,
            self.chunked,
        )

    def cache_shapes(self, page_size: int) -> CacheShapes:
        """One part: K and V, tokens, heads, channels."""
        return ((2, page_size, self.kv_heads, self.head_dim),)

    @property
    def attended_width(self) -> int:
        """Numbers that attention computes for a token, before the output projection."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Indexer:
    """Chooses the tokens that a query attends to (DeepSeek Sparse Attention, DeepSeek-V3.2).

    A token has one key k for all heads. With a query q and a weight w of each head, its score is

        sum over heads of w relu(q k)

    The published score has a positive factor, which changes no order, so it is left out. A query
    attends to the `top_k` tokens of the greatest scores, or to all if there are not more.
    """

    heads: int
    dim: int  # channels of a query and of a key
    rope: Rope  # of their first channels
    top_k: int  # tokens
    eps: float = 1e-6  # of the layer norm of keys

    def shapes(self, dim: int, q_rank: int) -> Shapes:
        """`q_rank`: width of the latent that queries are computed from."""
        shapes = linear_weights("self_attn.indexer.wq_b", self.heads * self.dim, q_rank, False)
        shapes |= linear_weights("self_attn.indexer.wk", self.dim, dim, False)
        shapes |= norm_weights("self_attn.indexer.k_norm", self.dim, "layer")
        return shapes | linear_weights("self_attn.indexer.weights_proj", self.heads, dim, False)

    @property
    def ropes(self) -> tuple[Rope, ...]:
        return (self.rope,)

    @property
    def key_widths(self) -> tuple[int, ...]:
        """Of what the cache holds of a token."""
        return (self.dim,)


@dataclass(frozen=True)
class EarlierIndexer:
    """The Indexer of the last layer before this one that has an Indexer (GLM-5.2).

    A query attends to the tokens that it has chosen there. It has no weights here and no keys in
    this layer's cache. Both layers must be in one pipeline stage; see Model.runs.
    """

    top_k: int  # tokens, as there

    ropes = ()
    key_widths = ()

    def shapes(self, dim: int, q_rank: int) -> Shapes:
        """As Indexer.shapes."""
        del dim, q_rank
        return {}


@dataclass(frozen=True)
class Mla(Formatted):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    The cache holds one latent vector per token for all heads, and one rotated key. A head's key is
    [W_UK latent, rotated key], its value W_UV latent. Attention may be computed in the absorbed
    form: W_UK is applied to the queries and W_UV to the result, so that no key or value is made.
    """

    heads: int
    q_rank: int | None  # width of the latent that queries are computed from; None: from x itself
    kv_rank: int  # width of the latent in the cache
    nope_dim: int  # channels of a head that are not rotated
    v_dim: int
    rope: Rope  # of the other channels, all of which are rotated
    scale: float  # of the scores
    out_bias: bool = False
    latent_eps: float = 1e-6  # of the norms of both latents
    # None: a token attends to all tokens before it. An Indexer needs a q_rank.
    indexer: Indexer | EarlierIndexer | None = None

    def shapes(self, dim: int) -> Shapes:
        q = self.heads * (self.nope_dim + self.rope.dim)
        shapes: Shapes = {}
        if self.q_rank is None:
            shapes["self_attn.q_proj.weight"] = (q, dim)
        else:
            shapes["self_attn.q_a_proj.weight"] = (self.q_rank, dim)
            shapes["self_attn.q_a_layernorm.weight"] = (self.q_rank,)
            shapes["self_attn.q_b_proj.weight"] = (q, self.q_rank)
        shapes["self_attn.kv_a_proj_with_mqa.weight"] = (self.latent_width, dim)
        shapes["self_attn.kv_a_layernorm.weight"] = (self.kv_rank,)
        kv = self.heads * (self.nope_dim + self.v_dim)
        shapes[KV_UP] = (kv, self.kv_rank)
        if self.indexer is not None:
            shapes |= self.indexer.shapes(dim, self.q_rank or 0)
        return shapes | linear_weights(
            "self_attn.o_proj", dim, self.heads * self.v_dim, self.out_bias
        )

    @property
    def latent_width(self) -> int:
        return self.kv_rank + self.rope.dim

    state_shapes = ()
    temperature = None
    window = None  # every token sees all tokens before it

    @property
    def ropes(self) -> tuple[Rope, ...]:
        return (self.rope,) if self.indexer is None else (self.rope, *self.indexer.ropes)

    @property
    def attention(self) -> LatentShape:
        top_k = None if self.indexer is None else self.indexer.top_k
        key_dim = self.nope_dim + self.rope.dim
        return LatentShape(self.heads, key_dim, self.v_dim, self.scale, self.latent_width, top_k)

    def cache_shapes(self, page_size: int) -> CacheShapes:
        """Each part: one plane, tokens, one head, channels. First the latent and the rotated key,
        then the indexer's key.
        """
        latents = (1, page_size, 1, self.latent_width)
        widths = () if self.indexer is None else self.indexer.key_widths
        return (latents, *((1, page_size, 1, width) for width in widths))

    @property
    def attended_width(self) -> int:
        """Numbers that attention computes for a decode row, before W_UV."""
        return self.heads * self.kv_rank


@dataclass(frozen=True)
class RecurrentShape:
    """The parameters of a plan for layers that keep a state per sequence: there are none."""


@dataclass(frozen=True)
class GatedDelta(Formatted):
    """Linear attention with the gated delta rule (Yang et al., arXiv 2412.06464).

    A sequence has a matrix S [k_dim, v_dim] for each value head, in place of K and V per token. For
    each token, with g and b between 0 and 1:

        S = g S;   S = S + k (b (v - S' k))';   o = S' q

    Before that, q, k and v go through a causal convolution over `conv` tokens. v_heads // k_heads
    value heads share a query and a key.
    """

    k_heads: int
    v_heads: int
    k_dim: int
    v_dim: int
    conv: int

    # As of attention without rotation.
    ropes = ()
    temperature = None
    window = None  # the state depends on all tokens

    def shapes(self, dim: int) -> Shapes:
        k = self.k_heads * self.k_dim
        v = self.v_heads * self.v_dim
        shapes: Shapes = {}
        for name, width in (("q", k), ("k", k), ("v", v), ("z", v)):
            shapes[f"linear_attn.in_proj_{name}.weight"] = (width, dim)
        for name in ("b", "a"):
            shapes[f"linear_attn.in_proj_{name}.weight"] = (self.v_heads, dim)
        for name, width in (("q", k), ("k", k), ("v", v)):
            shapes[f"linear_attn.conv_{name}.weight"] = (width, 1, self.conv)
        shapes["linear_attn.A_log"] = (self.v_heads,)
        shapes["linear_attn.dt_bias"] = (self.v_heads,)
        shapes["linear_attn.norm.weight"] = (self.v_dim,)
        shapes["linear_attn.out_proj.weight"] = (dim, v)
        return shapes

    @property
    def attention(self) -> RecurrentShape:
        return RecurrentShape()

    @property
    def conv_width(self) -> int:
        return 2 * self.k_heads * self.k_dim + self.v_heads * self.v_dim

    def cache_shapes(self, page_size: int) -> CacheShapes:
        """Nothing is kept per token."""
        del page_size
        return ()

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of one sequence: the matrices, and the convolution's last inputs."""
        return (self.v_heads, self.k_dim, self.v_dim), (self.conv_width, self.conv - 1)

    @property
    def attended_width(self) -> int:
        return self.v_heads * self.v_dim


@dataclass(frozen=True)
class Dense(Formatted):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) if not `gated`."""

    hidden: int
    bias: bool = False  # bias of gate and up
    out_bias: bool = False
    act: Activation = "silu"
    gated: bool = True

    def shapes(self, dim: int) -> Shapes:
        shapes: Shapes = {}
        if self.gated:
            shapes = linear_weights("mlp.gate_proj", self.hidden, dim, self.bias)
        shapes |= linear_weights("mlp.up_proj", self.hidden, dim, self.bias)
        return shapes | linear_weights("mlp.down_proj", dim, self.hidden, self.out_bias)


@dataclass(frozen=True)
class Moe(Formatted):
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

    @property
    def expert(self) -> Dense:
        """One expert, with its formats."""
        formats = self.formats_within("experts")
        return Dense(self.hidden, self.bias, self.out_bias, formats=formats)

    def shapes(self, dim: int) -> Shapes:
        shapes = linear_weights("mlp.gate", self.num_experts, dim, self.router_bias)
        if self.routing.biased:
            shapes[SELECTION_BIAS] = (self.num_experts,)
        for expert in self.experts:
            shapes |= within(f"experts.{expert}", self.expert.shapes(dim))
        if self.shared:
            shapes |= within("shared_expert", Dense(self.shared).shapes(dim))
        if self.shared_gate:
            shapes["mlp.shared_expert_gate.weight"] = (1, dim)
        return shapes

    def with_formats(self, formats: Mapping[str, Format], dim: int) -> Moe:
        """See Formatted.with_formats. An expert's gate and up are one product: if they differ in
        format, both are held plain.
        """
        found = super().with_formats(formats, dim)
        kinds = dict(found.formats)
        if len({str(kinds.get(name)) for name in _GATE_AND_UP}) == 1:
            return found
        plain = ((n, widened(kind) if n in _GATE_AND_UP else kind) for n, kind in found.formats)
        return replace(found, formats=tuple(plain))

    def formats_within(self, part: str) -> Formats:
        """The formats of the Dense that is `part` of this Moe: "experts" or "shared_expert"."""
        prefix = f"mlp.{part}."
        return tuple(
            (name.replace(prefix, "mlp.", 1), kind)
            for name, kind in self.formats
            if name.startswith(prefix)
        )


def within_layer(index: int, weights: dict[str, T]) -> dict[str, T]:
    """Rename a Layer's weights to their names in the model."""
    return {f"model.layers.{index}.{name}": value for name, value in weights.items()}


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

    mixer: Gqa | Mla | GatedDelta
    ffn: Dense | Moe
    place: Place = "pre"

    @property
    def needs_earlier(self) -> bool:
        """Whether it uses what an earlier layer computes, beside the residual stream."""
        return isinstance(self.mixer, Mla) and isinstance(self.mixer.indexer, EarlierIndexer)

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
    names: Names = Names()  # of the tensors of its checkpoints
    quantization: tuple[Format, ...] = ()  # that the config promises for matrices
    vocab_formats: Formats = ()  # of EMBEDDING and HEAD
    # Layers after these that its checkpoints may have, for multi-token prediction; not loaded.
    extra_layers: int = 0
    norm: NormKind = "rms"  # of the residual stream; queries and keys have the RMS kinds only
    positions: int = 0  # rows of a table of learned positions, added to embeddings; 0: no table
    embed_scale: float = 1.0  # factor of the embeddings, rounded to the model's dtype first
    residual_scale: float = 1.0  # factor of every output that is added to the residual stream
    logit_scale: float = 1.0
    logit_softcap: float | None = None  # logits become softcap * tanh(logit / softcap)
    vision: Vision | None = None  # the tower beside it, if it takes images
    unknown_keys: tuple[str, ...] = field(default=(), compare=False)  # of its config.json

    def __post_init__(self) -> None:
        if self.residual_scale != 1 and any(layer.place == "post" for layer in self.layers):
            raise ValueError("residual_scale needs layers that normalise their input")
        if self.layers and self.layers[0].needs_earlier:
            raise ValueError("the first layer of a model or a pipeline stage needs an earlier one")

    def each(self, **parts: Callable[[int, Layer], Any]) -> Model:
        """A copy with `mixer=f(i, layer)`, or another field so, applied to every layer."""
        layers = (
            replace(layer, **{key: f(i, layer) for key, f in parts.items()})
            for i, layer in enumerate(self.layers)
        )
        return replace(self, layers=tuple(layers))

    def runs(self) -> list[tuple[Layer, ...]]:
        """The layers in order, in runs of which no pipeline stage may have a part only."""
        # The first stage has what a tower adds after the first layers.
        deep = range(1, self.vision.num_deep if self.vision is not None else 0)
        starts = [
            i for i, layer in enumerate(self.layers) if not layer.needs_earlier and i not in deep
        ]
        ends = [*starts[1:], len(self.layers)]
        return [self.layers[start:end] for start, end in zip(starts, ends, strict=True)]

    def weights(self, first: int = 0) -> Shapes:
        """Canonical name -> shape of every weight, in the order of the forward pass; those of the
        vision tower last.

        `first`: the index of the first layer.
        """
        shapes = self._of_vocabulary(EMBEDDING)
        if self.positions:
            shapes["model.embed_positions.weight"] = (self.positions, self.dim)
        for i, layer in enumerate(self.layers, first):
            shapes |= within_layer(i, layer.weights(self.dim, self.norm))
        shapes |= norm_weights("model.norm", self.dim, self.norm)
        if not self.tie:
            shapes |= self._of_vocabulary(HEAD)
        return shapes if self.vision is None else shapes | self.vision.weights()

    def _of_vocabulary(self, name: str) -> Shapes:
        return stored({name: (self.vocab, self.dim)}, self.vocab_formats)

    @property
    def state_bytes(self) -> int:
        """Bytes of a sequence's states in all layers, in float32; 0: no layer keeps one."""
        shapes = (shape for layer in self.layers for shape in layer.mixer.state_shapes)
        return 4 * sum(map(prod, shapes))

    @property
    def keeps_states(self) -> bool:
        """Whether any layer keeps a state per sequence."""
        return self.state_bytes > 0

    @property
    def has_sections(self) -> bool:
        """Whether the positions of an image's tokens have three parts, see Rope.sections."""
        return self.vision is not None and any(
            rope.sections for layer in self.layers for rope in layer.mixer.ropes
        )

    def matrices(self) -> Shapes:
        """Canonical name -> shape of the weights that may have a format."""
        return {
            name: shape
            for name, shape in self.weights().items()
            if name in (EMBEDDING, HEAD)
            or name.startswith("model.layers.")
            and name.endswith(".weight")
            and len(shape) == 2
        }

    def with_formats(self, formats: Mapping[str, Format]) -> Model:
        """A copy with the formats of weights, by canonical name; for a model of plain weights.

        All experts of a layer have the format of any one.
        """
        by_layer: dict[int, dict[str, Format]] = defaultdict(dict)
        outer: dict[str, Format] = {}
        for name, kind in formats.items():
            if name in (EMBEDDING, HEAD):
                outer[name] = widened(kind) if name == EMBEDDING else kind
                continue
            layer, weight = name.removeprefix("model.layers.").split(".", 1)
            by_layer[int(layer)][format_name(weight)] = held_in(weight, kind)
        return replace(self, vocab_formats=tuple(outer.items())).each(
            mixer=lambda i, layer: layer.mixer.with_formats(by_layer[i], self.dim),
            ffn=lambda i, layer: layer.ffn.with_formats(by_layer[i], self.dim),
        )

    def stored_kinds(self) -> dict[str, Format]:
        """The formats in which weights are stored that are not plain, by format_name."""
        return {name: stored_kind(kind) for name, kind in self.held_kinds().items()}

    def integers_by_scales(self) -> dict[str, Integers]:
        """The formats of weights that are stored as whole numbers, by format_name of the scales."""
        return {
            weight.removesuffix("weight") + kind.scales: kind
            for weight, kind in self.stored_kinds().items()
            if isinstance(kind, Integers)
        }

    def held_kinds(self) -> dict[str, Format]:
        """The formats of the weights that are not stored plain, by format_name."""
        kinds = dict(self.vocab_formats)
        for i, layer in enumerate(self.layers):
            kinds |= within_layer(i, dict((*layer.mixer.formats, *layer.ffn.formats)))
        return kinds

    def formats(self) -> set[Format]:
        """The formats of weights that are not plain."""
        return set(self.held_kinds().values())

    def quantized(self) -> Model:
        """A copy in which all matrices that usually are quantised have a promised format.

        Of several formats, experts have the one of the fewest bits, and other matrices the one of
        the most; if there are no experts, the feed-forward matrices are as experts.
        """
        if not self.quantization:
            return self
        names = [name for name in self.matrices() if not name.endswith(_USUALLY_PLAIN)]
        least = min(self.quantization, key=lambda kind: kind.bits)
        most = max(self.quantization, key=lambda kind: kind.bits)
        experts = [name for name in names if ".experts." in name]
        if least != most:
            narrow = experts or [name for name in names if ".mlp." in name]
            return self.with_formats(dict.fromkeys(names, most) | dict.fromkeys(narrow, least))
        if isinstance(stored_kind(most), (Mxfp4, CompressedInt)):
            names = experts or names
        return self.with_formats(dict.fromkeys(names, most))

    def rounded(self) -> Model:
        """A copy, of a model of plain weights, whose matrices are held as FP8 with a scale per row.

        Those that usually are not quantised stay plain, and those that a layer only holds plain.
        """
        plain = (*_USUALLY_PLAIN, KV_UP)
        names = [name for name in self.matrices() if not name.endswith(plain)]
        return self.with_formats(dict.fromkeys(names, Rounded()))

    def widened(self) -> Model:
        """A copy whose weights are held plain, whatever their formats in the checkpoint."""
        outer = tuple((name, widened(kind)) for name, kind in self.vocab_formats)
        return replace(self, vocab_formats=outer).each(
            mixer=lambda _, layer: layer.mixer.widened(),
            ffn=lambda _, layer: layer.ffn.widened(),
        )

    def num_params(self) -> int:
        return sum(prod(shape) for shape in self.with_formats({}).weights().values())

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of KV cache per token over all layers, at `itemsize` bytes per number."""
        shapes = (shape for layer in self.layers for shape in layer.mixer.cache_shapes(1))
        return itemsize * sum(map(prod, shapes))
