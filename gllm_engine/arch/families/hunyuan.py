"""Hunyuan, dense and with experts."""

from __future__ import annotations

from dataclasses import replace

from gllm_engine.arch.checkpoint import Names, Renames
from gllm_engine.arch.families.common import (
    MAX_EXPERTS,
    read_head_dim,
    read_routing,
    with_mixers,
)
from gllm_engine.arch.families.llama import LLAMA, llama
from gllm_engine.arch.fields import Fields
from gllm_engine.arch.model import Layer, Model, Moe
from gllm_engine.arch.rope import read_alpha_rope

HUNYUAN = LLAMA | {"vocab_size": 290943, "rms_norm_eps": 1e-5}
_RENAMES: Renames = (("q_norm", "query_layernorm"), ("k_norm", "key_layernorm"))


def hunyuan(c: Fields) -> Model:
    c.require(num_experts=1, use_mixed_mlp_moe=False)
    c.ignore("moe_topk", "num_shared_expert", "norm_topk_prob")
    return _without_experts(c)


def _without_experts(c: Fields) -> Model:
    head_dim = read_head_dim(c)
    c.require(use_qk_norm=True, use_cla=False, use_mla=False, attention_head_dim=head_dim)
    c.require(use_rotary_pos_emb=True, position_embedding_xdrope=False)
    c.choice("norm_type", ("rms", "hf_rms"), "rms")
    # Of layers that share keys and values, of images and of heads for other tasks. Weights that
    # are divided by their sum are not scaled.
    c.ignore("cla_share_factor", "num_media_embeds", "dense_list", "pool_type")
    c.ignore("routed_scaling_factor", "org_vocab_size")
    model = llama(c, read_alpha_rope(c, head_dim))
    return replace(with_mixers(model, qk_norm="head_after"), names=Names(renames=_RENAMES))


HUNYUAN_MOE = HUNYUAN | {"num_experts": 1, "moe_topk": 1}
_MOE_NAMES = Names(
    renames=(*_RENAMES, ("mlp.gate.", "mlp.gate.wg."), ("shared_expert.", "shared_mlp."))
)


def hunyuan_moe(c: Fields) -> Model:
    c.require(norm_topk_prob=True, group_limited_greedy=False, moe_drop_tokens=False)
    c.require(moe_layer_num_skipped=0, mlp_bias=False)
    model = _without_experts(c)
    count = len(model.layers)
    experts = c.counts("num_experts", count, most=MAX_EXPERTS)
    top_k = c.counts("moe_topk", count, most=MAX_EXPERTS)
    hidden = c.counts("moe_intermediate_size", count, c.count("intermediate_size"))
    shared = c.counts("num_shared_expert", count, 1, MAX_EXPERTS)
    has_shared = c.flag("use_mixed_mlp_moe", True)  # transformers' config has no such key

    def moe(i: int, _: Layer) -> Moe:
        routing = read_routing(c, True, experts[i], "moe_topk", top_k[i])
        return Moe(experts[i], hidden[i], routing, hidden[i] * shared[i] if has_shared else 0)

    return replace(model.each(ffn=moe), names=_MOE_NAMES)
