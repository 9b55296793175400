"""Qwen2, Qwen2.5 and Qwen3, dense and with experts; qwen_hybrid.py has the later ones."""

from __future__ import annotations

from dataclasses import replace

from gllm_engine.arch.families.common import (
    MAX_LAYERS,
    read_decoder,
    read_gqa,
    read_layer_types,
    read_num_experts,
    read_routing,
    with_mixers,
    with_mixers_by_layer,
)
from gllm_engine.arch.families.llama import LLAMA, llama
from gllm_engine.arch.fields import Fields
from gllm_engine.arch.model import Model, Moe
from gllm_engine.arch.rope import Rope

QWEN2 = LLAMA | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "eos_token_id": None,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def qwen2(c: Fields, rope: Rope | None = None) -> Model:
    """`rope`: None: as read_rope."""
    return _with_windows(c, read_decoder(c, replace(read_gqa(c, rope), qkv_bias=True)))


QWEN3 = QWEN2 | {"head_dim": 128}


def qwen3(c: Fields, rope: Rope | None = None) -> Model:
    """As qwen2."""
    c.require(use_qk_norm=True)
    return _with_windows(c, with_mixers(llama(c, rope), qk_norm="head"))


QWEN2_MOE = QWEN2 | {
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


def qwen2_moe(c: Fields) -> Model:
    model = with_mixers(qwen2(c), qkv_bias=c.flag("qkv_bias", True))
    return with_experts(c, model, c.count("shared_expert_intermediate_size"))


QWEN3_MOE = QWEN2_MOE | {
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_local_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}


def qwen3_moe(c: Fields) -> Model:
    return with_experts(c, qwen3(c))


def with_experts(c: Fields, model: Model, shared: int = 0) -> Model:
    """Add experts to every `decoder_sparse_step`-th layer except `mlp_only_layers`.

    `shared`: hidden size of the shared expert; 0: none.
    """
    c.require(use_sliding_window=False)
    step = c.count("decoder_sparse_step", 1)
    dense = c.numbers("mlp_only_layers", "layer number", MAX_LAYERS)
    experts = read_num_experts(c)
    moe = Moe(
        num_experts=experts,
        hidden=c.count("moe_intermediate_size"),
        routing=read_routing(c, c.flag("norm_topk_prob"), experts),
        shared=shared,
        shared_gate=shared > 0,
    )
    return model.each(ffn=lambda i, layer: layer.ffn if i in dense or (i + 1) % step else moe)


def _with_windows(c: Fields, model: Model) -> Model:
    """Add sliding windows to the layers in `layer_types`, or from `max_window_layers` on."""
    if not c.flag("use_sliding_window"):
        return model
    first = c.count("max_window_layers")
    window = c.optional_count("sliding_window")
    usually = [i >= first for i in range(len(model.layers))]
    slides = read_layer_types(c, "sliding_attention", usually)
    return with_mixers_by_layer(model, window=[window if own else None for own in slides])
