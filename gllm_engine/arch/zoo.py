"""Makes a Model from a Hugging Face config.json: one short function per model family.

Related families derive from each other. Defaults for absent keys are those of transformers' config
classes. This module knows no weights and does not import transformers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any, NamedTuple

from gllm_engine.arch.fields import ArchError, Fields
from gllm_engine.arch.model import (
    Activation,
    Dense,
    GatedDelta,
    Gqa,
    Indexer,
    Layer,
    Mla,
    Model,
    Moe,
    QkNorm,
    QueryTemperature,
)
from gllm_engine.arch.quantization import read_quantization
from gllm_engine.arch.rope import (
    DynamicScaling,
    Rope,
    YarnScaling,
    read_alpha_rope,
    read_layer_ropes,
    read_rope,
    rope_object,
)
from gllm_engine.files import read_object, shown
from gllm_engine.routing import Clamp, Routing

Reader = Callable[[Fields], Model]

# Larger than any known model. A config without limits could describe a model too large to build.
MAX_LAYERS = 512
MAX_EXPERTS = 2048
MAX_LEN = 2**24  # tokens

# Some names are of other ways to compute the same function.
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}

_GELUS = tuple(name for name, act in _ACTIVATIONS.items() if act != "silu")


class Family(NamedTuple):
    """`text_key`: the key of the object that describes the text model, beside other models."""

    read: Reader
    defaults: dict[str, Any]
    text_key: str | None


FAMILIES: dict[str, Family] = {}
# Keys beside the description of the text model that are about it.
_SHARED_KEYS = ("tie_word_embeddings", "quantization_config")


def family(
    *architectures: str, defaults: dict[str, Any], text_key: str | None = None
) -> Callable[[Reader], Reader]:
    """Register a reader for architecture names, with defaults for keys that a config may omit."""

    def register(reader: Reader) -> Reader:
        FAMILIES.update(dict.fromkeys(architectures, Family(reader, defaults, text_key)))
        return reader

    return register


_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 2,
}


@family("LlamaForCausalLM", defaults=_LLAMA)
def llama(c: Fields) -> Model:
    return _llama(c, read_rope(c, _head_dim(c)))


def _llama(c: Fields, rope: Rope) -> Model:
    bias = c.flag("attention_bias")
    mixer = replace(_gqa(c, rope), qkv_bias=bias, out_bias=bias)
    mlp_bias = c.flag("mlp_bias")
    return _decoder(c, mixer, Dense(c.count("intermediate_size"), mlp_bias, mlp_bias))


_MISTRAL = _LLAMA | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}


@family("MistralForCausalLM", defaults=_MISTRAL)
def mistral(c: Fields) -> Model:
    return _with_window(c, llama(c))


def _with_window(c: Fields, model: Model) -> Model:
    window = c.optional_count("sliding_window")
    c.require(layer_types=None)
    return model.each(mixer=lambda _, layer: replace(_gqa_of(layer), window=window))


_QWEN2 = _LLAMA | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "eos_token_id": None,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


@family("Qwen2ForCausalLM", defaults=_QWEN2)
def qwen2(c: Fields) -> Model:
    model = _decoder(c, replace(_gqa(c), qkv_bias=True), Dense(c.count("intermediate_size")))
    return _with_windows(c, model)


@family("Qwen3ForCausalLM", defaults=_QWEN2 | {"head_dim": 128})
def qwen3(c: Fields) -> Model:
    model = _with_mixers(llama(c), qk_norm="head")
    return _with_windows(c, model)


_MIXTRAL = _MISTRAL | {
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "rope_theta": 1e6,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


@family("MixtralForCausalLM", defaults=_MIXTRAL)
def mixtral(c: Fields) -> Model:
    experts = _num_experts(c)
    moe = Moe(experts, c.count("intermediate_size"), _routing(c, True, experts))
    return replace(mistral(c).each(ffn=lambda _, layer: moe), names="mixtral")


_QWEN2_MOE = _QWEN2 | {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_local_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
}


@family("Qwen2MoeForCausalLM", defaults=_QWEN2_MOE)
def qwen2_moe(c: Fields) -> Model:
    bias = c.flag("qkv_bias", True)
    model = _with_mixers(qwen2(c), qkv_bias=bias)
    return _with_experts(c, model, c.count("shared_expert_intermediate_size"))


_QWEN3_MOE = _QWEN2_MOE | {
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_local_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}


@family("Qwen3MoeForCausalLM", defaults=_QWEN3_MOE)
def qwen3_moe(c: Fields) -> Model:
    return _with_experts(c, qwen3(c))


_QWEN3_NEXT = _QWEN3_MOE | {
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "intermediate_size": 5632,
    "partial_rotary_factor": 0.25,
    "num_local_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "norm_topk_prob": True,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}


@family("Qwen3NextForCausalLM", defaults=_QWEN3_NEXT)
def qwen3_next(c: Fields) -> Model:
    model = _hybrid(c, read_rope(c, _head_dim(c)))
    model = _with_experts(c, model, c.count("shared_expert_intermediate_size"))
    return replace(model, names="qwen3_next")


_QWEN3_5 = _QWEN3_NEXT | {
    "vocab_size": 248320,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_key_value_heads": 4,
}


# Qwen3.5 and Qwen3.6.
@family("Qwen3_5ForCausalLM", defaults=_QWEN3_5)
def qwen3_5(c: Fields) -> Model:
    # Positions of text are the same in all three sections of rotary channels.
    rope = read_rope(c, _head_dim(c), ("mrope_section", "mrope_interleaved"))
    return replace(_hybrid(c, rope), names="qwen3_5")


@family("Qwen3_5ForConditionalGeneration", defaults=_QWEN3_5, text_key="text_config")
def qwen3_5_vl(c: Fields) -> Model:
    return qwen3_5(c)


_QWEN3_5_MOE = _QWEN3_5 | {
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "num_local_experts": 256,
    "num_experts_per_tok": 8,
}


@family("Qwen3_5MoeForCausalLM", defaults=_QWEN3_5_MOE)
def qwen3_5_moe(c: Fields) -> Model:
    c.require(norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[])
    model = _with_experts(c, qwen3_5(c), c.count("shared_expert_intermediate_size"))
    # Experts in other formats are stored one by one.
    plain = c.child("quantization_config").empty
    return replace(model, name_variants=("fused_experts",) if plain else ())


@family("Qwen3_5MoeForConditionalGeneration", defaults=_QWEN3_5_MOE, text_key="text_config")
def qwen3_5_moe_vl(c: Fields) -> Model:
    return qwen3_5_moe(c)


def _hybrid(c: Fields, rope: Rope) -> Model:
    """Layers with the gated delta rule, and softmax attention in every n-th layer.

    The norms' gains are 1 + weight, except those inside of the gated delta rule.
    """
    c.require(attn_output_gate=True, mamba_ssm_dtype="float32", use_sliding_window=False)
    if (gate := c.text("output_gate_type", "swish")) not in ("swish", "silu"):
        raise ArchError(
            f"{c.name}: output_gate_type is {shown(repr(gate))}, but only swish is known"
        )
    k_heads = c.count("linear_num_key_heads")
    v_heads = c.count("linear_num_value_heads")
    if v_heads % k_heads:
        raise ArchError(
            f"{c.name}: linear_num_value_heads is {v_heads}, but it must be a multiple of "
            f"linear_num_key_heads={k_heads}"
        )
    delta = GatedDelta(
        k_heads=k_heads,
        v_heads=v_heads,
        k_dim=c.count("linear_key_head_dim", most=256),
        v_dim=c.count("linear_value_head_dim"),
        conv=c.count("linear_conv_kernel_dim", most=4, least=2),
    )
    bias = c.flag("attention_bias")
    mixer = replace(_gqa(c, rope), qkv_bias=bias, out_bias=bias, qk_norm="head", output_gate=True)
    model = _decoder(c, mixer, Dense(c.count("intermediate_size")))
    num_layers = len(model.layers)
    every = c.count("full_attention_interval", most=MAX_LAYERS)
    linear = "linear_attention"
    kinds = c.choices("layer_types", num_layers, (linear, "full_attention"))
    kinds = kinds or [linear if (i + 1) % every else "full_attention" for i in range(num_layers)]
    model = model.each(mixer=lambda i, layer: delta if kinds[i] == linear else layer.mixer)
    return replace(model, norm="rms_plus_one")


_GLM = _LLAMA | {
    "vocab_size": 151552,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-7,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
    "eos_token_id": [151329, 151336, 151338],
}


@family("GlmForCausalLM", defaults=_GLM)
def glm(c: Fields) -> Model:
    rope = replace(read_rope(c, _head_dim(c)), interleaved=True)
    mixer = replace(_gqa(c, rope), qkv_bias=c.flag("attention_bias"))
    return replace(_decoder(c, mixer, Dense(c.count("intermediate_size"))), names="glm")


@family("Glm4ForCausalLM", defaults=_GLM)
def glm4(c: Fields) -> Model:
    model = glm(c)
    return model.each(place=lambda *_: "sandwich")


_OLMO2 = _LLAMA | {"vocab_size": 50304, "rms_norm_eps": 1e-5, "eos_token_id": 50279}


@family("Olmo2ForCausalLM", defaults=_OLMO2)
def olmo2(c: Fields) -> Model:
    return _olmo(llama(c))


_OLMO3 = _OLMO2 | {"rope_theta": 500_000.0, "sliding_window": 4096}


@family("Olmo3ForCausalLM", defaults=_OLMO3)
def olmo3(c: Fields) -> Model:
    ropes = read_layer_ropes(c, _head_dim(c))
    model = _olmo(_llama(c, ropes["full_attention"]))
    return _with_layer_types(c, model, ropes, full_every=4)


def _olmo(model: Model) -> Model:
    model = model.each(mixer=lambda _, layer: replace(_gqa_of(layer), qk_norm="whole"))
    return replace(model.each(place=lambda *_: "post"), names="olmo")


_SMOLLM3 = _LLAMA | {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 2_000_000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 128001,
    "no_rope_layer_interval": 4,
}


@family("SmolLM3ForCausalLM", defaults=_SMOLLM3)
def smollm3(c: Fields) -> Model:
    c.require(use_sliding_window=False)
    model = llama(c)
    rotated = _rotated_layers(c, len(model.layers))
    return model.each(
        mixer=lambda i, layer: replace(
            _gqa_of(layer), rope=_gqa_of(layer).rope if rotated[i] else None
        )
    )


def _rotated_layers(c: Fields, num_layers: int) -> list[bool]:
    """Whether each layer has RoPE. In `no_rope_layers`, despite its name, 1 means RoPE."""
    every = c.count("no_rope_layer_interval")
    rotated = c.flags("no_rope_layers", num_layers)
    return rotated or [(i + 1) % every != 0 for i in range(num_layers)]


_GRANITE = _LLAMA | {
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "logits_scaling": 1.0,
}


@family("GraniteForCausalLM", defaults=_GRANITE)
def granite(c: Fields) -> Model:
    scale = c.real("attention_multiplier")
    return replace(
        llama(c).each(mixer=lambda _, layer: replace(_gqa_of(layer), scale=scale)),
        embed_scale=c.real("embedding_multiplier"),
        residual_scale=c.real("residual_multiplier"),
        logit_scale=1 / c.real("logits_scaling"),
    )


_HUNYUAN = _LLAMA | {"vocab_size": 290943, "rms_norm_eps": 1e-5}


@family("HunYuanDenseV1ForCausalLM", defaults=_HUNYUAN)
def hunyuan(c: Fields) -> Model:
    c.require(use_qk_norm=True, use_cla=False)
    model = _llama(c, read_alpha_rope(c, _head_dim(c)))
    model = model.each(mixer=lambda _, layer: replace(_gqa_of(layer), qk_norm="head_after"))
    return replace(model, names="hunyuan")


_ERNIE = _LLAMA | {
    "vocab_size": 103424,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": True,
}


@family("Ernie4_5ForCausalLM", defaults=_ERNIE)
def ernie(c: Fields) -> Model:
    c.require(compression_ratio=1.0)
    bias = c.flag("use_bias")
    rope = replace(read_rope(c, _head_dim(c)), interleaved=True)
    mixer = replace(_gqa(c, rope), qkv_bias=bias, out_bias=bias)
    return _decoder(c, mixer, Dense(c.count("intermediate_size"), bias, bias))


_PHI3 = _LLAMA | {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 32000,
}


# Phi-3, Phi-3.5, Phi-4 and Phi-4-mini.
@family("Phi3ForCausalLM", defaults=_PHI3)
def phi3(c: Fields) -> Model:
    c.require(attention_bias=False, mlp_bias=False, lm_head_bias=False)
    return replace(mistral(c), names="phi3")


_MINISTRAL3 = _MISTRAL | {
    "vocab_size": 131072,
    "num_hidden_layers": 34,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1_000_000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "mscale_all_dim": 1.0,
        "mscale": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
}


@family("Ministral3ForCausalLM", defaults=_MINISTRAL3)
def ministral3(c: Fields) -> Model:
    keys = ("llama_4_scaling_beta", "max_position_embeddings")  # transformers ignores the second
    rope = read_rope(c, _head_dim(c), keys)
    model = _with_window(c, _llama(c, rope))
    beta = rope_object(c).optional_real("llama_4_scaling_beta")
    if beta is None:
        return model
    length = rope_object(c).count("original_max_position_embeddings")
    temperature = QueryTemperature(beta, length)
    return model.each(mixer=lambda _, layer: replace(_gqa_of(layer), temperature=temperature))


_GEMMA2 = _LLAMA | {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "hidden_act": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}


@family("Gemma2ForCausalLM", defaults=_GEMMA2)
def gemma2(c: Fields) -> Model:
    rope = read_rope(c, _head_dim(c))
    ropes = {"full_attention": rope, "sliding_attention": rope}
    return _with_layer_types(c, _gemma(c, rope), ropes, full_every=2)


_GEMMA3 = _GEMMA2 | {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "sliding_window_pattern": 6,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}


@family("Gemma3ForCausalLM", defaults=_GEMMA3)
def gemma3(c: Fields) -> Model:
    c.require(use_bidirectional_attention=False, attn_logit_softcapping=None)
    ropes = read_layer_ropes(c, _head_dim(c))
    model = _gemma(c, ropes["full_attention"])
    model = model.each(mixer=lambda _, layer: replace(_gqa_of(layer), qk_norm="head"))
    return _with_layer_types(c, model, ropes, full_every=c.count("sliding_window_pattern"))


def _gemma(c: Fields, rope: Rope) -> Model:
    c.require(hidden_activation="gelu_pytorch_tanh")
    bias = c.flag("attention_bias")
    mixer = replace(
        _gqa(c, rope),
        qkv_bias=bias,
        out_bias=bias,
        scale=c.real("query_pre_attn_scalar") ** -0.5,
        softcap=c.optional_real("attn_logit_softcapping"),
    )
    model = _decoder(c, mixer, Dense(c.count("intermediate_size"), act="gelu_tanh"))
    return replace(
        model.each(place=lambda *_: "sandwich"),
        norm="rms_plus_one",
        embed_scale=model.dim**0.5,
        logit_softcap=c.optional_real("final_logit_softcapping"),
        names="gemma",
    )


_COHERE2 = _LLAMA | {
    "vocab_size": 256000,
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
    "logit_scale": 0.0625,
    "tie_word_embeddings": True,
    "eos_token_id": 255001,
}


@family("Cohere2ForCausalLM", defaults=_COHERE2)
def cohere2(c: Fields) -> Model:
    c.require(use_parallel_block=True, use_gated_activation=True, use_qk_norm=False)
    c.require(position_embedding_type="rope_gptj", rotary_pct=1.0)
    rope = replace(read_rope(c, _head_dim(c)), interleaved=True)
    bias = c.flag("attention_bias")
    mixer = replace(_gqa(c, rope), qkv_bias=bias, out_bias=bias)
    ffn = Dense(c.count("intermediate_size"))
    model = _decoder(c, mixer, ffn, eps="layer_norm_eps")
    model = replace(
        model.each(place=lambda *_: "parallel_shared"),
        norm="layer_without_bias",
        logit_scale=c.real("logit_scale"),
    )
    ropes = {"full_attention": None, "sliding_attention": rope}
    return _with_layer_types(c, model, ropes, full_every=c.count("sliding_window_pattern"))


_STARCODER2 = _LLAMA | {
    "vocab_size": 49152,
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_hidden_layers": 30,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 4096,
    "norm_epsilon": 1e-5,
    "use_bias": True,
    "tie_word_embeddings": True,
    "eos_token_id": 50256,
}


@family("Starcoder2ForCausalLM", defaults=_STARCODER2)
def starcoder2(c: Fields) -> Model:
    c.require(norm_type="layer_norm", mlp_type="default")
    bias = c.flag("use_bias")
    mixer = replace(_gqa(c), qkv_bias=bias, out_bias=bias)
    ffn = Dense(c.count("intermediate_size"), bias, bias, act="gelu_tanh", gated=False)
    model = _with_window(c, _decoder(c, mixer, ffn, eps="norm_epsilon"))
    return replace(model, norm="layer", names="starcoder2")


_GPT2 = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "eos_token_id": 50256,
}


@family("GPT2LMHeadModel", defaults=_GPT2)
def gpt2(c: Fields) -> Model:
    c.require(scale_attn_by_inverse_layer_idx=False)
    return replace(_gpt2(c, kv_heads=c.count("n_head")), names="gpt2")


_BIGCODE = _GPT2 | {"activation_function": "gelu_pytorch_tanh"}


# StarCoder and SantaCoder: GPT-2 with one key/value head.
@family("GPTBigCodeForCausalLM", defaults=_BIGCODE)
def gpt_bigcode(c: Fields) -> Model:
    c.require(multi_query=True)
    return replace(_gpt2(c, kv_heads=1), names="gpt_bigcode")


def _gpt2(c: Fields, kv_heads: int) -> Model:
    c.require(scale_attn_weights=True, add_cross_attention=False)
    dim = c.count("n_embd")
    heads = c.count("n_head")
    if dim % heads:
        raise ArchError(f"{c.name}: n_head is {heads}, but it must divide n_embd={dim}")
    hidden = c.count("n_inner", 4 * dim)
    act = _ACTIVATIONS[c.choice("activation_function", _GELUS)]
    ffn = Dense(hidden, bias=True, out_bias=True, act=act, gated=False)
    mixer = Gqa(heads, kv_heads, dim // heads, rope=None, qkv_bias=True, out_bias=True)
    positions = c.count("n_positions")
    return Model(
        dim=dim,
        vocab=c.count("vocab_size"),
        layers=(Layer(mixer, ffn),) * c.count("n_layer", most=MAX_LAYERS),
        eps=c.real("layer_norm_epsilon"),
        tie=c.flag("tie_word_embeddings"),
        max_len=positions,
        eos_token_ids=c.numbers("eos_token_id"),
        norm="layer",
        positions=positions,
    )


_NEOX = {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "intermediate_size": 24576,
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10_000.0,
    "attention_bias": True,
    "eos_token_id": 2,
}


# GPT-NeoX and Pythia.
@family("GPTNeoXForCausalLM", defaults=_NEOX)
def gpt_neox(c: Fields) -> Model:
    dim = c.count("hidden_size")
    heads = c.count("num_attention_heads")
    if dim % heads:
        raise ArchError(
            f"{c.name}: num_attention_heads is {heads}, but it must divide hidden_size={dim}"
        )
    share = c.real("rotary_pct")
    rope = read_rope(c, dim // heads, theta=c.real("rotary_emb_base"), rotated_share=share)
    bias = c.flag("attention_bias")
    mixer = Gqa(heads, heads, dim // heads, rope, qkv_bias=bias, out_bias=bias)
    act = _ACTIVATIONS[c.choice("hidden_act", _GELUS)]
    ffn = Dense(c.count("intermediate_size"), bias=True, out_bias=True, act=act, gated=False)
    model = _decoder(c, mixer, ffn, eps="layer_norm_eps")
    if c.flag("use_parallel_residual", True):
        model = model.each(place=lambda *_: "parallel")
    return replace(model, norm="layer", names="gpt_neox")


_GLM4_MOE = _GLM | {
    "intermediate_size": 10944,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": None,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "eos_token_id": None,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 128,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
}


@family("Glm4MoeForCausalLM", defaults=_GLM4_MOE)
def glm4_moe(c: Fields) -> Model:
    qk_norm: QkNorm | None = "head" if c.flag("use_qk_norm") else None
    mixer = replace(_gqa(c), qkv_bias=c.flag("attention_bias"), qk_norm=qk_norm)
    return _deepseek_experts(c, _decoder(c, mixer, Dense(c.count("intermediate_size"))))


_ERNIE_MOE = _LLAMA | {
    "vocab_size": 103424,
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": True,
    "moe_intermediate_size": 1536,
    "moe_k": 6,
    "moe_num_experts": 64,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
    "moe_norm_min": 1e-12,
}


@family("Ernie4_5_MoeForCausalLM", defaults=_ERNIE_MOE)
def ernie_moe(c: Fields) -> Model:
    c.require(use_bias=False, moe_gate="topk", moe_gate_act="softmax", moe_group_experts=False)
    rope = replace(read_rope(c, _head_dim(c)), interleaved=True)
    model = _decoder(c, _gqa(c, rope), Dense(c.count("intermediate_size")))
    experts = c.count("moe_num_experts", most=MAX_EXPERTS)
    hidden = c.count("moe_intermediate_size")
    routing = _routing(c, True, experts, key="moe_k")
    moe = Moe(
        num_experts=experts,
        hidden=hidden,
        routing=replace(routing, biased=True, least_sum=c.real("moe_norm_min")),
        shared=hidden * c.count("moe_num_shared_experts", 0, MAX_EXPERTS, least=0),
    )
    first = c.count("moe_layer_start_index", most=MAX_LAYERS, least=0)
    last = c.count("moe_layer_end_index", most=MAX_LAYERS, least=-1)
    last = len(model.layers) - 1 if last == -1 else last
    step = c.count("moe_layer_interval")
    model = model.each(
        ffn=lambda i, layer: moe if first <= i <= last and not (i + 1) % step else layer.ffn
    )
    return replace(model, names="ernie")


_GPT_OSS = _LLAMA | {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150_000.0,
    "attention_bias": True,
    "sliding_window": 128,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "swiglu_limit": 7.0,
    "swiglu_alpha": 1.702,
    "eos_token_id": None,
}
_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


@family("GptOssForCausalLM", defaults=_GPT_OSS)
def gpt_oss(c: Fields) -> Model:
    if rope_object(c).empty:
        c = c.with_defaults(rope_parameters=_GPT_OSS_ROPE)
    rope = read_rope(c, _head_dim(c))
    bias = c.flag("attention_bias")
    mixer = replace(_gqa(c, rope), qkv_bias=bias, out_bias=bias, sinks=True)
    experts = _num_experts(c)
    routing = _routing(c, True, experts)
    c.require(experts_per_token=routing.top_k)  # an older name of the same
    hidden = c.count("intermediate_size")
    moe = Moe(
        num_experts=experts,
        hidden=hidden,
        routing=routing,
        router_bias=True,
        bias=True,
        out_bias=True,
        clamp=Clamp(c.real("swiglu_limit"), c.real("swiglu_alpha")),
    )
    model = _decoder(c, mixer, Dense(hidden)).each(ffn=lambda *_: moe)
    ropes = {"full_attention": rope, "sliding_attention": rope}
    return _with_layer_types(c, replace(model, names="gpt_oss"), ropes, full_every=2)


_LLAMA4 = _LLAMA | {
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


@family("Llama4ForCausalLM", defaults=_LLAMA4)
def llama4(c: Fields) -> Model:
    rope = replace(read_rope(c, _head_dim(c)), interleaved=True)
    bias = c.flag("attention_bias")
    mixer = replace(_gqa(c, rope), qkv_bias=bias, out_bias=bias)
    model = _decoder(c, mixer, Dense(c.count("intermediate_size_mlp")))
    model = _with_chunks(c, model, _rotated_layers(c, len(model.layers)))
    experts = c.count("num_local_experts", most=MAX_EXPERTS)
    hidden = c.count("intermediate_size")
    moe = Moe(
        num_experts=experts,
        hidden=hidden,
        routing=replace(_routing(c, False, experts), scoring="sigmoid"),
        shared=hidden,
        on_input=True,
    )
    step = c.count("interleave_moe_layer_step")
    sparse: Collection[int] = range(step - 1, len(model.layers), step)
    if c.has("moe_layers"):
        sparse = c.numbers("moe_layers", "layer number", MAX_LAYERS)
    model = model.each(ffn=lambda i, layer: moe if i in sparse else layer.ffn)
    return replace(model, names="llama4")


# The text of models that have vision.
@family("Llama4ForConditionalGeneration", defaults=_LLAMA4, text_key="text_config")
def llama4_vision(c: Fields) -> Model:
    return replace(llama4(c), names="llama4_vision")


def _with_chunks(c: Fields, model: Model, rotated: list[bool]) -> Model:
    """Give Llama 4's layers chunks, RoPE and a norm, or none of these and a temperature."""
    full = "full_attention"
    chunked = "chunked_attention"
    size = c.optional_count("attention_chunk_size")
    kinds = c.choices("layer_types", len(rotated), (full, chunked))
    kinds = kinds or [chunked if turned and size else full for turned in rotated]
    if chunked in kinds:
        size = c.count("attention_chunk_size")
    temperature: QueryTemperature | None = None
    if c.truth("attn_temperature_tuning"):
        temperature = QueryTemperature(c.real("attn_scale"), c.count("floor_scale"), offset=1)
    qk_norm: QkNorm | None = "l2_after" if c.flag("use_qk_norm") else None

    def mixer(i: int, layer: Layer) -> Gqa:
        own = _gqa_of(layer)
        if kinds[i] == chunked:
            own = replace(own, window=size, chunked=True)
        if rotated[i]:
            return replace(own, qk_norm=qk_norm)
        return replace(own, rope=None, temperature=temperature)

    return model.each(mixer=mixer)


