"""DeepSeek V2, V3, R1 and V3.2, Moonlight and Kimi K2: latent attention and many experts."""

from __future__ import annotations

from dataclasses import replace
from math import log

from gllm_engine.arch.checkpoint import Names
from gllm_engine.arch.families.common import (
    MAX_EXPERTS,
    MAX_LAYERS,
    read_decoder,
    read_routing,
)
from gllm_engine.arch.families.llama import LLAMA
from gllm_engine.arch.fields import ArchError, Fields
from gllm_engine.arch.model import EarlierIndexer, Indexer, Mla, Model, Moe
from gllm_engine.arch.rope import Rope, YarnScaling, read_rope, rope_object
from gllm_engine.routing import Routing

DEEPSEEK_V3 = LLAMA | {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "max_position_embeddings": 4096,
    "eos_token_id": 1,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
}
_NAMES = Names(renames=(("shared_expert.", "shared_experts."),))


def deepseek_v3(c: Fields) -> Model:
    """Also R1 and V3.1, Moonlight and Kimi K2."""
    return with_experts(c, read_decoder(c, _read_mla(c)))


DEEPSEEK_V2 = DEEPSEEK_V3 | {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "eos_token_id": 2,
    "n_routed_experts": 64,
    "num_experts_per_tok": None,
    "moe_intermediate_size": 1407,
    "n_shared_experts": 2,
    "n_group": None,
    "topk_group": None,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 0,
    "num_mtp_layers": 0,
}


def _count_experts(c: Fields) -> int:
    experts = c.count("n_routed_experts", most=MAX_EXPERTS)
    c.require(num_experts=experts)  # transformers' name of the same
    return experts


def deepseek_v2(c: Fields) -> Model:
    """Also V2-Lite."""
    c.require(mlp_bias=False, rope_interleave=True, scoring_func="softmax", norm_topk_prob=False)
    experts = _count_experts(c)
    routing = replace(read_routing(c, False, experts), scale=c.real("routed_scaling_factor"))
    grouped = _with_groups(c, routing, experts)  # a config may have groups and not use them
    if c.choice("topk_method", ("greedy", "group_limited_greedy")) != "greedy":
        routing = grouped
    return _with_routed_experts(c, read_decoder(c, _read_mla(c)), routing, experts)


# Of layers in index_topk_pattern.
_LETTERS = {"F": "full", "S": "shared"}

DEEPSEEK_V32 = DEEPSEEK_V3 | {
    "max_position_embeddings": 163840,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
    "indexer_rope_interleave": False,
}


def deepseek_v32(c: Fields) -> Model:
    """V3 with DeepSeek Sparse Attention: every layer has an indexer or, as in GLM-5.2, uses the
    choice of the last one that has.
    """
    mixer = _read_mla(c)
    indexer = _read_indexer(c, mixer)
    own = replace(mixer, indexer=indexer)
    model = read_decoder(c, own)
    earlier = replace(mixer, indexer=EarlierIndexer(indexer.top_k))
    shares = _read_sharing_layers(c, len(model.layers))
    model = model.each(mixer=lambda i, _: earlier if shares[i] else own)
    return with_experts(c, model)


def _read_sharing_layers(c: Fields, num_layers: int) -> list[bool]:
    """Whether each layer uses the choice of an earlier one.

    A config says so by up to three keys, of which all that it has must agree.
    """
    every = c.count("index_topk_freq", 1)
    first = c.count("index_skip_topk_offset", 2, least=0) - 1
    usually = ["shared" if max(i - first, 0) % every else "full" for i in range(num_layers)]
    found = {"index_topk_freq": usually}
    pattern = c.choices("index_topk_pattern", num_layers, ("F", "S", "full", "shared"))
    if pattern is not None:
        found["index_topk_pattern"] = [_LETTERS.get(kind, kind) for kind in pattern]
    types = c.choices("indexer_types", num_layers, ("full", "shared"))
    if types is not None:
        found["indexer_types"] = types
    if len(found) > 1 and not c.has("index_topk_freq"):
        del found["index_topk_freq"]
    *others, (key, kinds) = found.items()
    for other, its_kinds in others:
        if its_kinds != kinds:
            raise ArchError(
                f"{c.name}: {other} and {key} disagree about which layers have an indexer"
            )
    if kinds[0] != "full":
        raise ArchError(
            f"{c.name}: {key} gives the first layer no indexer, but there is none before"
        )
    return [kind == "shared" for kind in kinds]


