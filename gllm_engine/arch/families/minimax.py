"""MiniMax M2."""

from __future__ import annotations

from dataclasses import replace

from gllm_engine.arch.checkpoint import Names
from gllm_engine.arch.families.common import (
    MAX_LAYERS,
    read_decoder,
    read_gqa,
    read_head_dim,
    read_num_experts,
    read_routing,
)
from gllm_engine.arch.families.llama import LLAMA
from gllm_engine.arch.families.mistral import MIXTRAL_NAMES
from gllm_engine.arch.fields import Fields
from gllm_engine.arch.model import Model, Moe
from gllm_engine.arch.rope import read_rope

MINIMAX_M2 = LLAMA | {
    "vocab_size": 200064,
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "num_hidden_layers": 62,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 196608,
    "rope_theta": 5_000_000.0,
    "num_local_experts": 256,
    "num_experts_per_tok": 8,
    "eos_token_id": 200020,
}
_NAMES = Names(
    renames=(
        ("mlp.gate.e_score_correction_bias", "mlp.e_score_correction_bias"),
        *MIXTRAL_NAMES.renames,
    )
)


def minimax_m2(c: Fields) -> Model:
    c.require(use_qk_norm=True, qk_norm_type="per_layer", sliding_window=None)
    c.require(scoring_func="sigmoid", use_routing_bias=True, shared_intermediate_size=0)
    c.require(layernorm_full_attention_beta=1.0, layernorm_mlp_beta=1.0)
    c.ignore("layernorm_linear_attention_beta", "mlp_intermediate_size", "shared_moe_mode")
    head_dim = read_head_dim(c)
    c = c.with_defaults(partial_rotary_factor=c.count("rotary_dim", head_dim) / head_dim)
    mixer = replace(read_gqa(c, read_rope(c, head_dim)), qk_norm="whole")
    experts = read_num_experts(c)
    routing = replace(read_routing(c, True, experts), scoring="sigmoid", biased=True)
    moe = Moe(experts, c.count("intermediate_size"), routing)
    model = read_decoder(c, mixer).each(ffn=lambda *_: moe)
    c.require(attn_type_list=[1] * len(model.layers))  # 0 would be linear attention
    extra = c.count("num_mtp_modules", 0, MAX_LAYERS, least=0)
    return replace(model, names=_NAMES, extra_layers=extra)