_MINIMAX_M2 = _LLAMA | {
    "vocab_size": 200064,
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "num_hidden_layers": 62,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 196608,
    "rope_theta": 5_000_000.0,
    "num_local_experts": 256,
    "num_experts_per_tok": 8,
    "eos_token_id": 200020,
}


@family("MiniMaxM2ForCausalLM", defaults=_MINIMAX_M2)
def minimax_m2(c: Fields) -> Model:
    c.require(use_qk_norm=True, qk_norm_type="per_layer", sliding_window=None)
    c.require(scoring_func="sigmoid", use_routing_bias=True, shared_intermediate_size=0)
    head_dim = _head_dim(c)
    if c.has("rotary_dim"):
        c = c.with_defaults(partial_rotary_factor=c.count("rotary_dim") / head_dim)
    mixer = replace(_gqa(c, read_rope(c, head_dim)), qk_norm="whole")
    hidden = c.count("intermediate_size")
    experts = _num_experts(c)
    routing = replace(_routing(c, True, experts), scoring="sigmoid", biased=True)
    moe = Moe(experts, hidden, routing)
    model = _decoder(c, mixer, Dense(hidden)).each(ffn=lambda *_: moe)
    c.require(attn_type_list=[1] * len(model.layers))  # 0 would be linear attention
    extra = c.count("num_mtp_modules", 0, MAX_LAYERS, least=0)
    return replace(model, names="minimax_m2", extra_layers=extra)


