"""Command R7B and Command A: attention and the feed-forward part read the same norm."""

from __future__ import annotations

from dataclasses import replace

from gllm_engine.arch.families.common import (
    read_decoder,
    read_gqa,
    read_interleaved_rope,
    with_layer_types,
)
from gllm_engine.arch.families.llama import LLAMA
from gllm_engine.arch.fields import Fields
from gllm_engine.arch.model import Model

COHERE2 = LLAMA | {
    "vocab_size": 256000,
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
    "logit_scale": 0.0625,
    "tie_word_embeddings": True,
    "eos_token_id": 255001,
}


def cohere2(c: Fields) -> Model:
    c.require(use_parallel_block=True, use_gated_activation=True, use_qk_norm=False)
    c.require(position_embedding_type="rope_gptj", rotary_pct=1.0)
    rope = read_interleaved_rope(c)
    model = read_decoder(c, read_gqa(c, rope, "attention_bias"), eps_key="layer_norm_eps")
    model = replace(
        model.each(place=lambda *_: "parallel_shared"),
        norm="layer_without_bias",
        logit_scale=c.real("logit_scale"),
    )
    every = c.count("sliding_window_pattern")
    c.require(order_of_interleaved_layers="local_attn_first", layer_switch=every)
    c.ignore("use_embedding_sharing")
    return with_layer_types(c, model, full_every=every, full=None, sliding=rope)
