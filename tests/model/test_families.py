"""fp32 logits against transformers: every family, every RoPE scaling, both ways of a checkpoint."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import all_logits, load, reference_logits, some_tokens
from torch import Tensor
from vision_models import save_reference

from gllm_engine.arch import FAMILIES, read_arch
from gllm_engine.arch.tiny import tiny_config
from gllm_engine.model.tiny import write_tiny_model

TOLERANCE = 2e-5  # of logits up to about 12
# transformers makes no text model of these.
OTHERS = ("ChatGLM", "KimiK25", "Kimi_K25", "Llama4ForConditional", "Gemma3ForConditional")
OTHERS += ("Mistral3ForConditional", "Qwen2_5_VL", "Qwen3VL", "Llava")
HF_FAMILIES = [name for name in FAMILIES if not name.startswith(OTHERS)]

MSCALE_YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 512,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "beta_fast": 1.0,
    "beta_slow": 1.0,
}
V2_MSCALE = {"mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32.0}
MOONLIGHT = {
    "q_lora_rank": None,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 2,
    "routed_scaling_factor": 2.446,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50_000.0,
    "num_nextn_predict_layers": 0,
}
# Zero switches off.
DEVSTRAL2 = MSCALE_YARN | {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "mscale_all_dim": 0.0,
    "llama_4_scaling_beta": 0.0,
}
SHARING = ["full", "shared", "shared", "full", "shared"]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in HF_FAMILIES),
    ("DeepseekV2ForCausalLM", {"q_lora_rank": None, "topk_method": "greedy"}),
    ("DeepseekV2ForCausalLM", {"topk_group": 3, "num_experts_per_tok": 6}),
    ("DeepseekV2ForCausalLM", {"rope_scaling": MSCALE_YARN | V2_MSCALE, "n_shared_experts": 2}),
    ("DeepseekV3ForCausalLM", {"q_lora_rank": None, "rms_norm_eps": 1e-5}),
    ("DeepseekV3ForCausalLM", MOONLIGHT),
    ("DeepseekV3ForCausalLM", {"rope_interleave": False, "v_head_dim": 20}),
    ("DeepseekV3ForCausalLM", {"rope_scaling": MSCALE_YARN}),
    ("DeepseekV3ForCausalLM", {"rope_interleave": None}),
    ("Qwen3NextForCausalLM", {"decoder_sparse_step": 2, "norm_topk_prob": False}),
    ("Qwen3NextForCausalLM", {"attention_bias": True, "tie_word_embeddings": True}),
    ("Qwen3NextForCausalLM", {"layer_types": ["full_attention"] * 2, "linear_conv_kernel_dim": 3}),
    ("Qwen3NextForCausalLM", {"mlp_only_layers": [0], "partial_rotary_factor": 1.0}),
    (
        "Qwen3NextForCausalLM",
        {"layer_types": None, "num_hidden_layers": 3, "full_attention_interval": 2},
    ),
    ("Qwen3_5ForCausalLM", {"layer_types": ["linear_attention"] * 2, "linear_conv_kernel_dim": 2}),
    ("Qwen3_5ForCausalLM", {"linear_num_key_heads": 3, "linear_num_value_heads": 3}),
    ("Qwen3_5ForCausalLM", {"attention_bias": True, "num_key_value_heads": 1}),
    ("Qwen3_5MoeForCausalLM", {"tie_word_embeddings": True, "num_experts_per_tok": 3}),
    (
        "Qwen3_5ForConditionalGeneration",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 512,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            }
        },
    ),
    ("DeepseekV32ForCausalLM", {"rope_scaling": MSCALE_YARN, "index_topk": 1}),
    ("DeepseekV32ForCausalLM", {"index_topk": 60, "index_head_dim": 16}),
    ("GlmMoeDsaForCausalLM", {"index_n_heads": 24, "mlp_layer_types": ["sparse", "dense"]}),
    ("GlmMoeDsaForCausalLM", {"num_hidden_layers": 5, "indexer_types": SHARING}),
    (
        "GlmMoeDsaForCausalLM",
        {"num_hidden_layers": 6, "index_topk_freq": 2, "index_skip_topk_offset": 3},
    ),
    ("GlmMoeDsaForCausalLM", {"num_hidden_layers": 4, "index_topk_freq": 3}),
    ("GlmMoeDsaForCausalLM", {"num_hidden_layers": 3, "index_topk_pattern": "FSF"}),
    ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    ("LlamaForCausalLM", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("LlamaForCausalLM", {"num_key_value_heads": 1, "head_dim": 24}),
    ("LlamaForCausalLM", {"rms_norm_eps": 0.5}),
    ("MistralForCausalLM", {"sliding_window": None}),
    ("MistralForCausalLM", {"sliding_window": 5}),
    ("MistralForCausalLM", {"head_dim": 32}),
    ("Qwen2ForCausalLM", {"tie_word_embeddings": False}),
    (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    (
        "Qwen3ForCausalLM",
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    ("Qwen3ForCausalLM", {"attention_bias": True, "tie_word_embeddings": True}),
    ("MixtralForCausalLM", {"sliding_window": 5, "num_experts_per_tok": 3}),
    ("MixtralForCausalLM", {"num_local_experts": 5, "num_experts_per_tok": 5}),
    ("Qwen2MoeForCausalLM", {"decoder_sparse_step": 1, "qkv_bias": False}),
    ("Qwen2MoeForCausalLM", {"norm_topk_prob": True, "num_experts": 6}),
    ("Qwen3MoeForCausalLM", {"norm_topk_prob": False, "mlp_only_layers": [1]}),
    ("Qwen3MoeForCausalLM", {"num_experts_per_tok": 1, "attention_bias": True}),
    ("Glm4MoeForCausalLM", {"first_k_dense_replace": 0, "use_qk_norm": False}),
    ("Glm4MoeForCausalLM", {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
    ("Glm4MoeForCausalLM", {"n_routed_experts": 9, "n_group": 3, "num_experts_per_tok": 5}),
    ("Glm4MoeForCausalLM", {"n_shared_experts": 2, "attention_bias": False, "head_dim": 32}),
    ("Ernie4_5_MoeForCausalLM", {"moe_norm_min": 0.8, "moe_k": 1}),
    ("Ernie4_5_MoeForCausalLM", {"moe_num_shared_experts": 0, "tie_word_embeddings": True}),
    (
        "Ernie4_5_MoeForCausalLM",
        {
            "num_hidden_layers": 5,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 3,
            "moe_layer_interval": 2,
        },
    ),
    ("GlmForCausalLM", {"attention_bias": False}),
    ("GlmForCausalLM", {"partial_rotary_factor": 1.0, "rope_theta": 5000.0}),
    ("Olmo2ForCausalLM", {"attention_bias": True, "num_key_value_heads": 1}),
    (
        "Olmo3ForCausalLM",
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 256,
                "attention_factor": 1.2079,
            },
            "head_dim": 32,
        },
    ),
    ("SmolLM3ForCausalLM", {"no_rope_layers": None, "no_rope_layer_interval": 2}),
    ("SmolLM3ForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    ("GraniteForCausalLM", {"attention_bias": True, "tie_word_embeddings": True}),
    ("GraniteMoeForCausalLM", {"num_experts_per_tok": 3, "tie_word_embeddings": True}),
    ("GraniteMoeHybridForCausalLM", {"position_embedding_type": None, "attention_bias": True}),
    ("Ministral3ForCausalLM", {"rope_parameters": DEVSTRAL2}),
    ("Ministral3ForCausalLM", {"rope_parameters": None}),
    ("HunYuanDenseV1ForCausalLM", {"attention_bias": True, "rope_scaling": None}),
    ("HunYuanMoEV1ForCausalLM", {"moe_topk": [3, 1], "attention_bias": True}),
    (
        "HunYuanMoEV1ForCausalLM",
        {"moe_intermediate_size": [96] * 2, "num_shared_expert": [1] * 2, "rope_scaling": None},
    ),
    ("Ernie4_5ForCausalLM", {"use_bias": False, "tie_word_embeddings": True}),
    ("Phi3ForCausalLM", {"rope_scaling": None, "sliding_window": None}),
    ("Ministral3ForCausalLM", {"sliding_window": 5}),
    ("Gemma2ForCausalLM", {"attention_bias": True, "attn_logit_softcapping": None}),
    ("Gemma2ForCausalLM", {"final_logit_softcapping": None, "sliding_window": 5}),
    ("Gemma3ForCausalLM", {"final_logit_softcapping": 4.0}),
    ("Gemma3ForCausalLM", {"head_dim": 32, "attention_bias": True}),
    ("Cohere2ForCausalLM", {"attention_bias": True, "tie_word_embeddings": True}),
    ("Starcoder2ForCausalLM", {"use_bias": False, "sliding_window": None}),
    ("Starcoder2ForCausalLM", {"tie_word_embeddings": True}),
    ("GPT2LMHeadModel", {"n_inner": None, "tie_word_embeddings": True}),
    ("GPT2LMHeadModel", {"activation_function": "gelu", "n_head": 1}),
    ("GPTNeoXForCausalLM", {"use_parallel_residual": False, "hidden_act": "gelu_fast"}),
    ("GPTNeoXForCausalLM", {"attention_bias": False, "rotary_pct": 1.0, "rotary_emb_base": 77}),
    ("GPTBigCodeForCausalLM", {"n_inner": None, "tie_word_embeddings": True}),
    ("GptOssForCausalLM", {"attention_bias": False, "swiglu_limit": 0.5, "swiglu_alpha": 3.0}),
    ("GptOssForCausalLM", {"sliding_window": 5, "num_experts_per_tok": 3, "layer_types": None}),
    ("GptOssForCausalLM", {"rope_scaling": None, "rope_parameters": None}),
    ("GptOssForCausalLM", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("Llama4ForCausalLM", {"num_experts_per_tok": 1, "attention_chunk_size": 7}),
    ("Llama4ForCausalLM", {"attention_bias": True, "use_qk_norm": False, "moe_layers": [0, 1]}),
    ("Llama4ForCausalLM", {"attn_temperature_tuning": False, "attention_chunk_size": None}),
    (
        "Llama4ForCausalLM",
        {
            "num_hidden_layers": 3,
            "no_rope_layers": [],
            "no_rope_layer_interval": 2,
            "layer_types": ["full_attention", "chunked_attention", "chunked_attention"],
            "interleave_moe_layer_step": 1,
            "tie_word_embeddings": True,
        },
    ),
    ("Llama4ForCausalLM", {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}),
    ("MiniMaxM2ForCausalLM", {"rotary_dim": None, "num_experts_per_tok": 5}),
    ("MiniMaxM2ForCausalLM", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("MiniMaxM2ForCausalLM", {"rotary_dim": 4, "partial_rotary_factor": 0.75}),
    ("Glm4ForCausalLM", {"rope_parameters": {"rope_theta": 77.0, "partial_rotary_factor": 0.25}}),
]

YARN: dict[str, Any] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
# Every scaling, in the old form (beside rope_theta) and in the new one.
ROPES: list[dict[str, Any]] = [
    {"rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_scaling": LLAMA3, "rope_theta": 500_000.0},
    {"rope_scaling": YARN},
    {"rope_scaling": YARN | {"beta_fast": 16, "beta_slow": 2}},
    {"rope_scaling": YARN | {"truncate": False}},
    {"rope_scaling": YARN | {"attention_factor": 0.75}},
    {"rope_scaling": YARN | {"mscale": 0.8, "mscale_all_dim": 0.5}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "max_position_embeddings": 64},
    {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
    {"rope_theta": None, "rope_parameters": LLAMA3 | {"rope_theta": 500.0}},
    {"rope_theta": None, "rope_parameters": YARN | {"rope_theta": 1e6}},
]


def label(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("family", "over"), CASES, ids=label)
def test_logits_agree(tmp_path: Path, family: str, over: dict[str, Any]) -> None:
    check(tmp_path, family, over)


@pytest.mark.parametrize("over", ROPES, ids=label)
def test_rope_scaling_agrees(tmp_path: Path, over: dict[str, Any]) -> None:
    check(tmp_path, "LlamaForCausalLM", {"head_dim": 32} | over)


def test_attn_factor_multiplies_what_yarn_derives(tmp_path: Path) -> None:
    """transformers has a key for the product only."""
    tokens = some_tokens(90)
    given = YARN | {"attention_factor": 0.75 * (0.1 * math.log(YARN["factor"]) + 1)}
    write_tiny_model(tmp_path / "ours", seed=3, rope_scaling=YARN | {"attn_factor": 0.75})
    write_tiny_model(tmp_path / "theirs", seed=3, rope_scaling=given)
    ours = all_logits(load(tmp_path / "ours"), tokens)
    theirs = reference_logits(tmp_path / "theirs", tokens)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def test_scaled_partial_interleaved_rope_agrees(tmp_path: Path) -> None:
    check(tmp_path, "GlmForCausalLM", {"rope_scaling": YARN})


def check(path: Path, family: str, over: dict[str, Any]) -> None:
    write_tiny_model(path, family, seed=3, **over)
    tokens = some_tokens(90)
    ours, theirs = all_logits(load(path), tokens), reference_logits(path, tokens)
    assert theirs.std() > 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def test_dynamic_rope_agrees_at_the_configured_length(tmp_path: Path) -> None:
    """transformers scales for the sequence it sees; we, for the configured model length."""
    over = {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 32}
    write_tiny_model(tmp_path, "LlamaForCausalLM", seed=3, **over)
    tokens = some_tokens(90)
    theirs = reference_logits(tmp_path, tokens)
    ours = all_logits(load(tmp_path, max_model_len=90), tokens)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
    assert (all_logits(load(tmp_path), tokens) - theirs).abs().max() > 1e-3
    # Within the trained length nothing is scaled.
    ours = all_logits(load(tmp_path, max_model_len=32), tokens[:32])
    theirs = reference_logits(tmp_path, tokens[:32])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def test_longrope_agrees_up_to_the_original_length(tmp_path: Path) -> None:
    """transformers chooses factors by the sequence that it sees; we, by the model's length."""
    over = {"original_max_position_embeddings": 128}
    write_tiny_model(tmp_path, "Phi3ForCausalLM", seed=3, **over)
    tokens = some_tokens(90)
    theirs = reference_logits(tmp_path, tokens)
    ours = all_logits(load(tmp_path, max_model_len=128), tokens)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
    assert (all_logits(load(tmp_path, max_model_len=129), tokens) - theirs).abs().max() > 1e-3


