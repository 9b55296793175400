"""Hunyuan, dense."""

from __future__ import annotations

from dataclasses import replace

from gllm_engine.arch.checkpoint import Names
from gllm_engine.arch.families.common import read_head_dim, with_mixers
from gllm_engine.arch.families.llama import LLAMA, llama
from gllm_engine.arch.fields import Fields
from gllm_engine.arch.model import Model
from gllm_engine.arch.rope import read_alpha_rope

HUNYUAN = LLAMA | {"vocab_size": 290943, "rms_norm_eps": 1e-5}
_NAMES = Names(renames=(("q_norm", "query_layernorm"), ("k_norm", "key_layernorm")))


def hunyuan(c: Fields) -> Model:
    head_dim = read_head_dim(c)
    c.require(use_qk_norm=True, use_cla=False, use_mla=False, attention_head_dim=head_dim)
    c.require(use_rotary_pos_emb=True, position_embedding_xdrope=False)
    c.require(num_experts=1, use_mixed_mlp_moe=False)
    c.choice("norm_type", ("rms", "hf_rms"), "rms")
    # Of layers that share keys and values, of experts, of images and of heads for other tasks.
    c.ignore("cla_share_factor", "moe_topk", "num_shared_expert", "norm_topk_prob")
    c.ignore("routed_scaling_factor", "num_media_embeds", "dense_list", "pool_type")
    c.ignore("org_vocab_size")
    model = llama(c, read_alpha_rope(c, head_dim))
    return replace(with_mixers(model, qk_norm="head_after"), names=_NAMES)
