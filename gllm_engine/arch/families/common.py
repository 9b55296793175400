"""What several families have in common: typed parts of a Model, read from usual keys.

Defaults for absent keys are those of transformers' config classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any

from gllm_engine.arch.checkpoint import Renames, Variant
from gllm_engine.arch.fields import ArchError, Fields
from gllm_engine.arch.model import Activation, Dense, Gqa, Layer, Mla, Model
from gllm_engine.arch.rope import DynamicScaling, Rope, YarnScaling, read_rope
from gllm_engine.routing import Routing

# Larger than any known model. A config without limits could describe a model too large to build.
MAX_LAYERS = 512
MAX_EXPERTS = 2048

# Some names are of other ways to compute the same function.
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "gelu_quick",
}

FUSED_MLP: Renames = (
    ("mlp.gate_proj", "mlp.gate_up_proj"),
    ("mlp.up_proj", "mlp.gate_up_proj"),
)
# All experts of a layer in one tensor.
FUSED_EXPERTS: Renames = (
    ("mlp.experts.*.gate_proj.weight", "mlp.experts.gate_up_proj"),
    ("mlp.experts.*.up_proj.weight", "mlp.experts.gate_up_proj"),
    ("mlp.experts.*.down_proj.weight", "mlp.experts.down_proj"),
)
# Of a text model beside a vision tower; in both forms the output projection has the same name.
BESIDE_TOWER = Variant(r"^model\.language_model\.", (("model.", "model.language_model."),))
# Of a text model beside a model for images.
LANGUAGE_MODEL: Renames = (
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)


def beside_images(read: Callable[[Fields], Model]) -> Callable[[Fields], Model]:
    """The reader of a text model, as `read`, that is stored beside a model for images."""
    in_transformers = Variant(
        r"^model\.language_model\.",
        (
            ("language_model.model.", "model.language_model."),
            ("language_model.lm_head.", "lm_head."),
        ),
    )

    @wraps(read)
    def read_text(c: Fields) -> Model:
        model = read(c)
        names = replace(
            model.names,
            renames=(*model.names.renames, *LANGUAGE_MODEL),
            variants=(*model.names.variants, in_transformers),
            tower=r"(vision_tower|mm_projector|multi_modal_projector)\.",
        )
        return replace(model, names=names)

    return read_text


def read_head_dim(c: Fields) -> int:
    return c.count("head_dim", c.count("hidden_size") // c.count("num_attention_heads"))


def divided_head_dim(c: Fields, width_key: str, heads_key: str) -> int:
    """Channels of a head, for a family whose heads are as wide as the model together."""
    width = c.count(width_key)
    heads = c.count(heads_key)
    if width % heads:
        raise ArchError(f"{c.name}: {heads_key} is {heads}, but it must divide {width_key}={width}")
    return width // heads


def read_interleaved_rope(c: Fields) -> Rope:
    return replace(read_rope(c, read_head_dim(c)), interleaved=True)


def read_gqa(c: Fields, rope: Rope | None = None, bias_key: str | None = None) -> Gqa:
    """`rope`: None: as read_rope. `bias_key`: of whether all four projections have biases."""
    heads = c.count("num_attention_heads")
    head_dim = read_head_dim(c)
    bias = bias_key is not None and c.flag(bias_key)
    return Gqa(
        heads=heads,
        kv_heads=c.count("num_key_value_heads", heads),
        head_dim=head_dim,
        rope=rope or read_rope(c, head_dim),
        qkv_bias=bias,
        out_bias=bias,
    )


def read_decoder(
    c: Fields,
    mixer: Gqa | Mla,
    ffn: Dense | None = None,
    eps_key: str = "rms_norm_eps",
    *,
    dim_key: str = "hidden_size",
    vocab_key: str = "vocab_size",
    layers_key: str = "num_hidden_layers",
    len_key: str = "max_position_embeddings",
) -> Model:
    """A model of equal layers. `ffn`: None: without biases. `eps_key`: of the norms' epsilon."""
    ffn = ffn or Dense(c.count("intermediate_size"))
    return Model(
        dim=c.count(dim_key),
        vocab=c.count(vocab_key),
        layers=(Layer(mixer, ffn),) * c.count(layers_key, most=MAX_LAYERS),
        eps=c.real(eps_key),
        tie=c.flag("tie_word_embeddings"),
        max_len=_max_len(c.count(len_key), mixer.rope),
        eos_token_ids=c.numbers("eos_token_id"),
    )


