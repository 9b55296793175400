"""Checkpoint names of every family, written out by hand for one layer."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any

import pytest

from gllm_engine.arch import FAMILIES, Model, make_arch
from gllm_engine.arch.checkpoint import Layout
from gllm_engine.arch.layout import checkpoint_places
from gllm_engine.arch.names import (
    checkpoint_layout,
    checkpoint_shapes,
    checkpoint_tensors,
    is_left_over,
    num_blocks,
    with_stored_names,
)
from gllm_engine.arch.tiny import tiny_config

LAYER = "model.layers.0."
LEAVES = ("weight", "bias")
ATTENTION = [f"{LAYER}self_attn.{part}_proj.weight" for part in "qkvo"]
NORMS = [f"{LAYER}input_layernorm.weight", f"{LAYER}post_attention_layernorm.weight"]
ENDS = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
MLP = [f"{LAYER}mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
BIASES = [f"{LAYER}self_attn.{part}_proj.bias" for part in "qkv"]
GLM_MLP = [f"{LAYER}mlp.gate_up_proj.weight", f"{LAYER}mlp.down_proj.weight"]
PARTS = ("gate_proj", "up_proj", "down_proj")
EXPERTS = [f"{LAYER}mlp.experts.{e}.{part}.weight" for e in range(8) for part in PARTS]
EXPERTS += [f"{LAYER}mlp.gate.weight"]
SHARED = [f"{LAYER}mlp.shared_expert.{part}.weight" for part in PARTS]
SHARED += [f"{LAYER}mlp.shared_expert_gate.weight"]
SHARED_EXPERTS = [f"{LAYER}mlp.shared_experts.{part}.weight" for part in PARTS]
MIXTRAL = f"{LAYER}block_sparse_moe."
MIXTRAL_EXPERTS = [f"{MIXTRAL}experts.{e}.w{i}.weight" for e in range(8) for i in (1, 2, 3)]
MIXTRAL_EXPERTS += [f"{MIXTRAL}gate.weight"]
CHATGLM = [
    "transformer.embedding.word_embeddings.weight",
    "transformer.encoder.layers.0.input_layernorm.weight",
    "transformer.encoder.layers.0.post_attention_layernorm.weight",
    "transformer.encoder.layers.0.self_attention.query_key_value.weight",
    "transformer.encoder.layers.0.self_attention.query_key_value.bias",
    "transformer.encoder.layers.0.self_attention.dense.weight",
    "transformer.encoder.layers.0.mlp.dense_h_to_4h.weight",
    "transformer.encoder.layers.0.mlp.dense_4h_to_h.weight",
    "transformer.encoder.final_layernorm.weight",
    "transformer.output_layer.weight",
]
LATENT_ATTENTION = [
    f"{LAYER}self_attn.{part}.weight"
    for part in (
        *("q_a_proj", "q_a_layernorm", "q_b_proj"),
        *("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"),
    )
]
INDEXER = [
    f"{LAYER}self_attn.indexer.{part}"
    for part in (
        *("wq_b.weight", "wk.weight", "weights_proj.weight"),
        *("k_norm.weight", "k_norm.bias"),
    )
]
INDEXER_PART = "self_attn.indexer.wk.weight"
DEEPSEEK = ENDS + NORMS + LATENT_ATTENTION + EXPERTS + SHARED_EXPERTS
DEEPSEEK_V3 = [*DEEPSEEK, f"{LAYER}mlp.gate.e_score_correction_bias"]
QK_NORMS = [f"{LAYER}self_attn.{part}_norm.weight" for part in "qk"]
OLMO = ENDS + ATTENTION + MLP + QK_NORMS
OLMO += [f"{LAYER}post_{part}_layernorm.weight" for part in ("attention", "feedforward")]
GEMMA = ENDS[:2] + NORMS + ATTENTION + MLP  # tied
GEMMA += [f"{LAYER}{part}_feedforward_layernorm.weight" for part in ("pre", "post")]
ERNIE = [*BIASES, f"{LAYER}self_attn.o_proj.bias"]
ERNIE += [name.replace("weight", "bias") for name in MLP]
NORM_BIASES = [name.replace("weight", "bias") for name in [*NORMS, "model.norm.weight"]]
STARCODER = [f"{LAYER}mlp.c_{part}.{leaf}" for part in ("fc", "proj") for leaf in LEAVES]
STARCODER += [*BIASES, f"{LAYER}self_attn.o_proj.bias", *NORM_BIASES]
H = "transformer.h.0."
FUSED_EXPERTS = [f"{LAYER}mlp.experts.{part}_proj" for part in ("gate_up", "down")]
QWEN3_5 = ENDS + NORMS + ATTENTION + QK_NORMS + MLP
QWEN3_5_MOE = ENDS + NORMS + ATTENTION + QK_NORMS + FUSED_EXPERTS + SHARED
QWEN3_5_MOE += [f"{LAYER}mlp.gate.weight"]
GPT2 = ["transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"]
GPT2 += [f"transformer.ln_f.{leaf}" for leaf in LEAVES]
GPT2 += [f"{H}{part}.{leaf}" for part in ("ln_1", "ln_2") for leaf in LEAVES]
GPT2 += [f"{H}attn.c_{part}.{leaf}" for part in ("attn", "proj") for leaf in LEAVES]
GPT2 += [f"{H}mlp.c_{part}.{leaf}" for part in ("fc", "proj") for leaf in LEAVES]
NEOX = ["gpt_neox.embed_in.weight", "embed_out.weight"]
NEOX += [f"gpt_neox.final_layer_norm.{leaf}" for leaf in LEAVES]
NEOX += [
    f"gpt_neox.layers.0.{part}.{leaf}"
    for part in (
        *("input_layernorm", "post_attention_layernorm"),
        *("attention.query_key_value", "attention.dense"),
        *("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    )
    for leaf in LEAVES
]
GPT_OSS = [f"{LAYER}self_attn.sinks", *BIASES, f"{LAYER}self_attn.o_proj.bias"]
GPT_OSS += [f"{LAYER}mlp.router.{leaf}" for leaf in LEAVES]
GPT_OSS += [f"{LAYER}mlp.experts.{part}_proj{end}" for part in ("gate_up", "down")
            for end in ("", "_bias")]  # fmt: skip
LLAMA4 = [f"{LAYER}feed_forward.{part}" for part in (
    "router.weight", "experts.gate_up_proj", "experts.down_proj",
    *(f"shared_expert.{part}.weight" for part in PARTS),
)]  # fmt: skip
VISUAL = "model.visual."
PATCHES = [f"{VISUAL}patch_embed.proj.{leaf}" for leaf in LEAVES]
ATTENDING = [f"attn.{part}.{leaf}" for part in ("qkv", "proj") for leaf in LEAVES]


def tower(blocks: list[str], *others: str) -> list[str]:
    """The names of a tower of three blocks, each with `blocks`."""
    parts = [f"{VISUAL}blocks.{i}.{name}" for i in range(3) for name in [*blocks, *ATTENDING]]
    return parts + [f"{VISUAL}{name}" for name in others]


def merger(name: str) -> list[str]:
    return [f"{name}.{part}.{e}" for part in ("norm", "linear_fc1", "linear_fc2") for e in LEAVES]


TOWER_3 = [f"{part}.{e}" for part in ("norm1", "norm2") for e in LEAVES]
TOWER_3 += [f"mlp.linear_fc{i}.{leaf}" for i in (1, 2) for leaf in LEAVES]
TOWER_3 = PATCHES + tower(TOWER_3, "pos_embed.weight", *merger("merger"))
TOWER_2_5 = [f"mlp.{part}.{leaf}" for part in PARTS for leaf in LEAVES]
TOWER_2_5 = PATCHES[:1] + tower(
    [*TOWER_2_5, "norm1.weight", "norm2.weight"],
    "merger.ln_q.weight",
    *(f"merger.mlp.{i}.{leaf}" for i in (0, 2) for leaf in LEAVES),
)


def with_leaves(*names: str) -> list[str]:
    return [f"{name}.{leaf}" for name in names for leaf in LEAVES]


PROJECTOR = "multi_modal_projector."
CLIP = ["embeddings.class_embedding", "embeddings.patch_embedding.weight"]
CLIP += ["embeddings.position_embedding.weight", *with_leaves("pre_layrnorm")]
for i in range(2):  # of three
    parts = [f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")]
    parts += ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]
    CLIP += with_leaves(*(f"encoder.layers.{i}.{part}" for part in parts))
CLIP = [f"vision_tower.vision_model.{name}" for name in CLIP]
CLIP += with_leaves(f"{PROJECTOR}linear_1", f"{PROJECTOR}linear_2")
PIXTRAL = ["patch_conv", "ln_pre"]
for i in range(3):
    parts = [f"attention.{part}_proj" for part in "qkvo"]
    parts += [f"feed_forward.{part}" for part in PARTS] + ["attention_norm", "ffn_norm"]
    PIXTRAL += [f"transformer.layers.{i}.{part}" for part in parts]
PIXTRAL = [f"vision_tower.{name}.weight" for name in PIXTRAL]
PIXTRAL += [f"{PROJECTOR}linear_1.weight", f"{PROJECTOR}linear_2.weight"]
PIXTRAL += [f"{PROJECTOR}norm.weight", f"{PROJECTOR}patch_merger.merging_layer.weight"]
MOON = [*with_leaves("patch_embed.proj"), "patch_embed.pos_emb.weight"]
for i in range(3):
    parts = ["norm0", "norm1", "wqkv", "wo", "mlp.fc0", "mlp.fc1"]
    MOON += with_leaves(*(f"encoder.blocks.{i}.{part}" for part in parts))
MOON += with_leaves("encoder.final_layernorm")
MOON = [f"vision_tower.{name}" for name in MOON]
MOON += with_leaves(*(f"mm_projector.{part}" for part in ("pre_norm", "proj.0", "proj.2")))
DEEPSTACK = [f"{VISUAL}{name}" for name in merger("deepstack_merger_list.0")]


def beside(names: list[str]) -> list[str]:
    return [name.replace("model.", "model.language_model.") for name in names]


EXPECTED = {
    "Qwen2_5_VLForConditionalGeneration": beside(ENDS + NORMS + ATTENTION + BIASES + MLP)
    + TOWER_2_5,
    "Qwen3VLForConditionalGeneration": beside(ENDS + NORMS + ATTENTION + QK_NORMS + MLP)
    + TOWER_3
    + DEEPSTACK,
    "Qwen3VLMoeForConditionalGeneration": beside(
        [*ENDS, *NORMS, *ATTENTION, *QK_NORMS, *FUSED_EXPERTS, f"{LAYER}mlp.gate.weight"]
    )
    + TOWER_3
    + DEEPSTACK,
    "GPTNeoXForCausalLM": NEOX,
    "Qwen3NextForCausalLM": ENDS + NORMS + ATTENTION + QK_NORMS + EXPERTS + SHARED,
    "Qwen3_5ForCausalLM": QWEN3_5,
    "Qwen3_5MoeForCausalLM": QWEN3_5_MOE,
    "Qwen3_5ForConditionalGeneration": [
        *(name for name in QWEN3_5 if name != "lm_head.weight"),
        *TOWER_3,
    ],
    "Qwen3_5MoeForConditionalGeneration": QWEN3_5_MOE + TOWER_3,
    "Llama4ForCausalLM": ENDS + NORMS + ATTENTION + LLAMA4,
    "MiniMaxM2ForCausalLM": ENDS
    + NORMS
    + ATTENTION
    + QK_NORMS
    + MIXTRAL_EXPERTS
    + [f"{MIXTRAL}e_score_correction_bias"],
    "GptOssForCausalLM": ENDS + NORMS + ATTENTION + GPT_OSS,
    "Starcoder2ForCausalLM": ENDS + NORMS + ATTENTION + STARCODER,
    "GPT2LMHeadModel": GPT2,
    "GPTBigCodeForCausalLM": GPT2,
    "Olmo2ForCausalLM": OLMO,
    "Olmo3ForCausalLM": OLMO,
    "SmolLM3ForCausalLM": ENDS + NORMS + ATTENTION + MLP,
    "GraniteForCausalLM": ENDS + NORMS + ATTENTION + MLP,
    "GraniteMoeForCausalLM": ENDS
    + NORMS
    + ATTENTION
    + [f"{MIXTRAL}{part}.weight" for part in ("input_linear", "output_linear", "router.layer")],
    "GraniteMoeHybridForCausalLM": ENDS
    + NORMS
    + ATTENTION
    + [f"{LAYER}shared_mlp.{part}_linear.weight" for part in ("input", "output")],
    "HunYuanDenseV1ForCausalLM": ENDS
    + NORMS
    + ATTENTION
    + MLP
    + [f"{LAYER}self_attn.{part}_layernorm.weight" for part in ("query", "key")],
    "HunYuanMoEV1ForCausalLM": ENDS
    + NORMS
    + ATTENTION
    + EXPERTS[:-1]
    + [f"{LAYER}mlp.gate.wg.weight"]
    + [f"{LAYER}mlp.shared_mlp.{part}.weight" for part in PARTS]
    + [f"{LAYER}self_attn.{part}_layernorm.weight" for part in ("query", "key")],
    "Ernie4_5_ForCausalLM": ENDS + NORMS + ATTENTION + MLP,
    "Ernie4_5ForCausalLM": ENDS + NORMS + ATTENTION + MLP + ERNIE,
    "Phi3ForCausalLM": ENDS
    + NORMS
    + GLM_MLP
    + [f"{LAYER}self_attn.{part}_proj.weight" for part in ("qkv", "o")],
    "Ministral3ForCausalLM": ENDS + NORMS + ATTENTION + MLP,
    "Mistral3ForConditionalGeneration": [
        *(f"language_model.{name}" for name in ENDS + NORMS + ATTENTION + MLP),
        *PIXTRAL,
    ],
    "LlavaForConditionalGeneration": [
        *(f"language_model.{name}" for name in ENDS + NORMS + ATTENTION + MLP),
        *CLIP,
    ],
    "Gemma2ForCausalLM": GEMMA,
    "Gemma3ForCausalLM": GEMMA + QK_NORMS,
    "Gemma3ForConditionalGeneration": [f"language_model.{name}" for name in GEMMA + QK_NORMS],
    "Cohere2ForCausalLM": ENDS + NORMS[:1] + ATTENTION + MLP,
    "LlamaForCausalLM": ENDS + NORMS + ATTENTION + MLP,
    "MistralForCausalLM": ENDS + NORMS + ATTENTION + MLP,
    "Qwen2ForCausalLM": ENDS[:2] + NORMS + ATTENTION + BIASES + MLP,  # tied
    "Qwen3ForCausalLM": ENDS
    + NORMS
    + ATTENTION
    + MLP
    + [f"{LAYER}self_attn.{part}_norm.weight" for part in "qk"],
    "MixtralForCausalLM": ENDS + NORMS + ATTENTION + MIXTRAL_EXPERTS,
    "Qwen2MoeForCausalLM": ENDS + NORMS + ATTENTION + BIASES + EXPERTS + SHARED,
    "Qwen3MoeForCausalLM": ENDS
    + NORMS
    + ATTENTION
    + EXPERTS
    + [f"{LAYER}self_attn.{part}_norm.weight" for part in "qk"],
    "GlmForCausalLM": ENDS + NORMS + ATTENTION + BIASES + GLM_MLP,
    "Glm4ForCausalLM": ENDS
    + NORMS
    + ATTENTION
    + BIASES
    + GLM_MLP
    + [f"{LAYER}post_self_attn_layernorm.weight", f"{LAYER}post_mlp_layernorm.weight"],
    "Glm4MoeForCausalLM": ENDS
    + NORMS
    + ATTENTION
    + BIASES
    + [f"{LAYER}self_attn.{part}_norm.weight" for part in "qk"]
    + EXPERTS
    + SHARED_EXPERTS
    + [f"{LAYER}mlp.gate.e_score_correction_bias"],
    "Ernie4_5_MoeForCausalLM": ENDS
    + NORMS
    + ATTENTION
    + EXPERTS
    + SHARED_EXPERTS
    + [f"{LAYER}mlp.moe_statics.e_score_correction_bias"],
    "DeepseekV2ForCausalLM": DEEPSEEK,
    **dict.fromkeys(
        ("DeepseekV3ForCausalLM", "KimiK2ForCausalLM", "Glm4MoeLiteForCausalLM"),
        DEEPSEEK_V3,
    ),
    **dict.fromkeys(
        ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"),
        DEEPSEEK_V3 + INDEXER,
    ),
    **dict.fromkeys(
        ("KimiK25ForConditionalGeneration", "Kimi_K25ForConditionalGeneration"),
        [*(f"language_model.{name}" for name in DEEPSEEK_V3), *MOON],
    ),
    "Llama4ForConditionalGeneration": [
        f"language_model.{name}" for name in ENDS + NORMS + ATTENTION + LLAMA4
    ],
    "ChatGLMModel": CHATGLM,
    "ChatGLMForConditionalGeneration": CHATGLM,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_names(family: str) -> None:
    keys = ("num_layers", "n_layer", "num_hidden_layers")
    tiny = tiny_config(family)
    tiny = tiny.get("text_config", tiny)
    one_layer = next(key for key in keys if key in tiny)
    # Some tiny configs have experts in their second layer alone.
    sparse = {"decoder_sparse_step": 1, "first_k_dense_replace": 0, "moe_layer_start_index": 0}
    sparse["interleave_moe_layer_step"] = 1
    over: dict[str, Any] = {k: v for k, v in sparse.items() if k in tiny}
    if "layer_types" in tiny:
        over["layer_types"] = ["full_attention"]
    if "no_rope_layers" in tiny:
        over["no_rope_layers"] = [1]
    config = tiny_config(family, **{one_layer: 1}, **over)
    if config.get("vision_config", {}).get("deepstack_visual_indexes"):  # it needs a layer after it
        config = tiny_config(family, **{one_layer: 2}, **over)
        config["vision_config"] |= {"deepstack_visual_indexes": [0]}
    arch = make_arch(config)
    tensors = checkpoint_tensors(arch)
    first = [name for name in tensors if "language_model.layers.1." not in name]
    assert sorted(first) == sorted(EXPECTED[family])
    held = [weight for weights in tensors.values() for weight in weights]
    assert sorted(held) == sorted(arch.weights())


def test_order_within_a_fused_tensor() -> None:
    tensors = checkpoint_tensors(make_arch(tiny_config("ChatGLMModel")))
    layer = "transformer.encoder.layers.1."
    assert tensors[f"{layer}mlp.dense_h_to_4h.weight"] == (
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    )
    assert tensors[f"{layer}self_attention.query_key_value.bias"] == tuple(
        f"model.layers.1.self_attn.{part}_proj.bias" for part in "qkv"
    )


FUSED_EXPERTS = f"{LAYER}mlp.experts.gate_up_proj"


def test_one_tensor_for_all_experts_of_a_layer() -> None:
    one_by_one = make_arch(tiny_config("Qwen3NextForCausalLM"))
    model = with_stored_names(one_by_one, {FUSED_EXPERTS})
    tensors, shapes = checkpoint_tensors(model), checkpoint_shapes(model)
    experts = "model.layers.1.mlp.experts."
    assert tensors[f"{experts}gate_up_proj"] == tuple(
        f"{experts}{e}.{part}_proj.weight" for e in range(8) for part in ("gate", "up")
    )
    assert tensors[f"{experts}down_proj"] == tuple(
        f"{experts}{e}.down_proj.weight" for e in range(8)
    )
    assert shapes[f"{experts}gate_up_proj"] == (8, 2 * 32, 64)
    assert shapes[f"{experts}down_proj"] == (8, 64, 32)
    one = model.each(ffn=lambda _, layer: replace(layer.ffn, num_experts=1))
    assert checkpoint_shapes(one)[f"{experts}gate_up_proj"] == (1, 2 * 32, 64)
    assert f"{experts}gate_up_proj" not in checkpoint_tensors(one_by_one)


def test_transposed_matrices_of_gpt2() -> None:
    gpt2 = make_arch(tiny_config("GPT2LMHeadModel"))
    bigcode = make_arch(tiny_config("GPTBigCodeForCausalLM"))
    shapes = checkpoint_shapes(gpt2)
    assert shapes[f"{H}attn.c_attn.weight"] == (64, 3 * 64)
    assert shapes[f"{H}mlp.c_fc.weight"] == (64, 96)
    assert shapes[f"{H}mlp.c_proj.weight"] == (96, 64)
    transposed = {
        name.removeprefix(H) for name in shapes if checkpoint_layout(gpt2, name).transposed
    }
    matrices = {f"attn.c_{part}.weight" for part in ("attn", "proj")}
    matrices |= {f"mlp.c_{part}.weight" for part in ("fc", "proj")}
    assert {name for name in transposed if not name.startswith("transformer")} == matrices
    plain = {checkpoint_layout(bigcode, name) for name in checkpoint_shapes(bigcode)}
    assert plain == {Layout()}


def test_neox_stores_queries_keys_and_values_by_heads() -> None:
    neox = make_arch(tiny_config("GPTNeoXForCausalLM"))
    for leaf in LEAVES:
        name = f"gpt_neox.layers.0.attention.query_key_value.{leaf}"
        assert num_blocks(neox, checkpoint_tensors(neox)[name]) == 4
    dense = checkpoint_tensors(neox)["gpt_neox.layers.0.attention.dense.weight"]
    assert num_blocks(neox, dense) == 1
    bigcode = make_arch(tiny_config("GPTBigCodeForCausalLM"))
    assert num_blocks(bigcode, checkpoint_tensors(bigcode)[f"{H}attn.c_attn.weight"]) == 1


def names_like(model: Model, stored: set[str]) -> set[str]:
    """The names of the model's tensors in a checkpoint with the tensors `stored`."""
    return set(checkpoint_tensors(with_stored_names(model, stored)))