@pytest.mark.parametrize("family", HF_FAMILIES)
def test_a_checkpoint_that_transformers_saved(tmp_path: Path, family: str) -> None:
    """In transformers' own config format, in several files."""
    write_tiny_model(tmp_path / "ours", family)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    # Models for images and text are saved as text models.
    assert read_arch(tmp_path / "theirs") == replace(read_arch(tmp_path / "ours"), vision=None)
    tokens = some_tokens(40)
    ours = all_logits(load(tmp_path / "theirs"), tokens)
    theirs = reference_logits(tmp_path / "theirs", tokens)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


IMAGES = [
    name
    for name in FAMILIES
    if tiny_config(name).get("vision_config") and not name.startswith("KimiK25")
]


@pytest.mark.parametrize("family", IMAGES)
def test_the_text_part_of_a_model_for_images(tmp_path: Path, family: str) -> None:
    """By the names of transformers' whole model."""
    model = save_reference(tmp_path, family)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert "vision_config" in stored and stored["architectures"] == [family]
    names = load_file(tmp_path / "model.safetensors").keys()
    assert any("visual." in name or "vision_tower." in name for name in names)
    tokens = some_tokens(40)
    with torch.no_grad():
        theirs = model(input_ids=tokens[None]).logits[0]
    assert theirs.std() > 0.1
    ours = all_logits(load(tmp_path), tokens)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2 * TOLERANCE)


