"""Qwen2.5-VL, Qwen3-VL and its relative with experts, and the vision towers of all Qwens."""

from __future__ import annotations

from dataclasses import replace
from math import isqrt
from typing import Any

from gllm_engine.arch.checkpoint import Layout, Names, Renames, Variant
from gllm_engine.arch.families.common import (
    BESIDE_TOWER,
    FUSED_EXPERTS,
    MAX_LAYERS,
    read_head_dim,
)
from gllm_engine.arch.families.qwen import QWEN2, QWEN3, QWEN3_MOE, qwen2, qwen3, with_experts
from gllm_engine.arch.families.towers import read_tower
from gllm_engine.arch.fields import ArchError, Fields
from gllm_engine.arch.model import Model
from gllm_engine.arch.rope import SECTION_KEYS, Rope, read_rope
from gllm_engine.arch.vision import CLIP_MEAN, CLIP_STD, Vision

_NAMES = Names(variants=(replace(BESIDE_TOWER, applies=True),), tower=r"visual\.")

QWEN2_5_VL = QWEN2 | {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "eos_token_id": 151645,
    "max_window_layers": 80,
}


def qwen2_5_vl(c: Fields) -> Model:
    return replace(qwen2(c, _read_rope(c)), names=_NAMES)


QWEN3_VL = QWEN3 | {"hidden_size": 4096, "max_position_embeddings": 128000, "rope_theta": 5e5}


def qwen3_vl(c: Fields) -> Model:
    return replace(qwen3(c, _read_rope(c)), names=_NAMES)


QWEN3_VL_MOE = QWEN3_MOE | {
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": None,
    "max_position_embeddings": 128000,
    "rope_theta": 5e5,
    "num_local_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "norm_topk_prob": True,
}


def qwen3_vl_moe(c: Fields) -> Model:
    c.require(norm_topk_prob=True)
    c = c.with_defaults(norm_topk_prob=True)
    # Experts in other formats may be stored one by one.
    plain = c.child("quantization_config").empty
    fused = Variant(r"\.mlp\.experts\.gate_up_proj", FUSED_EXPERTS, applies=plain)
    layouts = ((r"\.mlp\.experts\.(gate_up|down)_proj", Layout(transposed=True)),)
    names = replace(_NAMES, variants=(fused, *_NAMES.variants), layouts=layouts)
    return replace(with_experts(c, qwen3(c, _read_rope(c))), names=names)


def _read_rope(c: Fields) -> Rope:
    return read_rope(c, read_head_dim(c), SECTION_KEYS)


_TOWER: Renames = (
    ("patch_embed.", "patch_embed.proj."),
    ("attn.q_proj.", "attn.qkv."),
    ("attn.k_proj.", "attn.qkv."),
    ("attn.v_proj.", "attn.qkv."),
    ("attn.o_proj.", "attn.proj."),
)
_INSIDE = Variant(r"^model\.visual\.", (("visual.", "model.visual."),), applies=True)


def qwen2_5_vision(c: Fields, outer: Fields, text: Model) -> Vision:
    """`c`: the vision tower's object; `outer`: the config that has it."""
    merger = (
        ("merger.norm.", "merger.ln_q."),
        ("merger.up_proj.", "merger.mlp.0."),
        ("merger.down_proj.", "merger.mlp.2."),
    )
    c = c.with_defaults(
        depth=32,
        hidden_size=3584,
        hidden_act="silu",
        intermediate_size=3420,
        patch_size=14,
        fullatt_block_indexes=[7, 15, 23, 31],
    )
    tower = _read_tower(
        c,
        text,
        image_token=outer.count("image_token_id", 151655),
        mean=CLIP_MEAN,
        std=CLIP_STD,
        norm="rms",
        gated=True,
        patch_bias=False,
        whole=c.numbers("fullatt_block_indexes", "block number", MAX_LAYERS),
        names=Names((*_TOWER, *merger), (_INSIDE,)),
    )
    pixels = c.count("window_size", 112)
    return replace(tower, window=max(1, pixels // tower.merge // tower.patch))


def qwen3_vision(c: Fields, outer: Fields, text: Model, token: int = 151655) -> Vision:
    """As qwen2_5_vision. `token`: the placeholder's default id."""
    ffn = (("up_proj.", "linear_fc1."), ("down_proj.", "linear_fc2."))
    deep = (("deepstack.", "deepstack_merger_list."),)
    c = c.with_defaults(
        depth=27,
        hidden_size=1152,
        hidden_act="gelu_pytorch_tanh",
        intermediate_size=4304,
        patch_size=16,
    )
    positions = c.count("num_position_embeddings", 2304)
    side = isqrt(positions)
    if side**2 != positions:
        raise ArchError(
            f"{c.name}: num_position_embeddings is {positions}, but it must be a square"
        )
    return _read_tower(
        c,
        text,
        image_token=outer.count("image_token_id", token),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        norm="layer",
        gated=False,
        table=side,
        deep=c.numbers("deepstack_visual_indexes", "block number", MAX_LAYERS),
        names=Names((*_TOWER, *ffn, *deep), (_INSIDE,)),
    )


def qwen3_vl_vision(c: Fields, outer: Fields, text: Model) -> Vision:
    return qwen3_vision(c.with_defaults(deepstack_visual_indexes=[8, 16, 24]), outer, text)


def qwen3_5_vision(c: Fields, outer: Fields, text: Model) -> Vision:
    return qwen3_vision(c, outer, text, 248056)


def _read_tower(c: Fields, text: Model, **own: Any) -> Vision:
    """`own`: fields of the family."""
    ropes = {rope for layer in text.layers for rope in layer.mixer.ropes}
    if not all(rope.sections for rope in ropes):
        raise ArchError(f"{c.name}: mrope_section of the text model is missing")
    c.require(in_channels=3, in_chans=3, out_hidden_size=text.dim)
    c.ignore("tokens_per_second", "spatial_patch_size")  # of videos; the same as patch_size
    return read_tower(
        c.with_defaults(num_heads=16),
        text,
        "num_heads",
        depth=c.count("depth", most=MAX_LAYERS),
        merge=c.count("spatial_merge_size", 2, most=16),
        frames=c.count("temporal_patch_size", 2, most=16),
        **own,
    )
