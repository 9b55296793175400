"""Makes a Model from a Hugging Face config.json: one short function per model family.

Related families derive from each other. Defaults for absent keys are those of transformers' config
classes. This module knows no weights and does not import transformers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from gllm_engine.arch.fields import ArchError, Fields
from gllm_engine.arch.model import Dense, Gqa, Layer, Model, Moe, SandwichLayer
from gllm_engine.arch.quantization import read_quantization
from gllm_engine.arch.rope import DynamicScaling, Rope, YarnScaling, read_rope
from gllm_engine.files import read_object, shown

Reader = Callable[[Fields], Model]

# Larger than any known model. A config without limits could describe a model too large to build.
MAX_LAYERS = 512
MAX_EXPERTS = 2048
MAX_LEN = 2**24  # tokens

FAMILIES: dict[str, tuple[Reader, dict[str, Any]]] = {}


def family(*architectures: str, defaults: dict[str, Any]) -> Callable[[Reader], Reader]:
    """Register a reader for architecture names, with defaults for keys that a config may omit."""

    def register(reader: Reader) -> Reader:
        FAMILIES.update(dict.fromkeys(architectures, (reader, defaults)))
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
    bias = c.flag("attention_bias")
    mixer = replace(_gqa(c), qkv_bias=bias, out_bias=bias)
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
    window = c.optional_count("sliding_window")
    c.require(layer_types=None)
    return llama(c).each(mixer=lambda _, layer: replace(layer.mixer, window=window))


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
    model = llama(c).each(mixer=lambda _, layer: replace(layer.mixer, qk_norm=True))
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
    moe = _moe(c, c.count("intermediate_size"), renorm=True)
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
    model = qwen2(c).each(mixer=lambda _, layer: replace(layer.mixer, qkv_bias=bias))
    return _with_experts(c, model, shared=c.count("shared_expert_intermediate_size"))


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
    mixer = _gqa(c)
    rope = replace(mixer.rope, interleaved=True)
    mixer = replace(mixer, rope=rope, qkv_bias=c.flag("attention_bias"))
    return replace(_decoder(c, mixer, Dense(c.count("intermediate_size"))), names="glm")


@family("Glm4ForCausalLM", defaults=_GLM)
def glm4(c: Fields) -> Model:
    model = glm(c)
    layers = tuple(SandwichLayer(layer.mixer, layer.ffn) for layer in model.layers)
    return replace(model, layers=layers)


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
    reader, defaults = FAMILIES[known[0]]
    fields = Fields(config, name, defaults)
    fields.require(hidden_act="silu", dual_chunk_attention_config=None)
    model = replace(reader(fields), quantization=read_quantization(fields))
    if not any(layer.mixer.window for layer in model.layers):
        fields.choices("layer_types", len(model.layers), ("full_attention",))
    if model.max_len > MAX_LEN:
        raise ArchError(
            f"{name}: the model's length is {model.max_len} tokens with its RoPE scaling, but only "
            f"up to {MAX_LEN} is supported"
        )
    mixer = model.layers[0].mixer
    if mixer.heads % mixer.kv_heads:
        raise ArchError(
            f"{name}: {mixer.heads} attention heads cannot share {mixer.kv_heads} "
            "key/value heads evenly"
        )
    return model


def _gqa(c: Fields) -> Gqa:
    heads = c.count("num_attention_heads")
    head_dim = c.count("head_dim", c.count("hidden_size") // heads)
    return Gqa(heads, c.count("num_key_value_heads", heads), head_dim, read_rope(c, head_dim))


def _decoder(c: Fields, mixer: Gqa, ffn: Dense) -> Model:
    return Model(
        dim=c.count("hidden_size"),
        vocab=c.count("vocab_size"),
        layers=(Layer(mixer, ffn),) * c.count("num_hidden_layers", most=MAX_LAYERS),
        eps=c.real("rms_norm_eps"),
        tie=c.flag("tie_word_embeddings"),
        max_len=_max_len(c.count("max_position_embeddings"), mixer.rope),
        eos_token_ids=c.numbers("eos_token_id"),
    )


def _max_len(positions: int, rope: Rope) -> int:
    """The model's length in tokens, with RoPE scaling.

    `positions` (max_position_embeddings) includes linear and llama3 scaling, but not always
    dynamic and YaRN scaling.
    """
    scaling = rope.scaling
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
        mixer=lambda i, layer: replace(layer.mixer, window=window if kinds[i] == sliding else None)
    )


def _with_experts(c: Fields, model: Model, shared: int = 0) -> Model:
    """Add Qwen's experts to every `decoder_sparse_step`-th layer except `mlp_only_layers`."""
    c.require(use_sliding_window=False)
    step = c.count("decoder_sparse_step", 1)
    dense = c.numbers("mlp_only_layers", "layer number", MAX_LAYERS)
    moe = _moe(c, c.count("moe_intermediate_size"), c.flag("norm_topk_prob"), shared)
    return model.each(
        ffn=lambda i, layer: layer.ffn if i in dense or (i + 1) % step else moe,
    )


def _moe(c: Fields, hidden: int, renorm: bool, shared: int = 0) -> Moe:
    # Newer releases of transformers save Qwen3's num_experts as num_local_experts.
    num_experts = c.count("num_local_experts", most=MAX_EXPERTS)
    num_experts = c.count("num_experts", num_experts, most=MAX_EXPERTS)
    top_k = c.count("num_experts_per_tok")
    if top_k > num_experts:
        raise ArchError(
            f"{c.name}: num_experts_per_tok is {top_k}, but only 1 to {num_experts} is supported, "
            "the number of experts"
        )
    return Moe(num_experts, top_k, hidden, renorm, shared)
