"""Granite 3 and 4: Llama with factors of embeddings, scores, residuals and logits."""

from __future__ import annotations

from dataclasses import replace

from gllm_engine.arch.checkpoint import Names
from gllm_engine.arch.families.common import read_num_experts, read_routing, with_mixers
from gllm_engine.arch.families.llama import LLAMA, llama
from gllm_engine.arch.fields import ArchError, Fields
from gllm_engine.arch.model import Dense, Model, Moe

GRANITE = LLAMA | {
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "logits_scaling": 1.0,
}


def granite(c: Fields) -> Model:
    return replace(
        with_mixers(llama(c), scale=c.real("attention_multiplier")),
        embed_scale=c.real("embedding_multiplier"),
        residual_scale=c.real("residual_multiplier"),
        logit_scale=1 / c.real("logits_scaling"),
    )


GRANITE_MOE = GRANITE | {"num_local_experts": 8, "num_experts_per_tok": 2}
_MOE_NAMES = Names(
    renames=(
        ("mlp.experts.*.gate_proj", "mlp.input_linear"),
        ("mlp.experts.*.up_proj", "mlp.input_linear"),
        ("mlp.experts.*.down_proj", "mlp.output_linear"),
        ("mlp.gate.", "mlp.router.layer."),
        ("mlp.", "block_sparse_moe."),
    )
)


def granite_moe(c: Fields) -> Model:
    experts = read_num_experts(c)
    moe = Moe(experts, c.count("intermediate_size"), read_routing(c, True, experts))
    return replace(granite(c).each(ffn=lambda *_: moe), names=_MOE_NAMES)


GRANITE_HYBRID = GRANITE | {"shared_intermediate_size": 1024}
_HYBRID_NAMES = Names(
    renames=(
        ("mlp.gate_proj", "shared_mlp.input_linear"),
        ("mlp.up_proj", "shared_mlp.input_linear"),
        ("mlp.down_proj", "shared_mlp.output_linear"),
    )
)


def granite_hybrid(c: Fields) -> Model:
    """Granite 4, of which only models without Mamba layers and experts are supported."""
    c.require(num_local_experts=0, mlp_bias=False, normalization_function="rmsnorm")
    c.ignore("num_experts_per_tok", "time_step_limit")
    c.ignore(*(key for key in c.keys() if key.startswith("mamba_")))
    ffn = Dense(c.count("shared_intermediate_size"))
    model = granite(c).each(ffn=lambda *_: ffn)
    words = ("attention", "full_attention")
    if c.choices("layer_types", len(model.layers), words) is None:
        raise ArchError(f"{c.name}: layer_types is missing, so all layers would be Mamba layers")
    if c.choice("position_embedding_type", ("rope", "nope"), "nope") == "nope":
        model = with_mixers(model, rope=None)
    return replace(model, names=_HYBRID_NAMES)
