"""Qwen3-Next, Qwen3.5 and Qwen3.6: the gated delta rule in most layers.

The norms' gains are 1 + weight, except those inside of the gated delta rule.
"""

from __future__ import annotations

from dataclasses import replace

from gllm_engine.arch.checkpoint import Layout, Names, Renames, Variant
from gllm_engine.arch.families.common import (
    BESIDE_TOWER,
    FUSED_EXPERTS,
    MAX_LAYERS,
    read_decoder,
    read_gqa,
    read_head_dim,
    read_layer_types,
)
from gllm_engine.arch.families.qwen import QWEN3_MOE, with_experts
from gllm_engine.arch.fields import ArchError, Fields
from gllm_engine.arch.model import GatedDelta, Model
from gllm_engine.arch.rope import SECTION_KEYS, Rope, read_rope

_FUSED: Renames = (
    ("self_attn.gate_proj", "self_attn.q_proj"),
    ("linear_attn.conv_q.", "linear_attn.conv1d."),
    ("linear_attn.conv_k.", "linear_attn.conv1d."),
    ("linear_attn.conv_v.", "linear_attn.conv1d."),
)
_WITH_FUSED_EXPERTS = Variant(r"\.mlp\.experts\.gate_up_proj", FUSED_EXPERTS)
_BY_HEAD = Layout(by_head=True)

QWEN3_NEXT = QWEN3_MOE | {
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "intermediate_size": 5632,
    "partial_rotary_factor": 0.25,
    "num_local_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "norm_topk_prob": True,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
_QWEN3_NEXT_NAMES = Names(
    renames=(
        *_FUSED,
        ("linear_attn.in_proj_q.", "linear_attn.in_proj_qkvz."),
        ("linear_attn.in_proj_k.", "linear_attn.in_proj_qkvz."),
        ("linear_attn.in_proj_v.", "linear_attn.in_proj_qkvz."),
        ("linear_attn.in_proj_z.", "linear_attn.in_proj_qkvz."),
        ("linear_attn.in_proj_b.", "linear_attn.in_proj_ba."),
        ("linear_attn.in_proj_a.", "linear_attn.in_proj_ba."),
    ),
    variants=(_WITH_FUSED_EXPERTS,),
    layouts=((r"self_attn\.q_proj\.|linear_attn\.in_proj_(qkvz|ba)\.", _BY_HEAD),),
    unused=r"mtp\.",
)


def qwen3_next(c: Fields) -> Model:
    model = _hybrid(c, read_rope(c, read_head_dim(c)))
    model = with_experts(c, model, c.count("shared_expert_intermediate_size"))
    return replace(model, names=_QWEN3_NEXT_NAMES)


QWEN3_5 = QWEN3_NEXT | {
    "vocab_size": 248320,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_key_value_heads": 4,
}
_QWEN3_5_NAMES = Names(
    renames=(
        *_FUSED,
        ("linear_attn.in_proj_q.", "linear_attn.in_proj_qkv."),
        ("linear_attn.in_proj_k.", "linear_attn.in_proj_qkv."),
        ("linear_attn.in_proj_v.", "linear_attn.in_proj_qkv."),
    ),
    variants=(BESIDE_TOWER,),
    layouts=((r"self_attn\.q_proj\.", _BY_HEAD),),
    unused=r"mtp\.",
    tower=r"visual\.",
)


def qwen3_5(c: Fields) -> Model:
    rope = read_rope(c, read_head_dim(c), SECTION_KEYS)
    return replace(_hybrid(c, rope), names=_QWEN3_5_NAMES)


QWEN3_5_MOE = QWEN3_5 | {
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "num_local_experts": 256,
    "num_experts_per_tok": 8,
}


def qwen3_5_moe(c: Fields) -> Model:
    c.require(norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[])
    c = c.with_defaults(norm_topk_prob=True)
    model = with_experts(c, qwen3_5(c), c.count("shared_expert_intermediate_size"))
    # Experts in other formats are stored one by one.
    fused = replace(_WITH_FUSED_EXPERTS, applies=c.child("quantization_config").empty)
    return replace(model, names=replace(_QWEN3_5_NAMES, variants=(fused, BESIDE_TOWER)))


def _hybrid(c: Fields, rope: Rope) -> Model:
    """Layers with the gated delta rule, and softmax attention in every n-th layer."""
    c.require(attn_output_gate=True, mamba_ssm_dtype="float32", use_sliding_window=False)
    c.choice("output_gate_type", ("swish", "silu"), "swish")
    mixer = replace(read_gqa(c, rope, "attention_bias"), qk_norm="head", output_gate=True)
    model = read_decoder(c, mixer)
    delta = _read_delta(c)
    every = c.count("full_attention_interval", most=MAX_LAYERS)
    usually = [(i + 1) % every > 0 for i in range(len(model.layers))]
    linear = read_layer_types(c, "linear_attention", usually)
    model = model.each(mixer=lambda i, layer: delta if linear[i] else layer.mixer)
    return replace(model, norm="rms_plus_one")


def _read_delta(c: Fields) -> GatedDelta:
    k_heads = c.count("linear_num_key_heads")
    v_heads = c.count("linear_num_value_heads")
    if v_heads % k_heads:
        raise ArchError(
            f"{c.name}: linear_num_value_heads is {v_heads}, but it must be a multiple of "
            f"linear_num_key_heads={k_heads}"
        )
    return GatedDelta(
        k_heads=k_heads,
        v_heads=v_heads,
        k_dim=c.count("linear_key_head_dim", most=256),
        v_dim=c.count("linear_value_head_dim"),
        conv=c.count("linear_conv_kernel_dim", most=4, least=2),
    )