def _read_mla(c: Fields) -> Mla:
    heads = c.count("num_attention_heads")
    c.require(attention_bias=False, num_key_value_heads=heads)
    rope = replace(
        read_rope(c, c.count("qk_rope_head_dim")), interleaved=c.flag("rope_interleave", True)
    )
    if rope.scaling is not None and not isinstance(rope.scaling, YarnScaling):
        rope_object(c).require(mscale_all_dim=None)  # transformers would scale the scores
    nope_dim = c.count("qk_nope_head_dim")
    return Mla(
        heads=heads,
        q_rank=c.optional_count("q_lora_rank"),
        kv_rank=c.count("kv_lora_rank"),
        nope_dim=nope_dim,
        v_dim=c.count("v_head_dim"),
        rope=rope,
        scale=(nope_dim + rope.dim) ** -0.5 * _yarn_scale(rope) ** 2,
    )


def _yarn_scale(rope: Rope) -> float:
    """The factor on queries and keys that keeps the entropy of long contexts."""
    scaling = rope.scaling
    if not isinstance(scaling, YarnScaling) or not scaling.mscale_all_dim or scaling.factor <= 1:
        return 1.0
    return 0.1 * scaling.mscale_all_dim * log(scaling.factor) + 1.0


def _read_indexer(c: Fields, mixer: Mla) -> Indexer:
    if mixer.q_rank is None:
        raise ArchError(f"{c.name}: q_lora_rank is missing, but the indexer needs it")
    indexer = Indexer(
        heads=c.count("index_n_heads"),
        dim=c.count("index_head_dim"),
        rope=replace(mixer.rope, interleaved=c.flag("indexer_rope_interleave")),
        top_k=c.count("index_topk"),
    )
    if indexer.dim < indexer.rope.dim:
        raise ArchError(
            f"{c.name}: index_head_dim is {indexer.dim}, but only {indexer.rope.dim} or more is "
            "supported, the qk_rope_head_dim"
        )
    return indexer


def with_experts(c: Fields, model: Model) -> Model:
    """Add V3's experts: scores are sigmoids, with a bias that only decides who is chosen."""
    c.require(scoring_func="sigmoid", topk_method="noaux_tc")
    experts = _count_experts(c)
    routing = replace(
        read_routing(c, c.flag("norm_topk_prob"), experts),
        scoring="sigmoid",
        biased=True,
        sum_eps=1e-20,
        scale=c.real("routed_scaling_factor"),
    )
    return _with_routed_experts(c, model, _with_groups(c, routing, experts), experts)


def _with_routed_experts(c: Fields, model: Model, routing: Routing, experts: int) -> Model:
    """Add experts to the layers that `mlp_layer_types` calls sparse, or else to all layers after
    the first `first_k_dense_replace`.

    The checkpoint's layers for multi-token prediction, after the model's own ones, are not used.
    """
    c.require(moe_layer_freq=1)
    hidden = c.count("moe_intermediate_size")
    moe = Moe(
        num_experts=experts,
        hidden=hidden,
        routing=routing,
        shared=hidden * c.count("n_shared_experts", 0, MAX_EXPERTS, least=0),
    )
    first = c.count("first_k_dense_replace", most=MAX_LAYERS, least=0)
    kinds = c.choices("mlp_layer_types", len(model.layers), ("dense", "sparse"))
    kinds = kinds or ["dense" if i < first else "sparse" for i in range(len(model.layers))]
    model = model.each(ffn=lambda i, layer: layer.ffn if kinds[i] == "dense" else moe)
    extra = c.count("num_mtp_layers", 1, MAX_LAYERS, least=0)  # transformers 5's name
    extra = c.count("num_nextn_predict_layers", extra, MAX_LAYERS, least=0)
    return replace(model, names=_NAMES, extra_layers=extra)


def _with_groups(c: Fields, routing: Routing, experts: int) -> Routing:
    """Add groups of experts, of which a token uses only some."""
    groups = c.count("n_group", 1, most=experts)
    kept = c.count("topk_group", 1, most=groups)
    if groups == 1:
        return routing
    size = experts // groups
    if experts % groups or size < 2:
        raise ArchError(
            f"{c.name}: n_group is {groups}, but only a divisor of the {experts} experts that "
            "leaves two or more in a group is supported"
        )
    if kept * size < routing.top_k:
        raise ArchError(
            f"{c.name}: topk_group is {kept}, but {kept} groups of {size} experts have fewer than "
            f"num_experts_per_tok={routing.top_k}"
        )
    return replace(routing, groups=groups, kept_groups=kept)