def _max_len(positions: int, rope: Rope | None) -> int:
    """The model's length in tokens, with RoPE scaling.

    `positions` (max_position_embeddings) includes linear and llama3 scaling, but not always
    dynamic and YaRN scaling.
    """
    scaling = None if rope is None else rope.scaling
    if isinstance(scaling, DynamicScaling):
        return int(scaling.original_len * scaling.factor)
    if isinstance(scaling, YarnScaling):
        return max(positions, int(scaling.original_len * scaling.factor))
    return positions


def with_mixers(model: Model, **changes: Any) -> Model:
    """A copy in which every mixer has these values."""
    return model.each(mixer=lambda _, layer: replace(layer.mixer, **changes))


def with_mixers_by_layer(model: Model, **changes: Sequence[Any]) -> Model:
    """A copy in which the mixer of layer i has the i-th of these values."""

    def changed(i: int, layer: Layer) -> Any:
        return replace(layer.mixer, **{name: values[i] for name, values in changes.items()})

    return model.each(mixer=changed)


def with_window(c: Fields, model: Model) -> Model:
    """Give every layer the window in `sliding_window`, if there is one."""
    window = c.optional_count("sliding_window")
    kind = "full_attention" if window is None else "sliding_attention"
    c.choices("layer_types", len(model.layers), (kind,))
    return with_mixers(model, window=window)


def read_layer_types(c: Fields, other: str, usually: Sequence[bool]) -> Sequence[bool]:
    """Whether each layer has the type `other` in `layer_types`, in place of full attention.

    `usually`: for a config without that key.
    """
    types = c.choices("layer_types", len(usually), ("full_attention", other))
    return usually if types is None else [kind == other for kind in types]


def with_layer_types(
    c: Fields, model: Model, full_every: int, full: Rope | None, sliding: Rope | None
) -> Model:
    """Give the layers the RoPE of their type, `full` or `sliding`, and the sliding ones the window.

    Without `layer_types`, every `full_every`-th layer has full attention.
    """
    usually = [(i + 1) % full_every > 0 for i in range(len(model.layers))]
    slides = read_layer_types(c, "sliding_attention", usually)
    window = c.count("sliding_window") if any(slides) else None
    return with_mixers_by_layer(
        model,
        rope=[sliding if own else full for own in slides],
        window=[window if own else None for own in slides],
    )


def read_rotated_layers(c: Fields, num_layers: int) -> list[bool]:
    """Whether each layer has RoPE. In `no_rope_layers`, despite its name, 1 means RoPE."""
    every = c.count("no_rope_layer_interval")
    rotated = c.flags("no_rope_layers", num_layers)
    return rotated or [(i + 1) % every > 0 for i in range(num_layers)]


def read_num_experts(c: Fields) -> int:
    # Newer releases of transformers save Qwen3's num_experts as num_local_experts.
    num_experts = c.count("num_local_experts", most=MAX_EXPERTS)
    return c.count("num_experts", num_experts, most=MAX_EXPERTS)


def read_routing(
    c: Fields,
    renorm: bool,
    num_experts: int,
    key: str = "num_experts_per_tok",
    top_k: int | None = None,
) -> Routing:
    """A softmax over `num_experts` experts; `key`: of the number of experts of a token.

    `top_k`: that number, if it differs from layer to layer.
    """
    top_k = top_k or c.count(key)
    if top_k > num_experts:
        raise ArchError(
            f"{c.name}: {key} is {top_k}, but only 1 to {num_experts} is supported, "
            "the number of experts"
        )
    return Routing(top_k, renorm)
