"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini."""

from __future__ import annotations

from dataclasses import replace

from gllm_engine.arch.checkpoint import Names
from gllm_engine.arch.families.common import FUSED_MLP
from gllm_engine.arch.families.llama import LLAMA
from gllm_engine.arch.families.mistral import mistral
from gllm_engine.arch.fields import Fields
from gllm_engine.arch.model import Model

PHI3 = LLAMA | {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 1.0,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 32000,
}
_NAMES = Names(
    renames=(
        *FUSED_MLP,
        ("self_attn.q_proj", "self_attn.qkv_proj"),
        ("self_attn.k_proj", "self_attn.qkv_proj"),
        ("self_attn.v_proj", "self_attn.qkv_proj"),
    )
)


def phi3(c: Fields) -> Model:
    c.require(attention_bias=False, mlp_bias=False, lm_head_bias=False)
    c.require(full_attn_mod=1, interpolate_factor=1)
    return replace(mistral(c), names=_NAMES)
