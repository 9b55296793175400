"""Checkpoint tensor names: renamed and fused weights. No other module knows these formats.

This module knows names only; model/load.py reads the data.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from gllm_engine.arch.model import Model

# Replacements in a canonical name, applied in order; * is the number of an expert. Weights that get
# the same name are stored as one tensor, stacked along dimension 0 in canonical order (q, k, v;
# gate, up). Weights of all experts of a layer are so stacked too: [experts, rows, columns].
_FUSED_MLP = (("mlp.gate_proj", "mlp.gate_up_proj"), ("mlp.up_proj", "mlp.gate_up_proj"))
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
_RENAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "hf": (),
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
    "deepseek": (("shared_expert.", "shared_experts."),),
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
    "gpt_bigcode": (
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


@dataclass(frozen=True)
class Layout:
    """How a checkpoint tensor holds the weights that are stacked in it, for each expert alone.

    `transposed`: the stack is stored as [columns, rows]. `interleaved`: the weights take turns row
    by row: gate 0, up 0, gate 1, up 1.
    """

    transposed: bool = False
    interleaved: bool = False


_LLAMA4_EXPERTS = {
    "feed_forward.experts.gate_up_proj": Layout(transposed=True),
    "feed_forward.experts.down_proj": Layout(transposed=True),
}
# End of a tensor's name -> its layout; all others are plain stacks.
_LAYOUTS: dict[str, dict[str, Layout]] = {
    "gpt_oss": {
        "mlp.experts.gate_up_proj": Layout(transposed=True, interleaved=True),
        "mlp.experts.gate_up_proj_bias": Layout(interleaved=True),
        "mlp.experts.down_proj": Layout(transposed=True),
    },
    "llama4": _LLAMA4_EXPERTS,
    "llama4_vision": _LLAMA4_EXPERTS,
}

# RoPE tables in old checkpoints. They are ignored, because the config determines them.
_ROPE_TABLES = re.compile(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.(inv_freq|cos_cached|sin_cached)"
    r"|transformer\.rotary_pos_emb\.inv_freq"
)
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
# Beginnings of the names of a vision tower's tensors.
_VISION = {"llama4_vision": ("vision_model.", "multi_modal_projector.")}
# Ernie's modules for multi-token prediction, which are not layers.
_ERNIE_MTP = re.compile(r"model\.mtp_\w+\.\d+\.")


def checkpoint_name(model: Model, canonical: str) -> str:
    """The name of the checkpoint tensor that holds a weight."""
    for old, new in _RENAMES[model.names]:
        before, number, after = old.partition("*")
        if number:
            pattern = rf"{re.escape(before)}\d+{re.escape(after)}"
            canonical = re.sub(pattern, new, canonical)
        else:
            canonical = canonical.replace(old, new)
    return canonical


def checkpoint_layout(model: Model, name: str) -> Layout:
    """The layout of a checkpoint tensor."""
    for end, layout in _LAYOUTS.get(model.names, {}).items():
        if name.endswith(end):
            return layout
    return Layout()


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


def checkpoint_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Checkpoint tensor name -> its shape."""
    shapes = model.weights()
    found = {}
    for name, parts in checkpoint_tensors(model).items():
        rows = sum(shapes[part][0] for part in parts)
        count = len({expert_of(part) for part in parts})
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
    multi-token prediction or vision.
    """
    if name.startswith(_VISION.get(model.names, ())):
        return True
    if _ROPE_TABLES.fullmatch(name) or (model.names == "ernie" and _ERNIE_MTP.match(name)):
        return True
    layer = _LAYER.match(name)
    return layer is not None and 0 <= int(layer[1]) - len(model.layers) < model.extra_layers