def test_gpt2s_names_without_the_common_beginning() -> None:
    gpt2 = make_arch(tiny_config("GPT2LMHeadModel"))
    names = set(checkpoint_tensors(gpt2))
    bare = {name.removeprefix("transformer.") for name in names}
    assert {"wte.weight", "h.0.attn.c_attn.weight", "ln_f.bias", "lm_head.weight"} < bare
    assert names_like(gpt2, bare) == bare
    assert names_like(gpt2, names) == names
    assert is_left_over(gpt2, "h.0.attn.bias")


def test_kimi_k25s_names_of_transformers_and_its_weights_for_images() -> None:
    kimi = replace(make_arch(tiny_config("KimiK25ForConditionalGeneration")), vision=None)
    names = set(checkpoint_tensors(kimi))
    assert {"language_model.lm_head.weight", "language_model.model.norm.weight"} < names
    assert not any(is_left_over(kimi, name) for name in names)
    theirs = {
        name.replace("language_model.model.", "model.language_model.").replace(
            "language_model.lm_head.", "lm_head."
        )
        for name in names
    }
    assert {"lm_head.weight", "model.language_model.norm.weight"} < theirs
    for stored in (names, theirs):
        assert names_like(kimi, stored) == stored
    for part in ("vision_tower.encoder.blocks.0.wqkv", "mm_projector.proj.0"):
        assert is_left_over(kimi, f"{part}.weight")
        assert is_left_over(kimi, f"model.{part}.weight")
        assert not is_left_over(make_arch(tiny_config("KimiK2ForCausalLM")), f"{part}.weight")


