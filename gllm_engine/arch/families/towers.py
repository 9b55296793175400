"""The vision towers of LLaVA 1.5, Mistral Small 3 and Kimi K2.5, beside other modules' text."""

from __future__ import annotations

from typing import Any

from gllm_engine.arch.checkpoint import Names, Renames, Variant
from gllm_engine.arch.families.common import ACTIVATIONS, MAX_LAYERS, divided_head_dim
from gllm_engine.arch.fields import ArchError, Fields
from gllm_engine.arch.model import Model
from gllm_engine.arch.vision import CLIP_MEAN, CLIP_STD, Vision

_INSIDE = (
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
_PROJECTOR: Renames = (
    ("visual.merger.up_proj.", "multi_modal_projector.linear_1."),
    ("visual.merger.down_proj.", "multi_modal_projector.linear_2."),
    ("visual.merger.shrink.", "multi_modal_projector.patch_merger.merging_layer."),
    ("visual.merger.", "multi_modal_projector."),
)
_IN_TRANSFORMERS = Variant(r"^model\.vision_tower\.", _INSIDE)
_CLIP: Renames = (
    ("visual.blocks.", "vision_tower.vision_model.encoder.layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    ("attn.o_proj.", "attn.out_proj."),
    (".attn.", ".self_attn."),
    (".mlp.up_proj.", ".mlp.fc1."),
    (".mlp.down_proj.", ".mlp.fc2."),
    *_PROJECTOR,
    ("visual.first_norm.", "vision_tower.vision_model.pre_layrnorm."),
    ("visual.class_embed", "vision_tower.vision_model.embeddings.class_embedding"),
    ("visual.patch_embed.", "vision_tower.vision_model.embeddings.patch_embedding."),
    ("visual.pos_embed.", "vision_tower.vision_model.embeddings.position_embedding."),
)
_PIXTRAL: Renames = (
    ("visual.blocks.", "vision_tower.transformer.layers."),
    (".norm1.", ".attention_norm."),
    (".norm2.", ".ffn_norm."),
    (".attn.", ".attention."),
    (".mlp.", ".feed_forward."),
    *_PROJECTOR,
    ("visual.first_norm.", "vision_tower.ln_pre."),
    ("visual.patch_embed.", "vision_tower.patch_conv."),
)
_KIMI: Renames = (
    ("visual.blocks.", "vision_tower.encoder.blocks."),
    (".norm1.", ".norm0."),
    (".norm2.", ".norm1."),
    ("attn.q_proj.", "wqkv."),
    ("attn.k_proj.", "wqkv."),
    ("attn.v_proj.", "wqkv."),
    ("attn.o_proj.", "wo."),
    (".mlp.up_proj.", ".mlp.fc0."),
    (".mlp.down_proj.", ".mlp.fc1."),
    ("visual.merger.norm.", "mm_projector.pre_norm."),
    ("visual.merger.up_proj.", "mm_projector.proj.0."),
    ("visual.merger.down_proj.", "mm_projector.proj.2."),
    ("visual.last_norm.", "vision_tower.encoder.final_layernorm."),
    ("visual.patch_embed.", "vision_tower.patch_embed.proj."),
    ("visual.pos_embed.", "vision_tower.patch_embed.pos_emb."),
)


def clip(c: Fields, outer: Fields, text: Model) -> Vision:
    """See qwen_vl.qwen2_5_vision. The last blocks, which LLaVA does not run, are not loaded."""
    c = c.with_defaults(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=224,
        patch_size=32,
        hidden_act="quick_gelu",
    )
    c.choice("model_type", ("clip_vision_model",), "clip_vision_model")
    c.ignore("projection_dim")
    c.require(num_channels=3)
    outer.require(vision_feature_select_strategy="default", projector_hidden_act="gelu")
    layers = c.count("num_hidden_layers", most=MAX_LAYERS)
    chosen = outer.count("vision_feature_layer", -2, MAX_LAYERS, least=-MAX_LAYERS)
    depth = chosen if chosen >= 0 else layers + 1 + chosen
    if not 0 < depth <= layers:
        raise ArchError(
            f"{outer.name}: vision_feature_layer is {chosen}, but the tower has {layers} layers"
        )
    unused = "|".join(str(number) for number in range(depth, layers)) or "none"
    short = Variant(
        r"^(model\.)?vision_tower\.e", (("vision_tower.vision_model.", "vision_tower."),)
    )
    return read_tower(
        c,
        text,
        depth=depth,
        image_token=outer.count("image_token_index", outer.count("image_token_id", 32000)),
        mean=CLIP_MEAN,
        std=CLIP_STD,
        norm="layer",
        eps=c.real("layer_norm_eps", 1e-5),
        gated=False,
        patch_bias=False,
        rotary=None,
        table=c.count("image_size") // c.count("patch_size"),
        has_class=True,
        first_norm=True,
        merge=1,
        merger_norm=False,
        merger_hidden=text.dim,
        merger_bias=outer.flag("multimodal_projector_bias", True),
        names=Names(
            _CLIP,
            (short, _IN_TRANSFORMERS),
            unused=r"(model\.)?vision_tower\.(vision_model\.)?"
            rf"(post_layernorm|embeddings\.position_ids|encoder\.layers\.({unused})\.)",
        ),
    )


def llava(c: Fields, outer: Fields, text: Model) -> Vision:
    """As clip; Pixtral 12B has another tower."""
    if c.text("model_type", "") == "pixtral":
        return pixtral(c, outer, text, merges=False)
    return clip(c, outer, text)


def pixtral(c: Fields, outer: Fields, text: Model, merges: bool = True) -> Vision:
    """As clip."""
    c = c.with_defaults(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=16,
        hidden_act="gelu",
    )
    c.choice("model_type", ("pixtral",), "pixtral")
    c.ignore("image_size", "head_dim")
    c.require(rope_theta=10_000, num_channels=3)
    outer.require(vision_feature_layer=-1, projector_hidden_act="gelu")
    return read_tower(
        c,
        text,
        depth=c.count("num_hidden_layers", most=MAX_LAYERS),
        image_token=outer.count("image_token_index", outer.count("image_token_id", 10)),
        mean=CLIP_MEAN,
        std=CLIP_STD,
        norm="rms",
        eps=1e-5,
        gated=True,
        bias=False,
        patch_bias=False,
        rotary="shifted",
        first_norm=True,
        merge=outer.count("spatial_merge_size", 2, most=16) if merges else 1,
        merger_norm=merges,
        merger_eps=text.eps,
        merger_hidden=text.dim,
        merger_bias=outer.flag("multimodal_projector_bias", not merges),
        shrinks=merges,
        names=Names(_PIXTRAL, (_IN_TRANSFORMERS,)),
    )


def kimi(c: Fields, outer: Fields, text: Model) -> Vision:
    """As clip: MoonViT. Published files and transformers' have other keys."""

    def count(key: str, default: int, most: int = 2**24) -> int:
        return c.count(f"vt_{key}", c.count(key, default, most), most)

    c.require(text_hidden_size=text.dim, mm_projector_type="patchmerger", merge_type="sd2_tpool")
    c.require(pos_emb_type="divided_fixed", projector_hidden_act="gelu")
    c.ignore("init_pos_emb_time", "pos_emb_time", "video_attn_type")
    dim = count("hidden_size", 1152)
    side = c.count("init_pos_emb_height", c.count("pos_emb_height", 64))
    c.require(mm_hidden_size=dim, init_pos_emb_width=side, pos_emb_width=side)
    outer.require(projection_hidden_size=dim)
    merge, *_ = c.sizes("merge_kernel_size", 2) or (2,)
    c.require(merge_kernel_size=[merge, merge])
    c = c.with_defaults(
        patch_size=14,
        hidden_size=dim,
        intermediate_size=count("intermediate_size", 4304),
        num_attention_heads=count("num_attention_heads", 16),
        hidden_act="gelu_pytorch_tanh",
    )
    token = outer.count("image_token_id", 163605)
    return read_tower(
        c,
        text,
        depth=count("num_hidden_layers", 27, MAX_LAYERS),
        image_token=outer.count("media_placeholder_token_id", token),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        norm="layer",
        eps=1e-5,
        gated=False,
        rotary="alternating",
        table=side,
        stretch="bicubic",
        last_norm=True,
        merge=merge,
        merger_eps=c.real("projector_ln_eps", outer.real("projection_layer_norm_eps", 1e-5)),
        names=Names(_KIMI, unused=r"vision_tower\.patch_embed\.pos_emb\.time_weight"),
    )


def read_tower(
    c: Fields, text: Model, heads_key: str = "num_attention_heads", **own: Any
) -> Vision:
    """`heads_key`: of the number of heads. `own`: fields of the family."""
    c.ignore("vocab_size")  # transformers writes it for any part
    rope = c.child("rope_parameters")
    rope.choice("rope_type", ("axial", "default"), "axial")  # transformers 5.0 called it default
    rope.require(rope_theta=10_000)
    head_dim = divided_head_dim(c, "hidden_size", heads_key)
    if head_dim % 4:
        raise ArchError(
            f"{c.name}: heads have {head_dim} channels, but only multiples of 4 are supported"
        )
    return Vision(
        dim=c.count("hidden_size"),
        heads=c.count(heads_key),
        hidden=c.count("intermediate_size"),
        out=text.dim,
        patch=c.count("patch_size", most=256),
        act=ACTIVATIONS[c.choice("hidden_act", tuple(ACTIVATIONS))],
        **own,
    )
