"""SmolLM3: Llama with some layers that have no RoPE."""

from __future__ import annotations

from gllm_engine.arch.families.common import (
    read_head_dim,
    read_rotated_layers,
    with_mixers_by_layer,
)
from gllm_engine.arch.families.llama import LLAMA, llama
from gllm_engine.arch.fields import Fields
from gllm_engine.arch.model import Model
from gllm_engine.arch.rope import read_rope

SMOLLM3 = LLAMA | {
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


def smollm3(c: Fields) -> Model:
    c.require(use_sliding_window=False)
    rope = read_rope(c, read_head_dim(c))
    model = llama(c, rope)
    rotated = read_rotated_layers(c, len(model.layers))
    return with_mixers_by_layer(model, rope=[rope if own else None for own in rotated])