_CHATGLM = {
    "padded_vocab_size": 65024,
    "hidden_size": 4096,
    "ffn_hidden_size": 13696,
    "num_layers": 28,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "seq_length": 2048,
    "layernorm_epsilon": 1e-5,
    "multi_query_attention": False,
    "multi_query_group_num": 1,
    "rope_ratio": 1,
}


# ChatGLM2, ChatGLM3 and the first releases of GLM-4, whose checkpoints include their code.
@family("ChatGLMModel", "ChatGLMForConditionalGeneration", defaults=_CHATGLM)
def chatglm(c: Fields) -> Model:
    c.require(multi_query_attention=True, rmsnorm=True, post_layer_norm=True, original_rope=True)
    c.require(apply_residual_connection_post_layernorm=False, vision_config=None)
    c.require(pre_seq_len=None, prefix_projection=False, quantization_bit=0)
    bias = c.flag("add_bias_linear")
    head_dim = c.count("kv_channels")
    if head_dim % 4:
        raise ArchError(f"{c.name}: kv_channels is {head_dim}, but half of it must be even")
    mixer = Gqa(
        heads=c.count("num_attention_heads"),
        kv_heads=c.count("multi_query_group_num"),
        head_dim=head_dim,
        rope=Rope(head_dim // 2, 10_000.0 * c.real("rope_ratio"), interleaved=True),
        qkv_bias=bias or c.flag("add_qkv_bias"),
        out_bias=bias,
    )
    ffn = Dense(c.count("ffn_hidden_size"), bias, bias)
    return Model(
        dim=c.count("hidden_size"),
        vocab=c.count("padded_vocab_size"),
        layers=(Layer(mixer, ffn),) * c.count("num_layers", most=MAX_LAYERS),
        eps=c.real("layernorm_epsilon"),
        tie=c.flag("tie_word_embeddings"),
        max_len=c.count("seq_length"),
        eos_token_ids=c.numbers("eos_token_id"),
        names="chatglm",
    )


def read_arch(directory: str | Path) -> Model:
    """Read a checkpoint directory's config.json and the end-of-text ids of generation_config.json.

    Raises ArchError for an unreadable file, invalid JSON, or an unsupported architecture or value.
    """
    path = Path(directory)
    model = make_arch(read_object(path / "config.json", ArchError), str(path / "config.json"))
    generation = path / "generation_config.json"
    if os.path.lexists(generation):  # a broken link is an error, not absence
        eos = Fields(read_object(generation, ArchError), str(generation), {}).numbers(
            "eos_token_id"
        )
        model = replace(model, eos_token_ids=eos or model.eos_token_ids)
    return replace(model, eos_token_ids=tuple(i for i in model.eos_token_ids if i < model.vocab))


def make_arch(config: dict[str, Any], name: str = "config.json") -> Model:
    """The Model that a config.json object describes. `name`: the prefix of error messages."""
    architectures = config.get("architectures")
    known = [a for a in FAMILIES if isinstance(architectures, list) and a in architectures]
    if not known:
        raise ArchError(
            f"{name}: architectures is {shown(repr(architectures))}; "
            f"supported are {', '.join(FAMILIES)}"
        )
    found = FAMILIES[known[0]]
    fields = Fields(config, name, found.defaults)
    if found.text_key is not None:
        if not config.get(found.text_key):
            raise ArchError(f"{name}: {found.text_key} is missing, the text model's description")
        shared = {key: config[key] for key in _SHARED_KEYS if key in config}
        fields = Fields(config, name, {}).child(
            found.text_key, defaults=found.defaults, over=shared
        )
    fields.require(dual_chunk_attention_config=None)
    model = replace(found.read(fields), quantization=read_quantization(fields))
    ffn = model.layers[0].ffn
    act = ffn.act if isinstance(ffn, Dense) else "silu"
    names = tuple(name for name, function in _ACTIVATIONS.items() if function == act)
    fields.choice("hidden_act", names, names[0])
    mixers = dict.fromkeys(layer.mixer for layer in model.layers)
    if not model.keeps_states and not any(mixer.window for mixer in mixers):
        sparse = any(isinstance(mixer, Mla) and mixer.indexer is not None for mixer in mixers)
        kind = "indexed_attention" if sparse else "full_attention"
        fields.choices("layer_types", len(model.layers), (kind,))
    if model.max_len > MAX_LEN:
        raise ArchError(
            f"{name}: the model's length is {model.max_len} tokens with its RoPE scaling, but only "
            f"up to {MAX_LEN} is supported"
        )
    for mixer in mixers:
        if isinstance(mixer, Gqa) and mixer.heads % mixer.kv_heads:
            raise ArchError(
                f"{name}: {mixer.heads} attention heads cannot share {mixer.kv_heads} "
                "key/value heads evenly"
            )
    return model


_DEEPSEEK_V3 = _LLAMA | {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "max_position_embeddings": 4096,
    "eos_token_id": 1,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
}


# DeepSeek V3, R1 and V3.1, Moonlight and Kimi K2.
@family("DeepseekV3ForCausalLM", "KimiK2ForCausalLM", defaults=_DEEPSEEK_V3)
def deepseek_v3(c: Fields) -> Model:
    return _deepseek_experts(c, _decoder(c, _mla(c), Dense(c.count("intermediate_size"))))


# Kimi K2.5 and K2.6, text only. The first name is that of the published configs.
@family(
    "KimiK25ForConditionalGeneration",
    "Kimi_K25ForConditionalGeneration",
    defaults=_DEEPSEEK_V3,
    text_key="text_config",
)
def kimi_k25(c: Fields) -> Model:
    return replace(deepseek_v3(c), names="kimi_k25")


_DEEPSEEK_V2 = _DEEPSEEK_V3 | {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "eos_token_id": 2,
    "n_routed_experts": 64,
    "num_experts_per_tok": None,
    "moe_intermediate_size": 1407,
    "n_shared_experts": 2,
    "n_group": None,
    "topk_group": None,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 0,
    "num_mtp_layers": 0,
}


# DeepSeek V2 and V2-Lite.
@family("DeepseekV2ForCausalLM", defaults=_DEEPSEEK_V2)
def deepseek_v2(c: Fields) -> Model:
    c.require(mlp_bias=False, rope_interleave=True, scoring_func="softmax", norm_topk_prob=False)
    experts = c.count("n_routed_experts", most=MAX_EXPERTS)
    routing = replace(_routing(c, False, experts), scale=c.real("routed_scaling_factor"))
    if c.choice("topk_method", ("greedy", "group_limited_greedy")) != "greedy":
        routing = _with_groups(c, routing, experts)
    model = _decoder(c, _mla(c), Dense(c.count("intermediate_size")))
    return _with_deepseek_experts(c, model, routing, experts)


_GLM4_MOE_LITE = _DEEPSEEK_V3 | {
    "vocab_size": 154880,
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "num_hidden_layers": 47,
    "num_attention_heads": 20,
    "max_position_embeddings": 202752,
    "rms_norm_eps": 1e-5,
    "eos_token_id": None,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "n_routed_experts": 64,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1536,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.8,
    "first_k_dense_replace": 1,
}


@family("Glm4MoeLiteForCausalLM", defaults=_GLM4_MOE_LITE)
def glm4_moe_lite(c: Fields) -> Model:
    return deepseek_v3(c)


_DEEPSEEK_V32 = _DEEPSEEK_V3 | {
    "max_position_embeddings": 163840,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
    "indexer_rope_interleave": False,
}


@family("DeepseekV32ForCausalLM", defaults=_DEEPSEEK_V32)
def deepseek_v32(c: Fields) -> Model:
    return _with_indexer(c, deepseek_v3(c))


_GLM_MOE_DSA = _DEEPSEEK_V32 | {
    "vocab_size": 154880,
    "hidden_size": 6144,
    "intermediate_size": 12288,
    "num_hidden_layers": 78,
    "num_attention_heads": 64,
    "max_position_embeddings": 202752,
    "rms_norm_eps": 1e-5,
    "q_lora_rank": 2048,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "n_group": 1,
    "topk_group": 1,
    "index_n_heads": 32,
    "indexer_rope_interleave": True,
}


# GLM-5.
@family("GlmMoeDsaForCausalLM", defaults=_GLM_MOE_DSA)
def glm_moe_dsa(c: Fields) -> Model:
    return deepseek_v32(c)


def _gqa_of(layer: Layer) -> Gqa:
    assert isinstance(layer.mixer, Gqa)
    return layer.mixer


def _with_mixers(model: Model, **changes: Any) -> Model:
    """A copy in which every mixer has these values."""
    return model.each(mixer=lambda _, layer: replace(layer.mixer, **changes))


def _mla(c: Fields) -> Mla:
    heads = c.count("num_attention_heads")
    c.require(attention_bias=False, num_key_value_heads=heads)
    rope = replace(
        read_rope(c, c.count("qk_rope_head_dim")), interleaved=c.flag("rope_interleave", True)
    )
    if rope.scaling is not None and not isinstance(rope.scaling, YarnScaling):
        rope_object(c).require(mscale_all_dim=None)  # transformers would scale the scores
    nope_dim = c.count("qk_nope_head_dim")
    return Mla(
        heads=heads,
        q_rank=c.optional_count("q_lora_rank"),
        kv_rank=c.count("kv_lora_rank"),
        nope_dim=nope_dim,
        v_dim=c.count("v_head_dim"),
        rope=rope,
        scale=(nope_dim + rope.dim) ** -0.5 * _yarn_scale(rope) ** 2,
    )


def _with_indexer(c: Fields, model: Model) -> Model:
    """Give every layer the indexer of DeepSeek Sparse Attention.

    Layers that use the choice of an earlier layer, as in GLM-5.2, are not supported.
    """
    c.choices("indexer_types", len(model.layers), ("full",))
    c.require(index_topk_freq=1, index_topk_pattern=None)
    mixer = model.layers[0].mixer
    assert isinstance(mixer, Mla)
    if mixer.q_rank is None:
        raise ArchError(f"{c.name}: q_lora_rank is missing, but the indexer needs it")
    indexer = Indexer(
        heads=c.count("index_n_heads"),
        dim=c.count("index_head_dim"),
        rope=replace(mixer.rope, interleaved=c.flag("indexer_rope_interleave")),
        top_k=c.count("index_topk"),
    )
    if indexer.dim < indexer.rope.dim:
        raise ArchError(
            f"{c.name}: index_head_dim is {indexer.dim}, but only {indexer.rope.dim} or more is "
            "supported, the qk_rope_head_dim"
        )
    return _with_mixers(model, indexer=indexer)


def _yarn_scale(rope: Rope) -> float:
    """The factor on queries and keys with which DeepSeek keeps the entropy of long contexts."""
    scaling = rope.scaling
    if not isinstance(scaling, YarnScaling) or not scaling.mscale_all_dim or scaling.factor <= 1:
        return 1.0
    return 0.1 * scaling.mscale_all_dim * log(scaling.factor) + 1.0


def _head_dim(c: Fields) -> int:
    return c.count("head_dim", c.count("hidden_size") // c.count("num_attention_heads"))


def _gqa(c: Fields, rope: Rope | None = None) -> Gqa:
    """`rope`: None: as read_rope."""
    heads = c.count("num_attention_heads")
    head_dim = _head_dim(c)
    rope = rope or read_rope(c, head_dim)
    return Gqa(heads, c.count("num_key_value_heads", heads), head_dim, rope)


def _decoder(c: Fields, mixer: Gqa | Mla, ffn: Dense, eps: str = "rms_norm_eps") -> Model:
    """`eps`: the key of the norms' epsilon."""
    return Model(
        dim=c.count("hidden_size"),
        vocab=c.count("vocab_size"),
        layers=(Layer(mixer, ffn),) * c.count("num_hidden_layers", most=MAX_LAYERS),
        eps=c.real(eps),
        tie=c.flag("tie_word_embeddings"),
        max_len=_max_len(c.count("max_position_embeddings"), mixer.rope),
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


def _with_windows(c: Fields, model: Model) -> Model:
    """Add Qwen's sliding windows to the layers in `layer_types`, or from `max_window_layers` on."""
    full = "full_attention"
    sliding = "sliding_attention"
    num_layers = len(model.layers)
    if not c.flag("use_sliding_window"):
        return model
    first = c.count("max_window_layers")
    window = c.optional_count("sliding_window")
    kinds = c.choices("layer_types", num_layers, (full, sliding))
    kinds = kinds or [sliding if i >= first else full for i in range(num_layers)]
    return model.each(
        mixer=lambda i, layer: replace(
            _gqa_of(layer), window=window if kinds[i] == sliding else None
        )
    )


def _with_layer_types(
    c: Fields, model: Model, ropes: Mapping[str, Rope | None], full_every: int
) -> Model:
    """Give the layers the RoPE of their kind, and the sliding ones the window.

    Without `layer_types`, every `full_every`-th layer has full attention.
    """
    full = "full_attention"
    sliding = "sliding_attention"
    num_layers = len(model.layers)
    kinds = c.choices("layer_types", num_layers, (full, sliding))
    kinds = kinds or [sliding if (i + 1) % full_every else full for i in range(num_layers)]
    windows = {full: None, sliding: c.count("sliding_window") if sliding in kinds else None}
    return model.each(
        mixer=lambda i, layer: replace(
            _gqa_of(layer), rope=ropes[kinds[i]], window=windows[kinds[i]]
        )
    )


def _with_experts(c: Fields, model: Model, shared: int = 0) -> Model:
    """Add Qwen's experts to every `decoder_sparse_step`-th layer except `mlp_only_layers`."""
    c.require(use_sliding_window=False)
    step = c.count("decoder_sparse_step", 1)
    dense = c.numbers("mlp_only_layers", "layer number", MAX_LAYERS)
    experts = _num_experts(c)
    moe = Moe(
        num_experts=experts,
        hidden=c.count("moe_intermediate_size"),
        routing=_routing(c, c.flag("norm_topk_prob"), experts),
        shared=shared,
        shared_gate=shared > 0,
    )
    return model.each(
        ffn=lambda i, layer: layer.ffn if i in dense or (i + 1) % step else moe,
    )


def _deepseek_experts(c: Fields, model: Model) -> Model:
    """Add DeepSeek V3's experts."""
    c.require(scoring_func="sigmoid", topk_method="noaux_tc")
    experts = c.count("n_routed_experts", most=MAX_EXPERTS)
    routing = replace(
        _routing(c, c.flag("norm_topk_prob"), experts),
        scoring="sigmoid",
        biased=True,
        sum_eps=1e-20,
        scale=c.real("routed_scaling_factor"),
    )
    return _with_deepseek_experts(c, model, _with_groups(c, routing, experts), experts)


def _with_deepseek_experts(c: Fields, model: Model, routing: Routing, experts: int) -> Model:
    """Add experts to the layers that `mlp_layer_types` calls sparse, or else to all layers after
    the first `first_k_dense_replace`.

    The checkpoint's layers for multi-token prediction, after the model's own ones, are not used.
    """
    c.require(moe_layer_freq=1)
    hidden = c.count("moe_intermediate_size")
    moe = Moe(
        num_experts=experts,
        hidden=hidden,
        routing=routing,
        shared=hidden * c.count("n_shared_experts", 0, MAX_EXPERTS, least=0),
    )
    first = c.count("first_k_dense_replace", most=MAX_LAYERS, least=0)
    kinds = c.choices("mlp_layer_types", len(model.layers), ("dense", "sparse"))
    kinds = kinds or ["dense" if i < first else "sparse" for i in range(len(model.layers))]
    model = model.each(ffn=lambda i, layer: layer.ffn if kinds[i] == "dense" else moe)
    extra = c.count("num_mtp_layers", 1, MAX_LAYERS, least=0)  # transformers 5's name
    extra = c.count("num_nextn_predict_layers", extra, MAX_LAYERS, least=0)
    return replace(model, names="deepseek", extra_layers=extra)


def _with_groups(c: Fields, routing: Routing, experts: int) -> Routing:
    """Add DeepSeek's groups of experts."""
    groups = c.count("n_group", 1, most=experts)
    kept = c.count("topk_group", 1, most=groups)
    if groups == 1:
        return routing
    size = experts // groups
    if experts % groups or size < 2:
        raise ArchError(
            f"{c.name}: n_group is {groups}, but only a divisor of the {experts} experts that "
            "leaves two or more in a group is supported"
        )
    if kept * size < routing.top_k:
        raise ArchError(
            f"{c.name}: topk_group is {kept}, but {kept} groups of {size} experts have fewer than "
            f"num_experts_per_tok={routing.top_k}"
        )
    return replace(routing, groups=groups, kept_groups=kept)


def _num_experts(c: Fields) -> int:
    # Newer releases of transformers save Qwen3's num_experts as num_local_experts.
    num_experts = c.count("num_local_experts", most=MAX_EXPERTS)
    return c.count("num_experts", num_experts, most=MAX_EXPERTS)


def _routing(
    c: Fields, renorm: bool, num_experts: int, key: str = "num_experts_per_tok"
) -> Routing:
    """A softmax over `num_experts` experts; `key`: of the number of experts of a token."""
    top_k = c.count(key)
    if top_k > num_experts:
        raise ArchError(
            f"{c.name}: {key} is {top_k}, but only 1 to {num_experts} is supported, "
            "the number of experts"
        )
    return Routing(top_k, renorm)