def test_masks_in_old_checkpoints_are_left_over() -> None:
    gpt2 = make_arch(tiny_config("GPT2LMHeadModel"))
    neox = make_arch(tiny_config("GPTNeoXForCausalLM"))
    for part in ("bias", "masked_bias"):
        assert is_left_over(gpt2, f"transformer.h.11.attn.{part}")
        assert is_left_over(neox, f"gpt_neox.layers.5.attention.{part}")
    assert is_left_over(neox, "gpt_neox.layers.5.attention.rotary_emb.inv_freq")
    assert not is_left_over(gpt2, "transformer.h.0.attn.c_attn.bias")
    assert not is_left_over(neox, "gpt_neox.layers.0.attention.dense.bias")
    assert not is_left_over(neox, "transformer.h.0.attn.bias")


def test_gpt_oss_stores_the_experts_of_a_layer_transposed() -> None:
    """As transformers' GptOssExperts: [experts, dim, 2 * hidden] and [experts, hidden, dim]."""
    config = tiny_config("GptOssForCausalLM", intermediate_size=24)
    experts = f"{LAYER}mlp.experts."
    shapes = checkpoint_shapes(make_arch(config))
    assert shapes[f"{experts}gate_up_proj"] == (8, 64, 48)
    assert shapes[f"{experts}gate_up_proj_bias"] == (8, 48)
    assert shapes[f"{experts}down_proj"] == (8, 24, 64)
    assert shapes[f"{experts}down_proj_bias"] == (8, 64)