@pytest.mark.parametrize("family", ["GPT2LMHeadModel", "GPTNeoXForCausalLM"])
def test_checkpoints_of_old(tmp_path: Path, family: str) -> None:
    """GPT-2's names had no common beginning, and causal masks were among the weights."""
    write_tiny_model(tmp_path, family)
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
    for i in range(2):
        attention = (
            f"h.{i}.attn." if family.startswith("GPT2") else f"gpt_neox.layers.{i}.attention."
        )
        tensors[f"{attention}bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
        tensors[f"{attention}masked_bias"] = torch.tensor(-1e9)
    save_file(tensors, file, metadata={"format": "pt"})
    tokens = some_tokens(40)
    ours, theirs = all_logits(load(tmp_path), tokens), reference_logits(tmp_path, tokens)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 16,
}


@pytest.mark.parametrize(
    ("family", "over"),
    [
        ("Gemma3ForConditionalGeneration", {"mm_tokens_per_image": 4, "image_token_index": 383}),
        ("Mistral3ForConditionalGeneration", {"image_token_index": 383}),
        (
            "Mistral3ForConditionalGeneration",
            {
                "image_token_index": 383,
                "text_config": tiny_config("MistralForCausalLM", head_dim=32, sliding_window=None),
            },
        ),
    ],
    ids=["gemma3", "ministral3", "mistral"],
)
def test_the_text_part_of_gemma3_and_mistral3(
    tmp_path: Path, family: str, over: dict[str, Any]
) -> None:
    """By the names of transformers' whole model, and by those of published files."""
    kind = "pixtral" if family.startswith("Mistral3") else "siglip_vision_model"
    config = tiny_config(family) | {"vision_config": SIGLIP | {"model_type": kind}} | over
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(
        transformers.AutoConfig.for_model(**config)
    ).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    names = load_file(file)
    assert any("vision_tower." in name for name in names)
    tokens = some_tokens(40)
    with torch.no_grad():
        theirs = model(input_ids=tokens[None]).logits[0]
    assert theirs.std() > 0.1
    torch.testing.assert_close(all_logits(load(tmp_path), tokens), theirs, rtol=0, atol=TOLERANCE)
    is_new = any(name.startswith("model.language_model.") for name in names)
    one, other = "model.language_model.", "language_model.model."
    if not is_new:
        one, other = other, one
    state = {
        name.replace(one, other).replace(
            *(
                ("lm_head", "language_model.lm_head")
                if is_new
                else ("language_model.lm_head", "lm_head")
            )
        ): tensor
        for name, tensor in names.items()
    }
    save_file(state, file)
    torch.testing.assert_close(all_logits(load(tmp_path), tokens), theirs, rtol=0, atol=TOLERANCE)


