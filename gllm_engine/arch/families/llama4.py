"""Llama 4: attention in chunks, or to all tokens without RoPE; experts in some layers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from gllm_engine.arch.checkpoint import Layout, Names, Renames, Variant
from gllm_engine.arch.families.common import (
    FUSED_EXPERTS,
    LANGUAGE_MODEL,
    MAX_EXPERTS,
    MAX_LAYERS,
    read_decoder,
    read_gqa,
    read_interleaved_rope,
    read_layer_types,
    read_rotated_layers,
    read_routing,
    with_mixers_by_layer,
)
from gllm_engine.arch.families.llama import LLAMA
from gllm_engine.arch.fields import Fields
from gllm_engine.arch.model import Dense, Model, Moe, QkNorm, QueryTemperature
from gllm_engine.arch.rope import Rope

LLAMA4 = LLAMA | {
    "vocab_size": 202048,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "num_local_experts": 16,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "use_qk_norm": True,
    "no_rope_layer_interval": 4,
    "attention_chunk_size": 8192,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
}
_RENAMES: Renames = (
    ("mlp.gate.", "mlp.router."),
    ("mlp.", "feed_forward."),
)
# Checkpoints of compressed-tensors have experts one by one.
_WITH_FUSED_EXPERTS = Variant(
    r"\.experts\.gate_up_proj",
    tuple(
        (old.replace("mlp.", "feed_forward."), new.replace("mlp.", "feed_forward."))
        for old, new in FUSED_EXPERTS
    ),
)
# Scales of FP8 experts are transposed like their numbers.
_FUSED = r"feed_forward\.experts\.(gate_up|down)_proj(_weight)?(_scale(_inv)?)?$"
_NAMES = Names(renames=_RENAMES, layouts=((_FUSED, Layout(transposed=True)),))
# ModelOpt writes the names of a text model, also beside a model for images.
_OF_TEXT_MODEL = Variant(
    r"^model\.layers\.",
    (("language_model.model.", "model."), ("language_model.lm_head.", "lm_head.")),
)


def llama4(c: Fields) -> Model:
    rope = read_interleaved_rope(c)
    ffn = Dense(c.count("intermediate_size_mlp"))
    model = read_decoder(c, read_gqa(c, rope, "attention_bias"), ffn)
    model = _with_chunks(c, model, rope)
    experts = c.count("num_local_experts", most=MAX_EXPERTS)
    hidden = c.count("intermediate_size")
    moe = Moe(
        num_experts=experts,
        hidden=hidden,
        routing=replace(read_routing(c, False, experts), scoring="sigmoid"),
        shared=hidden,
        on_input=True,
    )
    step = c.count("interleave_moe_layer_step")
    sparse: Collection[int] = range(step - 1, len(model.layers), step)
    if c.has("moe_layers"):
        sparse = c.numbers("moe_layers", "layer number", MAX_LAYERS)
    model = model.each(ffn=lambda i, layer: moe if i in sparse else layer.ffn)
    method = c.child("quantization_config").text("quant_method", "")
    fused = replace(_WITH_FUSED_EXPERTS, applies=method != "compressed-tensors")
    return replace(model, names=replace(_NAMES, variants=(fused,)))


def llama4_vision(c: Fields) -> Model:
    """The text of models that have vision."""
    model = llama4(c)
    names = replace(
        model.names,
        renames=(*_RENAMES, *LANGUAGE_MODEL),
        variants=(*model.names.variants, _OF_TEXT_MODEL),
        unused=r"(vision_model|multi_modal_projector)\.",
    )
    return replace(model, names=names)


def _with_chunks(c: Fields, model: Model, rope: Rope) -> Model:
    """Give the layers chunks, RoPE and a norm, or none of these and a temperature."""
    rotated = read_rotated_layers(c, len(model.layers))
    size = c.optional_count("attention_chunk_size")
    usually = [own and size is not None for own in rotated]
    chunked = read_layer_types(c, "chunked_attention", usually)
    if any(chunked):
        size = c.count("attention_chunk_size")
    temperature: QueryTemperature | None = None
    if c.truth("attn_temperature_tuning"):
        temperature = QueryTemperature(c.real("attn_scale"), c.count("floor_scale"), offset=1)
    c.ignore("attn_scale", "floor_scale")  # they may be left over
    qk_norm: QkNorm | None = "l2_after" if c.flag("use_qk_norm") else None
    return with_mixers_by_layer(
        model,
        chunked=chunked,
        window=[size if own else None for own in chunked],
        rope=[rope if own else None for own in rotated],
        qk_norm=[qk_norm if own else None for own in rotated],
        temperature=[None if own else temperature for own in rotated],
    )