def test_llama4_stores_the_experts_of_a_layer_transposed() -> None:
    """As transformers' Llama4TextExperts: [experts, dim, 2 * hidden] and [experts, hidden, dim]."""
    model = make_arch(tiny_config("Llama4ForCausalLM", intermediate_size=24))
    shapes = checkpoint_shapes(model)
    experts = "model.layers.1.feed_forward.experts."
    assert shapes[f"{experts}gate_up_proj"] == (8, 64, 48)
    assert shapes[f"{experts}down_proj"] == (8, 24, 64)
    assert shapes["model.layers.0.feed_forward.up_proj.weight"] == (96, 64)


def test_llama4_with_vision_has_the_same_weights_by_other_names() -> None:
    text = make_arch(tiny_config("Llama4ForCausalLM"))
    whole = make_arch(tiny_config("Llama4ForConditionalGeneration"))
    assert whole.weights() == text.weights()
    names = {f"language_model.{name}": part for name, part in checkpoint_tensors(text).items()}
    assert checkpoint_tensors(whole) == names
    assert checkpoint_shapes(whole) == {
        f"language_model.{name}": shape for name, shape in checkpoint_shapes(text).items()
    }
    for name in ("vision_model.class_embedding", "multi_modal_projector.linear_1.weight"):
        assert is_left_over(whole, name)
        assert not is_left_over(text, name)
    assert not is_left_over(whole, "language_model.model.layers.9.self_attn.q_proj.weight")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_of_a_tensor_belongs_to_one_weight(family: str) -> None:
    model = make_arch(tiny_config(family))
    shapes, places = model.weights(), checkpoint_places(model)
    stored = checkpoint_shapes(model)
    for name, weights in checkpoint_tensors(model).items():
        found = []
        for weight in weights:
            place = places[weight]
            rows = shapes[weight][0] // place.rows
            columns = prod(shapes[weight][1:]) * place.rows
            if place.transposed:
                rows, columns = columns, rows
            found += [
                place.offset + row * place.width + place.first + column * place.step
                for row in range(rows)
                for column in range(columns)
            ]
        assert sorted(found) == list(range(prod(stored[name]))), name


