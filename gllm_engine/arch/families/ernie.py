"""ERNIE 4.5, dense and with experts."""

from __future__ import annotations

from dataclasses import replace

from gllm_engine.arch.checkpoint import Layout, Names
from gllm_engine.arch.families.common import (
    MAX_EXPERTS,
    MAX_LAYERS,
    read_decoder,
    read_gqa,
    read_interleaved_rope,
    read_routing,
)
from gllm_engine.arch.families.llama import LLAMA
from gllm_engine.arch.fields import Fields
from gllm_engine.arch.model import Dense, Model, Moe

_ERNIE_4_5 = LLAMA | {
    "vocab_size": 103424,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": True,
}

ERNIE = _ERNIE_4_5 | {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
}


def ernie(c: Fields) -> Model:
    c.require(compression_ratio=1.0, use_rmsnorm=True)
    bias = c.flag("use_bias")
    ffn = Dense(c.count("intermediate_size"), bias, bias)
    return read_decoder(c, read_gqa(c, read_interleaved_rope(c), "use_bias"), ffn)


ERNIE_MOE = _ERNIE_4_5 | {
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 1536,
    "moe_k": 6,
    "moe_num_experts": 64,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
    "moe_norm_min": 1e-12,
}
_MOE_NAMES = Names(
    renames=(
        ("shared_expert.", "shared_experts."),
        ("mlp.gate.e_score_correction_bias", "mlp.moe_statics.e_score_correction_bias"),
    ),
    layouts=((r"e_score_correction_bias$", Layout(as_row=True)),),
    unused=r"mtp_\w+\.\d+\.",
)


def ernie_moe(c: Fields) -> Model:
    c.require(use_bias=False, moe_gate="topk", moe_gate_act="softmax", moe_group_experts=False)
    c.require(compression_ratio=1.0, scale_qk_coeff=1.0, moe_use_aux_free=True, use_rmsnorm=True)
    c.ignore("sinkhorn_2gate", "sinkhorn_temp", "freq_allocation")
    model = read_decoder(c, read_gqa(c, read_interleaved_rope(c)))
    experts = c.count("moe_num_experts", most=MAX_EXPERTS)
    hidden = c.count("moe_intermediate_size")
    routing = read_routing(c, True, experts, key="moe_k")
    c.require(num_experts_per_tok=routing.top_k)  # transformers' name of the same
    moe = Moe(
        num_experts=experts,
        hidden=hidden,
        routing=replace(routing, biased=True, least_sum=c.real("moe_norm_min")),
        shared=hidden * c.count("moe_num_shared_experts", 0, MAX_EXPERTS, least=0),
    )
    first = c.count("moe_layer_start_index", most=MAX_LAYERS, least=0)
    last = c.count("moe_layer_end_index", most=MAX_LAYERS, least=-1)
    last = len(model.layers) - 1 if last == -1 else last
    step = c.count("moe_layer_interval")
    model = model.each(
        ffn=lambda i, layer: moe if first <= i <= last and not (i + 1) % step else layer.ffn
    )
    return replace(model, names=_MOE_NAMES)
