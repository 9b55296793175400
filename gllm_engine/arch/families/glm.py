"""ChatGLM and GLM-4 to GLM-5, of which the later ones are relatives of DeepSeek V3."""

from __future__ import annotations

from dataclasses import replace

from gllm_engine.arch.checkpoint import Names
from gllm_engine.arch.families import deepseek
from gllm_engine.arch.families.common import (
    FUSED_MLP,
    read_decoder,
    read_gqa,
    read_interleaved_rope,
)
from gllm_engine.arch.families.llama import LLAMA
from gllm_engine.arch.fields import ArchError, Fields
from gllm_engine.arch.model import Dense, Gqa, Model, QkNorm
from gllm_engine.arch.rope import Rope

# ChatGLM2, ChatGLM3 and the first releases of GLM-4, whose checkpoints include their code.
CHATGLM = {
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
_CHATGLM_NAMES = Names(
    renames=(
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
)


def chatglm(c: Fields) -> Model:
    c.require(multi_query_attention=True, rmsnorm=True, post_layer_norm=True, original_rope=True)
    c.require(apply_residual_connection_post_layernorm=False, vision_config=None)
    c.require(pre_seq_len=None, prefix_projection=False, quantization_bit=0)
    # num_layers counts. Scaling by layers divides by a factor, and multiplies again.
    c.ignore("num_hidden_layers", "apply_query_key_layer_scaling")
    bias = c.flag("add_bias_linear")
    qkv_bias = c.flag("add_qkv_bias")
    head_dim = c.count("kv_channels")
    if head_dim % 4:
        raise ArchError(f"{c.name}: kv_channels is {head_dim}, but half of it must be even")
    mixer = Gqa(
        heads=c.count("num_attention_heads"),
        kv_heads=c.count("multi_query_group_num"),
        head_dim=head_dim,
        rope=Rope(head_dim // 2, 10_000.0 * c.real("rope_ratio"), interleaved=True),
        qkv_bias=bias or qkv_bias,
        out_bias=bias,
    )
    ffn = Dense(c.count("ffn_hidden_size"), bias, bias)
    model = read_decoder(
        c,
        mixer,
        ffn,
        "layernorm_epsilon",
        vocab_key="padded_vocab_size",
        layers_key="num_layers",
        len_key="seq_length",
    )
    return replace(model, names=_CHATGLM_NAMES)


GLM = LLAMA | {
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
_GLM_NAMES = Names(renames=FUSED_MLP)


def glm(c: Fields) -> Model:
    mixer = read_gqa(c, read_interleaved_rope(c))
    mixer = replace(mixer, qkv_bias=c.flag("attention_bias"))
    return replace(read_decoder(c, mixer), names=_GLM_NAMES)


def glm4(c: Fields) -> Model:
    return glm(c).each(place=lambda *_: "sandwich")


# GLM-4.5 and GLM-4.6.
GLM4_MOE = GLM | {
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


def glm4_moe(c: Fields) -> Model:
    qk_norm: QkNorm | None = "head" if c.flag("use_qk_norm") else None
    mixer = replace(read_gqa(c), qkv_bias=c.flag("attention_bias"), qk_norm=qk_norm)
    return deepseek.with_experts(c, read_decoder(c, mixer))


# GLM-4.7-Flash: a DeepSeek V3.
GLM4_MOE_LITE = deepseek.DEEPSEEK_V3 | {
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

# GLM-5: a DeepSeek V3.2.
GLM_MOE_DSA = deepseek.DEEPSEEK_V32 | {
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
