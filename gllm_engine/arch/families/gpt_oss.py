"""gpt-oss: learned scores of one more key, and experts with biases and clamped activations."""

from __future__ import annotations

from dataclasses import replace

from gllm_engine.arch.checkpoint import Layout, Names
from gllm_engine.arch.families.common import (
    FUSED_EXPERTS,
    read_decoder,
    read_gqa,
    read_head_dim,
    read_num_experts,
    read_routing,
    with_layer_types,
)
from gllm_engine.arch.families.llama import LLAMA
from gllm_engine.arch.fields import Fields
from gllm_engine.arch.model import Model, Moe
from gllm_engine.arch.rope import read_rope, rope_object
from gllm_engine.routing import Clamp

GPT_OSS = LLAMA | {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150_000.0,
    "attention_bias": True,
    "sliding_window": 128,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "swiglu_limit": 7.0,
    "swiglu_alpha": 1.702,
    "eos_token_id": None,
}
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_NAMES = Names(
    renames=(
        *FUSED_EXPERTS,
        ("mlp.experts.*.gate_proj.bias", "mlp.experts.gate_up_proj_bias"),
        ("mlp.experts.*.up_proj.bias", "mlp.experts.gate_up_proj_bias"),
        ("mlp.experts.*.down_proj.bias", "mlp.experts.down_proj_bias"),
        ("mlp.gate.", "mlp.router."),
    ),
    layouts=(
        (r"mlp\.experts\.gate_up_proj$", Layout(transposed=True, interleaved=True)),
        # Those of MXFP4 are not transposed.
        (r"mlp\.experts\.gate_up_proj_(bias|blocks|scales)$", Layout(interleaved=True)),
        (r"mlp\.experts\.down_proj$", Layout(transposed=True)),
    ),
)


def gpt_oss(c: Fields) -> Model:
    if rope_object(c).empty:
        c = c.with_defaults(rope_parameters=_ROPE)
    rope = read_rope(c, read_head_dim(c))
    mixer = replace(read_gqa(c, rope, "attention_bias"), sinks=True)
    experts = read_num_experts(c)
    routing = read_routing(c, True, experts)
    c.require(experts_per_token=routing.top_k)  # an older name of the same
    moe = Moe(
        num_experts=experts,
        hidden=c.count("intermediate_size"),
        routing=routing,
        router_bias=True,
        bias=True,
        out_bias=True,
        clamp=Clamp(c.real("swiglu_limit"), c.real("swiglu_alpha")),
    )
    model = replace(read_decoder(c, mixer).each(ffn=lambda *_: moe), names=_NAMES)
    return with_layer_types(c, model, full_every=2, full=rope, sliding=rope)
