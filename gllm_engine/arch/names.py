"""Checkpoint tensor names: renamed and fused weights. No other module knows these formats.

This module knows names only; model/load.py reads the data.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace

from gllm_engine.arch.model import GatedDelta, Gqa, Model

# Replacements in a canonical name, applied in order; * is the number of an expert. Weights that get
# the same name are stored as one tensor, stacked along dimension 0 in canonical order (q, k, v;
# gate, up). Weights of all experts of a layer are so stacked too: [experts, rows, columns].
_FUSED_MLP = (("mlp.gate_proj", "mlp.gate_up_proj"), ("mlp.up_proj", "mlp.gate_up_proj"))
_GATED_DELTA = (
    ("self_attn.gate_proj", "self_attn.q_proj"),
    ("linear_attn.conv_q.", "linear_attn.conv1d."),
    ("linear_attn.conv_k.", "linear_attn.conv1d."),
    ("linear_attn.conv_v.", "linear_attn.conv1d."),
)
_MIXTRAL = (
    ("mlp.", "block_sparse_moe."),
    ("gate_proj", "w1"),
    ("up_proj", "w3"),
    ("down_proj", "w2"),
)
_LLAMA4 = (
    ("mlp.experts.*.gate_proj.weight", "mlp.experts.gate_up_proj"),
    ("mlp.experts.*.up_proj.weight", "mlp.experts.gate_up_proj"),
    ("mlp.experts.*.down_proj.weight", "mlp.experts.down_proj"),
    ("mlp.gate.", "mlp.router."),
    ("mlp.", "feed_forward."),
)
_DEEPSEEK = (("shared_expert.", "shared_experts."),)
_GPT2 = (
    ("model.embed_tokens", "transformer.wte"),
    ("model.embed_positions", "transformer.wpe"),
    ("model.layers.", "transformer.h."),
    ("model.norm", "transformer.ln_f"),
    ("input_layernorm", "ln_1"),
    ("post_attention_layernorm", "ln_2"),
    ("self_attn.q_proj", "attn.c_attn"),
    ("self_attn.k_proj", "attn.c_attn"),
    ("self_attn.v_proj", "attn.c_attn"),
    ("self_attn.o_proj", "attn.c_proj"),
    ("mlp.up_proj", "mlp.c_fc"),
    ("mlp.down_proj", "mlp.c_proj"),
)
_RENAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "hf": (),
    "qwen3_next": (
        *_GATED_DELTA,
        ("linear_attn.in_proj_q.", "linear_attn.in_proj_qkvz."),
        ("linear_attn.in_proj_k.", "linear_attn.in_proj_qkvz."),
        ("linear_attn.in_proj_v.", "linear_attn.in_proj_qkvz."),
        ("linear_attn.in_proj_z.", "linear_attn.in_proj_qkvz."),
        ("linear_attn.in_proj_b.", "linear_attn.in_proj_ba."),
        ("linear_attn.in_proj_a.", "linear_attn.in_proj_ba."),
    ),
    "qwen3_5": (
        *_GATED_DELTA,
        ("linear_attn.in_proj_q.", "linear_attn.in_proj_qkv."),
        ("linear_attn.in_proj_k.", "linear_attn.in_proj_qkv."),
        ("linear_attn.in_proj_v.", "linear_attn.in_proj_qkv."),
    ),
    "glm": _FUSED_MLP,
    "phi3": (
        *_FUSED_MLP,
        ("self_attn.q_proj", "self_attn.qkv_proj"),
        ("self_attn.k_proj", "self_attn.qkv_proj"),
        ("self_attn.v_proj", "self_attn.qkv_proj"),
    ),
    "mixtral": _MIXTRAL,
    "minimax_m2": (
        ("mlp.gate.e_score_correction_bias", "mlp.e_score_correction_bias"),
        *_MIXTRAL,
    ),
    "llama4": _LLAMA4,
    "llama4_vision": (
        *_LLAMA4,
        ("model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ),
    "granitemoe": (
        ("mlp.experts.*.gate_proj", "block_sparse_moe.input_linear"),
        ("mlp.experts.*.up_proj", "block_sparse_moe.input_linear"),
        ("mlp.experts.*.down_proj", "block_sparse_moe.output_linear"),
        ("mlp.gate.", "block_sparse_moe.router.layer."),
    ),
    "deepseek": _DEEPSEEK,
    "kimi_k25": (
        *_DEEPSEEK,
        ("model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ),
    "ernie": (
        ("shared_expert.", "shared_experts."),
        ("mlp.gate.e_score_correction_bias", "mlp.moe_statics.e_score_correction_bias"),
    ),
    "gpt_oss": (
        ("mlp.experts.*.gate_proj.weight", "mlp.experts.gate_up_proj"),
        ("mlp.experts.*.up_proj.weight", "mlp.experts.gate_up_proj"),
        ("mlp.experts.*.down_proj.weight", "mlp.experts.down_proj"),
        ("mlp.experts.*.gate_proj.bias", "mlp.experts.gate_up_proj_bias"),
        ("mlp.experts.*.up_proj.bias", "mlp.experts.gate_up_proj_bias"),
        ("mlp.experts.*.down_proj.bias", "mlp.experts.down_proj_bias"),
        ("mlp.gate.", "mlp.router."),
    ),
    "olmo": (
        ("post_self_attn_layernorm", "post_attention_layernorm"),
        ("post_mlp_layernorm", "post_feedforward_layernorm"),
    ),
    "gemma": (
        ("post_attention_layernorm", "pre_feedforward_layernorm"),
        ("post_self_attn_layernorm", "post_attention_layernorm"),
        ("post_mlp_layernorm", "post_feedforward_layernorm"),
    ),
    "hunyuan": (("q_norm", "query_layernorm"), ("k_norm", "key_layernorm")),
    "starcoder2": (("mlp.up_proj", "mlp.c_fc"), ("mlp.down_proj", "mlp.c_proj")),
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neox": (
        ("model.embed_tokens", "gpt_neox.embed_in"),
        ("model.layers.", "gpt_neox.layers."),
        ("model.norm", "gpt_neox.final_layer_norm"),
        ("lm_head", "embed_out"),
        ("self_attn.q_proj", "attention.query_key_value"),
        ("self_attn.k_proj", "attention.query_key_value"),
        ("self_attn.v_proj", "attention.query_key_value"),
        ("self_attn.o_proj", "attention.dense"),
        ("mlp.up_proj", "mlp.dense_h_to_4h"),
        ("mlp.down_proj", "mlp.dense_4h_to_h"),
    ),
    "chatglm": (
        ("model.embed_tokens", "transformer.embedding.word_embeddings"),
        ("model.layers.", "transformer.encoder.layers."),
        ("model.norm", "transformer.encoder.final_layernorm"),
        ("lm_head", "transformer.output_layer"),
        ("self_attn.q_proj", "self_attention.query_key_value"),
        ("self_attn.k_proj", "self_attention.query_key_value"),
        ("self_attn.v_proj", "self_attention.query_key_value"),
        ("self_attn.o_proj", "self_attention.dense"),
        ("mlp.gate_proj", "mlp.dense_h_to_4h"),
        ("mlp.up_proj", "mlp.dense_h_to_4h"),
        ("mlp.down_proj", "mlp.dense_4h_to_h"),
    ),
}

# Further replacements. A checkpoint has them or not, whatever its config says.
_VARIANTS: dict[str, tuple[tuple[str, str], ...]] = {
    "fused_experts": (
        ("mlp.experts.*.gate_proj.weight", "mlp.experts.gate_up_proj"),
        ("mlp.experts.*.up_proj.weight", "mlp.experts.gate_up_proj"),
        ("mlp.experts.*.down_proj.weight", "mlp.experts.down_proj"),
    ),
}
_VARIANTS_OF = {"qwen3_next": ("fused_experts",), "qwen3_5": ("fused_experts",)}
# Some checkpoints have other beginnings of names: (what they have, what is standard).
_BEGINNINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "qwen3_5": (("model.language_model.", "model."),),  # beside weights for images
    "kimi_k25": (  # as transformers names them
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ),
    "gpt2": tuple((f"{part}.", f"transformer.{part}.") for part in ("wte", "wpe", "h", "ln_f")),
}


@dataclass(frozen=True)
class Layout:
    """How a checkpoint tensor holds the weights that are stacked in it, for each expert alone.

    `transposed`: the stack is stored as [columns, rows]. `interleaved`: the weights take turns row
    by row: gate 0, up 0, gate 1, up 1. `by_head`: they take turns head by head: the rows of the
    first head of every weight, then those of the second head. The heads of a GatedDelta are its
    key heads, each with all its value heads.
    """

    transposed: bool = False
    interleaved: bool = False
    by_head: bool = False


_TRANSPOSED = Layout(transposed=True)
_GPTQ = (".qweight", ".qzeros", ".scales")  # of GPTQ and AWQ; transposed in all checkpoints
_LLAMA4_EXPERTS = {r"feed_forward\.experts\.(gate_up|down)_proj$": _TRANSPOSED}
# Pattern in a tensor's name -> its layout; all others are plain stacks.
_LAYOUTS: dict[str, dict[str, Layout]] = {
    "gpt2": {r"\.(attn|mlp)\.c_\w+\.weight$": _TRANSPOSED},
    "gpt_neox": {r"attention\.query_key_value\.": Layout(by_head=True)},
    "gpt_oss": {
        r"mlp\.experts\.gate_up_proj$": Layout(transposed=True, interleaved=True),
        # Those of MXFP4 are not transposed.
        r"mlp\.experts\.gate_up_proj_(bias|blocks|scales)$": Layout(interleaved=True),
        r"mlp\.experts\.down_proj$": _TRANSPOSED,
    },
    "llama4": _LLAMA4_EXPERTS,
    "llama4_vision": _LLAMA4_EXPERTS,
    "qwen3_next": {r"self_attn\.q_proj\.|linear_attn\.in_proj_(qkvz|ba)\.": Layout(by_head=True)},
    "qwen3_5": {r"self_attn\.q_proj\.": Layout(by_head=True)},
}

# RoPE tables in old checkpoints. They are ignored, because the config determines them.
_ROPE_TABLES = re.compile(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.(inv_freq|cos_cached|sin_cached)"
    r"|transformer\.rotary_pos_emb\.inv_freq"
    r"|gpt_neox\.layers\.\d+\.attention\.rotary_emb\.inv_freq"
)
# Tensors that no text model needs: the causal mask of old checkpoints, weights for images,
# modules for multi-token prediction that are not layers.
_MASK = r"\.(attn|attention)\.(bias|masked_bias)$"
_UNUSED = {
    "ernie": re.compile(r"model\.mtp_\w+\.\d+\."),
    "gpt2": re.compile(rf"transformer\.h\.\d+{_MASK}"),
    "gpt_bigcode": re.compile(rf"transformer\.h\.\d+{_MASK}"),
    "gpt_neox": re.compile(rf"gpt_neox\.layers\.\d+{_MASK}"),
    "kimi_k25": re.compile(r"(model\.)?(vision_tower|mm_projector)\."),
    "llama4_vision": re.compile(r"(vision_model|multi_modal_projector)\."),
    "qwen3_next": re.compile(r"mtp\."),
    "qwen3_5": re.compile(r"(mtp|model\.visual)\."),
}
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def standard_name(model: Model, name: str) -> str:
    """The standard name of a tensor with this name in a file."""
    for own, standard in _BEGINNINGS.get(model.names, ()):
        if name.startswith(own):
            return standard + name.removeprefix(own)
    return name


def checkpoint_name(model: Model, canonical: str) -> str:
    """The name of the checkpoint tensor that holds a weight."""
    for old, new in (*_RENAMES[model.names], *_variant_rules(model)):
        before, number, after = old.partition("*")
        if number:
            pattern = rf"{re.escape(before)}\d+{re.escape(after)}"
            canonical = re.sub(pattern, new, canonical)
        else:
            canonical = canonical.replace(old, new)
    return canonical


def checkpoint_layout(model: Model, name: str) -> Layout:
    """The layout of a checkpoint tensor."""
    layouts = _LAYOUTS.get(model.names, {}).items()
    layout = next((layout for pattern, layout in layouts if re.search(pattern, name)), Layout())
    return replace(layout, transposed=True) if name.endswith(_GPTQ) else layout


def is_shared(name: str) -> bool:
    """Whether all weights that are stored in one tensor share the tensor `name` beside it: the
    groups of their columns.
    """
    return name.endswith("g_idx")


def expert_of(name: str) -> str | None:
    """The number of the expert that has the weight or tensor `name`; None: it is no expert's."""
    expert = _EXPERT.search(name)
    return None if expert is None else expert[1]