def test_gemmas_norms_have_olmos_names_and_other_places() -> None:
    """transformers' post_attention_layernorm is not Llama's: that one is pre_feedforward."""
    tensors = checkpoint_tensors(make_arch(tiny_config("Gemma2ForCausalLM")))
    held = {
        "input": "input_layernorm",
        "post_attention": "post_self_attn_layernorm",
        "pre_feedforward": "post_attention_layernorm",
        "post_feedforward": "post_mlp_layernorm",
    }
    for name, canonical in held.items():
        assert tensors[f"{LAYER}{name}_layernorm.weight"] == (f"{LAYER}{canonical}.weight",)


def test_phi3s_fused_tensors() -> None:
    tensors = checkpoint_tensors(make_arch(tiny_config("Phi3ForCausalLM")))
    parts = tuple(f"{LAYER}self_attn.{part}_proj.weight" for part in "qkv")
    assert tensors[f"{LAYER}self_attn.qkv_proj.weight"] == parts


def test_mixtral_counts_its_weights_from_the_gate() -> None:
    tensors = checkpoint_tensors(make_arch(tiny_config("MixtralForCausalLM")))
    names = {1: "gate_proj", 3: "up_proj", 2: "down_proj"}
    for i, name in names.items():
        canonical = f"{LAYER}mlp.experts.5.{name}.weight"
        assert tensors[f"{MIXTRAL}experts.5.w{i}.weight"] == (canonical,)


