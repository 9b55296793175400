"""Gemma 2 and 3: norms before and after each half of a layer, whose gains are 1 + weight."""

from __future__ import annotations

from dataclasses import replace

from gllm_engine.arch.checkpoint import Names
from gllm_engine.arch.families.common import (
    beside_images,
    read_decoder,
    read_gqa,
    read_head_dim,
    with_layer_types,
    with_mixers,
)
from gllm_engine.arch.families.llama import LLAMA
from gllm_engine.arch.fields import Fields
from gllm_engine.arch.model import Dense, Model
from gllm_engine.arch.rope import Rope, read_layer_ropes, read_rope

GEMMA2 = LLAMA | {
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
_NAMES = Names(
    renames=(
        ("post_attention_layernorm", "pre_feedforward_layernorm"),
        ("post_self_attn_layernorm", "post_attention_layernorm"),
        ("post_mlp_layernorm", "post_feedforward_layernorm"),
    )
)


def gemma2(c: Fields) -> Model:
    rope = read_rope(c, read_head_dim(c))
    return with_layer_types(c, _gemma(c, rope), full_every=2, full=rope, sliding=rope)


GEMMA3 = GEMMA2 | {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "sliding_window_pattern": 6,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}


def gemma3(c: Fields) -> Model:
    c.require(use_bidirectional_attention=False, attn_logit_softcapping=None)
    full, sliding = read_layer_ropes(c, read_head_dim(c))
    model = with_mixers(_gemma(c, full), qk_norm="head")
    every = c.count("sliding_window_pattern")
    return with_layer_types(c, model, full_every=every, full=full, sliding=sliding)


def gemma3_beside_images(c: Fields) -> Model:
    """transformers does not cap these logits."""
    c.require(final_logit_softcapping=None)
    return beside_images(gemma3)(c)


def _gemma(c: Fields, rope: Rope) -> Model:
    c.require(hidden_activation="gelu_pytorch_tanh")
    mixer = replace(
        read_gqa(c, rope, "attention_bias"),
        scale=c.real("query_pre_attn_scalar") ** -0.5,
        softcap=c.optional_real("attn_logit_softcapping"),
    )
    model = read_decoder(c, mixer, Dense(c.count("intermediate_size"), act="gelu_tanh"))
    return replace(
        model.each(place=lambda *_: "sandwich"),
        norm="rms_plus_one",
        embed_scale=model.dim**0.5,
        logit_softcap=c.optional_real("final_logit_softcapping"),
        names=_NAMES,
    )
