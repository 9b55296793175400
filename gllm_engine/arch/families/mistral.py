"""Mistral, Mixtral and Ministral."""

from __future__ import annotations

from dataclasses import replace

from gllm_engine.arch.checkpoint import Names
from gllm_engine.arch.families.common import (
    read_head_dim,
    read_num_experts,
    read_routing,
    with_mixers,
    with_window,
)
from gllm_engine.arch.families.llama import LLAMA, llama
from gllm_engine.arch.fields import Fields
from gllm_engine.arch.model import Model, Moe, QueryTemperature
from gllm_engine.arch.rope import read_rope, rope_object

MISTRAL = LLAMA | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}


def mistral(c: Fields) -> Model:
    return with_window(c, llama(c))


MIXTRAL = MISTRAL | {
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "rope_theta": 1e6,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
MIXTRAL_NAMES = Names(
    renames=(
        ("mlp.", "block_sparse_moe."),
        ("gate_proj", "w1"),
        ("up_proj", "w3"),
        ("down_proj", "w2"),
    )
)


def mixtral(c: Fields) -> Model:
    experts = read_num_experts(c)
    moe = Moe(experts, c.count("intermediate_size"), read_routing(c, True, experts))
    return replace(mistral(c).each(ffn=lambda *_: moe), names=MIXTRAL_NAMES)


MINISTRAL3 = MISTRAL | {
    "vocab_size": 131072,
    "num_hidden_layers": 34,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
}
_MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def ministral3(c: Fields) -> Model:
    if rope_object(c).empty:
        c = c.with_defaults(rope_parameters=_MINISTRAL3_ROPE)
    keys = ("llama_4_scaling_beta", "max_position_embeddings")  # transformers ignores the second
    rope = read_rope(c, read_head_dim(c), keys)
    model = with_window(c, llama(c, rope))
    beta = rope_object(c).real_or_zero("llama_4_scaling_beta")
    if beta is None:
        return model
    length = rope_object(c).count("original_max_position_embeddings")
    return with_mixers(model, temperature=QueryTemperature(beta, length))