GATED_DELTA = {
    "Qwen3NextForCausalLM": {
        "in_proj_qkvz.weight": ("in_proj_q", "in_proj_k", "in_proj_v", "in_proj_z"),
        "in_proj_ba.weight": ("in_proj_b", "in_proj_a"),
    },
    "Qwen3_5ForCausalLM": {
        "in_proj_qkv.weight": ("in_proj_q", "in_proj_k", "in_proj_v"),
        **{f"in_proj_{part}.weight": (f"in_proj_{part}",) for part in "zba"},
    },
}


@pytest.mark.parametrize("family", GATED_DELTA)
def test_names_of_the_gated_delta_rule(family: str) -> None:
    model = make_arch(tiny_config(family))
    prefix = f"{LAYER}linear_attn."
    tensors = checkpoint_tensors(model)
    mine = {name: parts for name, parts in tensors.items() if name.startswith(prefix)}
    held = GATED_DELTA[family] | {"conv1d.weight": ("conv_q", "conv_k", "conv_v")}
    expected = {
        prefix + name: tuple(f"{prefix}{part}.weight" for part in parts)
        for name, parts in held.items()
    }
    whole = ("A_log", "dt_bias", "norm.weight", "out_proj.weight")
    assert mine == expected | {prefix + name: (prefix + name,) for name in whole}
    # By key head; queries and their gate by head.
    by_head = {name: num_blocks(model, parts) for name, parts in tensors.items()}
    by_head = {name: count for name, count in by_head.items() if count > 1}
    projections = [name for name in mine if "in_proj_qkvz" in name or "in_proj_ba" in name]
    assert by_head == dict.fromkeys(projections, 4) | {"model.layers.1.self_attn.q_proj.weight": 4}


