"""Checkpoint tensor names: renamed and fused weights. No other module knows these formats.

This module knows names only; model/load.py reads the data.
"""

from __future__ import annotations

import re

from gllm_engine.arch.model import Model

# Replacements in a canonical name, applied in order. Weights that get the same name are stored as
# one tensor, stacked along dimension 0 in canonical order (q, k, v; gate, up).
_FUSED_MLP = (("mlp.gate_proj", "mlp.gate_up_proj"), ("mlp.up_proj", "mlp.gate_up_proj"))
_RENAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "hf": (),
    "glm": _FUSED_MLP,
    "phi3": (
        *_FUSED_MLP,
        ("self_attn.q_proj", "self_attn.qkv_proj"),
        ("self_attn.k_proj", "self_attn.qkv_proj"),
        ("self_attn.v_proj", "self_attn.qkv_proj"),
    ),
    "mixtral": (
        ("mlp.", "block_sparse_moe."),
        ("gate_proj", "w1"),
        ("up_proj", "w3"),
        ("down_proj", "w2"),
    ),
    "olmo": (
        ("post_self_attn_layernorm", "post_attention_layernorm"),
        ("post_mlp_layernorm", "post_feedforward_layernorm"),
    ),
    "gemma": (
        ("post_attention_layernorm", "pre_feedforward_layernorm"),
        ("post_self_attn_layernorm", "post_attention_layernorm"),
        ("post_mlp_layernorm", "post_feedforward_layernorm"),
    ),
    "hunyuan": (("q_norm", "query_layernorm"), ("k_norm", "key_layernorm")),
    "starcoder2": (("mlp.up_proj", "mlp.c_fc"), ("mlp.down_proj", "mlp.c_proj")),
    "gpt_bigcode": (
        ("model.embed_tokens", "transformer.wte"),
        ("model.embed_positions", "transformer.wpe"),
        ("model.layers.", "transformer.h."),
        ("model.norm", "transformer.ln_f"),
        ("input_layernorm", "ln_1"),
        ("post_attention_layernorm", "ln_2"),
        ("self_attn.q_proj", "attn.c_attn"),
        ("self_attn.k_proj", "attn.c_attn"),
        ("self_attn.v_proj", "attn.c_attn"),
        ("self_attn.o_proj", "attn.c_proj"),
        ("mlp.up_proj", "mlp.c_fc"),
        ("mlp.down_proj", "mlp.c_proj"),
    ),
    "chatglm": (
        ("model.embed_tokens", "transformer.embedding.word_embeddings"),
        ("model.layers.", "transformer.encoder.layers."),
        ("model.norm", "transformer.encoder.final_layernorm"),
        ("lm_head", "transformer.output_layer"),
        ("self_attn.q_proj", "self_attention.query_key_value"),
        ("self_attn.k_proj", "self_attention.query_key_value"),
        ("self_attn.v_proj", "self_attention.query_key_value"),
        ("self_attn.o_proj", "self_attention.dense"),
        ("mlp.gate_proj", "mlp.dense_h_to_4h"),
        ("mlp.up_proj", "mlp.dense_h_to_4h"),
        ("mlp.down_proj", "mlp.dense_4h_to_h"),
    ),
}

# RoPE tables in old checkpoints. They are ignored, because the config determines them.
_LEFT_OVERS = re.compile(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.(inv_freq|cos_cached|sin_cached)"
    r"|transformer\.rotary_pos_emb\.inv_freq"
)


def checkpoint_name(model: Model, canonical: str) -> str:
    """The name of the checkpoint tensor that holds a weight."""
    for old, new in _RENAMES[model.names]:
        canonical = canonical.replace(old, new)
    return canonical


def checkpoint_tensors(model: Model) -> dict[str, tuple[str, ...]]:
    """Checkpoint tensor name -> the canonical weights it holds, stacked along dimension 0."""
    tensors: dict[str, tuple[str, ...]] = {}
    for weight in model.weights():
        name = checkpoint_name(model, weight)
        tensors[name] = (*tensors.get(name, ()), weight)
    return tensors


def is_left_over(name: str) -> bool:
    """Whether a checkpoint tensor is ignored, because the config determines its values."""
    return _LEFT_OVERS.fullmatch(name) is not None