def test_kimi_k25_as_published_is_kimi_k2(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "k2", "KimiK2ForCausalLM", seed=3)
    write_tiny_model(tmp_path / "k25", "KimiK25ForConditionalGeneration", seed=3)
    tokens = some_tokens(40)
    assert torch.equal(
        all_logits(load(tmp_path / "k25"), tokens), all_logits(load(tmp_path / "k2"), tokens)
    )


def to_chatglm(state: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """A GlmForCausalLM's weights by the names, and in the layout, of ChatGLM's own code."""
    out = {
        "transformer.embedding.word_embeddings.weight": state["model.embed_tokens.weight"],
        "transformer.encoder.final_layernorm.weight": state["model.norm.weight"],
        "transformer.output_layer.weight": state["lm_head.weight"],
        "transformer.rotary_pos_emb.inv_freq": torch.ones(4),
    }
    for i in range(num_layers):
        old, new = f"model.layers.{i}.", f"transformer.encoder.layers.{i}."
        for leaf in ("weight", "bias"):
            parts = [state[f"{old}self_attn.{p}_proj.{leaf}"] for p in "qkv"]
            out[f"{new}self_attention.query_key_value.{leaf}"] = torch.cat(parts)
        out[f"{new}self_attention.dense.weight"] = state[f"{old}self_attn.o_proj.weight"]
        out[f"{new}mlp.dense_h_to_4h.weight"] = state[f"{old}mlp.gate_up_proj.weight"]
        out[f"{new}mlp.dense_4h_to_h.weight"] = state[f"{old}mlp.down_proj.weight"]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            out[f"{new}{norm}.weight"] = state[f"{old}{norm}.weight"]
    return {name: tensor.contiguous() for name, tensor in out.items()}


@pytest.mark.parametrize("architecture", ["ChatGLMModel", "ChatGLMForConditionalGeneration"])
@pytest.mark.parametrize("rope_ratio", [1, 50, 500.0])
def test_chatglm_agrees_with_glm(tmp_path: Path, architecture: str, rope_ratio: float) -> None:
    glm, chatglm = tmp_path / "glm", tmp_path / "chatglm"
    write_tiny_model(glm, "GlmForCausalLM", rope_theta=10_000.0 * rope_ratio)
    write_tiny_model(chatglm, architecture, rope_ratio=rope_ratio)
    state = to_chatglm(load_file(glm / "model.safetensors"), num_layers=2)
    save_file(state, chatglm / "model.safetensors")
    tokens = some_tokens(70)
    ours, theirs = all_logits(load(chatglm), tokens), reference_logits(glm, tokens)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def test_llama4_with_vision_answers_as_its_language_model(tmp_path: Path) -> None:
    """From transformers' checkpoint of the whole model."""
    text = tiny_config("Llama4ForCausalLM", attention_chunk_size=7)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vision_output_dim": 16,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Llama4Config(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    whole = transformers.Llama4ForConditionalGeneration(config).eval()
    for weight in whole.parameters():
        torch.nn.init.normal_(weight, 0, 0.3)
    whole.save_pretrained(tmp_path)
    tokens = some_tokens(40)
    with torch.no_grad():
        theirs = whole.language_model(input_ids=tokens[None], use_cache=False).logits[0]
    assert theirs.std() > 0.5
    torch.testing.assert_close(
        all_logits(load(tmp_path), tokens), theirs, rtol=1e-5, atol=TOLERANCE
    )


def test_half_precision_follows(tmp_path: Path) -> None:
    """bfloat16 is coarse (3 decimal digits): it must come near, which float errors would not."""
    from loaded import load_model

    write_tiny_model(tmp_path, "Qwen3ForCausalLM", dtype="bfloat16")
    tokens = some_tokens(40)
    decoder = load_model(
        tmp_path,
        read_arch(tmp_path),
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        max_model_len=64,
    )
    difference = all_logits(decoder, tokens) - all_logits(load(tmp_path), tokens)
    assert difference.abs().mean() < 0.1