def test_names_are_those_of_the_files() -> None:
    """A text model may be stored as it was beside images, and experts together or one by one."""
    model = make_arch(tiny_config("Qwen3_5MoeForCausalLM"))
    unused = {"mtp.layers.0.mlp.experts.gate_up_proj", "model.visual.patch_embed.proj.weight"}
    fused = set(checkpoint_tensors(model))
    one_by_one = names_like(model, unused)
    assert FUSED_EXPERTS in fused and EXPERTS[0] in one_by_one
    for text in (fused, one_by_one):
        beside_images = {name.replace("model.", "model.language_model.") for name in text}
        for stored in (text, beside_images):
            assert names_like(model, stored | unused) == stored
    llama = make_arch(tiny_config("LlamaForCausalLM"))
    assert with_stored_names(llama, {FUSED_EXPERTS}) == llama


def test_tensors_for_images_and_for_multi_token_prediction_are_left_over() -> None:
    for family in ("Qwen3NextForCausalLM", "Qwen3_5ForConditionalGeneration"):
        model = make_arch(tiny_config(family))
        assert is_left_over(model, "mtp.layers.0.self_attn.q_proj.weight")
    with_tower = make_arch(tiny_config("Qwen3_5ForConditionalGeneration"))
    assert not is_left_over(with_tower, "model.visual.blocks.0.attn.qkv.weight")
    assert not is_left_over(with_tower, "model.visual.blocks.9.attn.qkv.weight")
    whole = replace(with_tower, vision=None)
    assert is_left_over(whole, "model.visual.blocks.0.attn.qkv.weight")
    assert not is_left_over(whole, "model.layers.0.visual.weight")
    assert not is_left_over(whole, "lm_head.visual.weight")
    assert not is_left_over(make_arch(tiny_config("Qwen3ForCausalLM")), "mtp.fc.weight")


def test_left_overs() -> None:
    model = make_arch(tiny_config("LlamaForCausalLM"))
    assert is_left_over(model, "model.layers.11.self_attn.rotary_emb.inv_freq")
    assert is_left_over(model, "model.layers.0.self_attn.rotary_emb.cos_cached")
    assert is_left_over(model, "model.layers.0.self_attn.rotary_emb.sin_cached")
    table = "transformer.rotary_pos_emb.inv_freq"
    assert is_left_over(make_arch(tiny_config("ChatGLMModel")), table)
    assert not is_left_over(model, "model.layers.11.self_attn.rotary_emb.inv_freq.weight")
    assert not is_left_over(model, "model.layers.11.self_attn.q_proj.weight")
    assert not is_left_over(model, "model.layers.2.self_attn.q_proj.weight")


