"""Llama 2 and 3, and models that say they are Llama."""

from __future__ import annotations

from gllm_engine.arch.families.common import read_decoder, read_gqa
from gllm_engine.arch.fields import Fields
from gllm_engine.arch.model import Dense, Model
from gllm_engine.arch.rope import Rope

LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 2,
}


def llama(c: Fields, rope: Rope | None = None) -> Model:
    """`rope`: None: as read_rope."""
    bias = c.flag("mlp_bias")
    ffn = Dense(c.count("intermediate_size"), bias, bias)
    return read_decoder(c, read_gqa(c, rope, "attention_bias"), ffn)