def checkpoint_tensors(model: Model) -> dict[str, tuple[str, ...]]:
    """Checkpoint tensor name -> the canonical weights it holds, in the order of the stack."""
    tensors: dict[str, tuple[str, ...]] = {}
    for weight in model.weights():
        name = checkpoint_name(model, weight)
        tensors[name] = (*tensors.get(name, ()), weight)
    return tensors


def _variant_rules(model: Model) -> list[tuple[str, str]]:
    return [rule for variant in model.name_variants for rule in _VARIANTS[variant]]


def with_stored_names(model: Model, stored: Collection[str]) -> Model:
    """The model with the variants of its names that a checkpoint with the tensors `stored` has."""
    variants = []
    for variant in _VARIANTS_OF.get(model.names, ()):
        new = _VARIANTS[variant][0][1]
        if any(new in name for name in stored if not is_left_over(model, name)):
            variants.append(variant)
    return replace(model, name_variants=tuple(variants))


def num_blocks(model: Model, weights: tuple[str, ...]) -> int:
    """The number of blocks of a checkpoint tensor that holds `weights`: each block has so many
    equal parts of each of them, in their order. 1: the weights are stacked whole.
    """
    layer = _LAYER.match(weights[0])
    if layer is None or not checkpoint_layout(model, checkpoint_name(model, weights[0])).by_head:
        return 1
    mixer = model.layers[int(layer[1])].mixer
    if isinstance(mixer, GatedDelta):
        return mixer.k_heads
    assert isinstance(mixer, Gqa)
    return mixer.heads


def checkpoint_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Checkpoint tensor name -> its shape."""
    shapes = model.weights()
    found = {}
    for name, parts in checkpoint_tensors(model).items():
        stacked = parts[:1] if is_shared(name) else parts
        rows = sum(shapes[part][0] for part in stacked)
        count = len({expert_of(part) for part in stacked})
        shape = (rows // count, *shapes[parts[0]][1:])
        if checkpoint_layout(model, name).transposed:
            shape = shape[::-1]
        of_all_experts = expert_of(parts[0]) is not None and expert_of(name) is None
        found[name] = (count, *shape) if of_all_experts else shape
        if model.names == "ernie" and name.endswith("e_score_correction_bias"):
            found[name] = (1, rows)
    return found


def is_left_over(model: Model, name: str) -> bool:
    """Whether a checkpoint tensor is ignored: the config determines its values, or it is only for
    multi-token prediction or for images.
    """
    unused = _UNUSED.get(model.names)
    if _ROPE_TABLES.fullmatch(name) or (unused is not None and unused.match(name)):
        return True
    layer = _LAYER.match(name)
    return layer is not None and 0 <= int(layer[1]) - len(model.layers) < model.extra_layers