QWEN3_5_VL = ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration")
# Tensors that no text model of the family needs.
UNUSED = {
    "GPT2LMHeadModel": ["h.1.attn.bias", "h.1.attn.masked_bias"],
    "GPTBigCodeForCausalLM": ["h.1.attn.bias"],
    "GPTNeoXForCausalLM": ["layers.1.attention.masked_bias"],
    "Qwen3NextForCausalLM": ["mtp.fc.weight"],
    "Ernie4_5_MoeForCausalLM": ["mtp_block.0.mlp.up_proj.weight"],
    **dict.fromkeys(
        ("Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM", *QWEN3_5_VL),
        ["mtp.layers.0.input_layernorm.weight", "visual.blocks.0.attn.qkv.weight"],
    ),
    **dict.fromkeys(
        ("KimiK25ForConditionalGeneration", "Kimi_K25ForConditionalGeneration"),
        ["vision_tower.patch_embed.proj.weight", "mm_projector.proj.0.weight"],
    ),
    **dict.fromkeys(
        tuple(f"{name}ForConditionalGeneration" for name in ("Gemma3", "Mistral3", "Llava")),
        ["vision_tower.vision_model.head.weight", "multi_modal_projector.norm.weight"],
    ),
    **dict.fromkeys(
        (name for name in FAMILIES if "VLFor" in name or "VLMoe" in name),
        ["visual.blocks.0.attn.qkv.weight"],
    ),
    "Llama4ForConditionalGeneration": ["vision_model.class_embedding"],
}


def every_variant(model: Model) -> list[Model]:
    """The model with any of the names that its checkpoints have."""
    models = []
    for applies in product((False, True), repeat=len(model.names.variants)):
        pairs = zip(model.names.variants, applies, strict=True)
        variants = tuple(replace(variant, applies=flag) for variant, flag in pairs)
        models.append(replace(model, names=replace(model.names, variants=variants)))
    return models


@pytest.mark.parametrize("family", FAMILIES)
def test_left_overs_have_any_prefix_of_the_family(family: str) -> None:
    model = replace(make_arch(tiny_config(family)), vision=None)
    more = replace(model, extra_layers=2)
    none = replace(model, extra_layers=0)
    n = len(model.layers)
    prefixes = set()
    for variant in every_variant(model):
        names = checkpoint_tensors(variant)
        assert not any(is_left_over(model, name) for name in names)
        found = (re.match(r"(\D*)1\.", name) for name in names)
        prefixes.add(next(match[1] for match in found if match))
    for prefix in prefixes:
        left = [i for i in range(n + 4) if is_left_over(more, f"{prefix}{i}.eh_proj.weight")]
        assert left == [n, n + 1]
        assert not is_left_over(none, f"{prefix}{n}.eh_proj.weight")
        assert is_left_over(none, f"{prefix}0.self_attn.rotary_emb.inv_freq")
        parts = prefix.split(".")[:-2]  # without "layers" and what follows the last dot
        for name in UNUSED.get(family, []):
            for count in range(len(parts) + 1):
                assert is_left_over(none, ".".join([*parts[:count], name]))
            assert not is_left_over(none, f"{prefix}1.{name}")
    assert bool(model.names.unused or model.names.tower) == (family in UNUSED)


def test_indexers_of_layers_that_use_an_earlier_one_are_left_over() -> None:
    over = {"num_hidden_layers": 3, "indexer_types": ["full", "shared", "full"]}
    model = make_arch(tiny_config("GlmMoeDsaForCausalLM", **over))
    left = [i for i in range(3) if is_left_over(model, f"model.layers.{i}.{INDEXER_PART}")]
    assert left == [1]
    tensors = checkpoint_tensors(model)
    held = [i for i in range(3) if f"model.layers.{i}.{INDEXER_PART}" in tensors]
    assert held == [0, 2]


@pytest.mark.parametrize("key", ["num_nextn_predict_layers", "num_mtp_layers"])
def test_layers_for_multi_token_prediction_are_left_over(key: str) -> None:
    """As many as the config says, and none of the model's own ones."""
    config = tiny_config("Glm4MoeForCausalLM", num_nextn_predict_layers=None) | {key: 2}
    left = [
        i for i in range(6) if is_left_over(make_arch(config), f"model.layers.{i}.enorm.weight")
    ]
    assert left == [2, 3]
    none = make_arch(config | {key: 0})
    assert not is_left_over(none, "model.layers.2.eh_proj.weight")
    ernie = make_arch(tiny_config("Ernie4_5_MoeForCausalLM"))
    for name in ("mtp_block.0.mlp.up_proj", "mtp_emb_norm.0", "mtp_linear_proj.0"):
        assert is_left_over(ernie, f"model.{name}.weight")
        assert not is_left_over(none, f"model.{name}.weight")
