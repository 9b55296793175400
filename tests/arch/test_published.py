"""Published models are read as published: no key is refused or unknown, and the sizes are right."""

from __future__ import annotations

from typing import Any

import pytest
from published import PUBLISHED

from gllm_engine.arch import FAMILIES, ArchError, make_arch
from gllm_engine.arch.tiny import tiny_config

# Billions of parameters of the text model, with its vision tower if that is read; its length in
# tokens with RoPE scaling.
SIZES = {
    "DeepSeek-V2-Lite": (15.71, 163840, "plain"),
    "DeepSeek-V2": (235.74, 163840, "plain"),
    "DeepSeek-V3": (671.03, 163840, "FP8 in blocks of 128 x 128"),
    "DeepSeek-V3.1": (671.03, 163840, "FP8 in blocks of 128 x 128"),
    "DeepSeek-V3.2": (671.88, 163840, "FP8 in blocks of 128 x 128"),
    "Moonlight": (15.96, 8192, "plain"),
    "Kimi-K2": (1026.41, 131072, "FP8 in blocks of 128 x 128"),
    "Kimi-K2-Thinking": (1026.41, 262144, "INT4 with a scale per 32 columns"),
    "Kimi-K2.5": (1026.88, 262144, "INT4 with a scale per 32 columns"),
    "GLM-4.5": (352.8, 131072, "plain"),
    "GLM-4.5-Air-FP8": (106.85, 131072, "FP8 with a scale per row"),
    "GLM-4.6": (352.8, 202752, "plain"),
    "GLM-4.7-Flash": (29.94, 202752, "plain"),
    "GLM-5": (743.91, 202752, "plain"),
    "GLM-5.2": (743.38, 1048576, "plain"),
    "GLM-5-FP8": (743.91, 202752, "FP8 in blocks of 128 x 128"),
    "MiniMax-M2": (228.69, 196608, "FP8 in blocks of 128 x 128"),
    "Qwen3-Next": (79.67, 262144, "plain"),
    "Qwen3-Next-FP8": (79.67, 262144, "FP8 in blocks of 128 x 128"),
    "Qwen2.5-VL-7B": (8.29, 128000, "plain"),
    "Qwen2.5-VL-3B": (3.75, 128000, "plain"),
    "Qwen3-VL-8B": (8.77, 262144, "plain"),
    "Qwen3-VL-30B-A3B": (31.07, 262144, "plain"),
    "Qwen3.5-27B": (27.36, 262144, "plain"),
    "Qwen3.5-35B-A3B": (35.11, 262144, "plain"),
    "Qwen3.5-35B-A3B-FP8": (35.11, 262144, "FP8 in blocks of 128 x 128"),
    "gpt-oss-20b": (20.91, 131072, "MXFP4 with a scale per 32 columns"),
    "gpt-oss-120b": (116.83, 131072, "MXFP4 with a scale per 32 columns"),
    "gemma-2-9b": (9.24, 8192, "plain"),
    "gemma-2-27b": (27.23, 8192, "plain"),
    "gemma-3-1b-it": (1.0, 32768, "plain"),
    "gemma-3-270m": (0.27, 32768, "plain"),
    "gemma-3-4b-it": (3.88, 131072, "plain"),
    "gemma-3-27b-it": (27.01, 131072, "plain"),
    "Phi-3-mini-128k": (3.82, 131072, "plain"),
    "Phi-4-mini": (3.84, 131072, "plain"),
    "phi-4": (14.66, 16384, "plain"),
    "Llama-4-Scout": (107.77, 10485760, "plain"),
    "Mistral-Small-24B-2501": (23.57, 32768, "plain"),
    "llava-1.5-7b": (7.05, 4096, "plain"),
    "Mistral-Small-3.2": (24.01, 131072, "plain"),
    "Ministral-3-8B": (8.92, 262144, "FP8 with one scale"),
    "Ministral-3-3B": (3.85, 262144, "FP8 with one scale"),
    "Devstral-2-123B": (125.03, 262144, "FP8 with one scale"),
    "OLMo-2-7B": (7.3, 4096, "plain"),
    "Olmo-3-7B": (7.3, 65536, "plain"),
    "granite-3.3-8b": (8.17, 131072, "plain"),
    "granite-3.1-3b-a800m": (3.3, 131072, "plain"),
    "granite-4.0-micro": (3.4, 131072, "plain"),
    "SmolLM3-3B": (3.08, 65536, "plain"),
    "ERNIE-4.5-0.3B": (0.36, 131072, "plain"),
    "ERNIE-4.5-21B-A3B": (21.83, 131072, "plain"),
    "ERNIE-4.5-300B": (299.48, 131072, "plain"),
    "Hunyuan-7B": (7.5, 32768, "plain"),
    "Hunyuan-A13B": (80.39, 32768, "plain"),
    "command-r7b": (8.03, 8192, "plain"),
    "gpt2": (0.12, 1024, "plain"),
    "gpt2-medium": (0.35, 1024, "plain"),
    "pythia-6.9b": (6.86, 2048, "plain"),
    "gpt-neox-20b": (20.55, 2048, "plain"),
    "Llama-3.1-8B": (8.03, 131072, "plain"),
    "Llama-3.1-8B-FP8-CT-static": (8.03, 131072, "FP8 with one scale"),
    "Llama-3.1-8B-FP8-KV": (8.03, 131072, "FP8 with one scale"),
    "Llama-3.1-8B-nvidia-FP8": (8.03, 131072, "FP8 with one scale"),
    "Llama-3.1-8B-nvidia-FP8-old": (8.03, 131072, "FP8 with one scale"),
    "Llama-3.1-AWQ": (8.03, 131072, "AWQ INT4 with a scale and a zero point per 128 columns"),
    "Llama-3.1-GPTQ": (
        8.03,
        131072,
        "GPTQ INT4 with a scale per 128 columns, in groups of any columns, held plain",
    ),
    "Qwen2.5-7B-GPTQ-Int4": (7.62, 32768, "GPTQ INT4 with a scale per 128 columns"),
    "Qwen2.5-7B-AWQ": (7.62, 32768, "AWQ INT4 with a scale and a zero point per 128 columns"),
    "Qwen3-30B-A3B-FP8": (30.53, 40960, "FP8 in blocks of 128 x 128"),
    "Qwen3-30B-A3B-GPTQ": (30.53, 40960, "GPTQ INT4 with a scale per 128 columns"),
    "Qwen3-8B": (8.19, 40960, "plain"),
    "Mixtral-8x7B": (46.7, 32768, "plain"),
    "starcoder2-7b": (7.17, 16384, "plain"),
    "starcoder": (15.52, 8192, "plain"),
    "glm-4-9b-chat": (9.4, 131072, "plain"),
    "GLM-4-32B-0414": (32.57, 32768, "plain"),
    "DeepSeek-R1-AWQ": (671.03, 163840, "AWQ INT4 with a scale and a zero point per 128 columns"),
    "Qwen3-8B-FP8-dynamic": (8.19, 40960, "FP8 with a scale per row"),
    "Qwen3-8B-W4A16": (8.19, 40960, "INT4 with a scale per 128 columns"),
    "Qwen3-8B-W8A8-FP8-block-CT": (8.19, 40960, "FP8 in blocks of 128 x 128"),
    "Qwen3-Coder-480B": (480.15, 262144, "plain"),
    "Qwen3-235B-A22B": (235.09, 40960, "plain"),
    "Llama-3.1-405B-FP8": (405.85, 131072, "FP8 with a scale per row"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_read(name: str) -> None:
    model = make_arch(PUBLISHED[name])
    assert model.unknown_keys == ()
    billions, length, stored = SIZES[name]
    assert round(model.num_params() / 1e9, 2) == billions
    assert model.max_len == length
    assert (" and ".join(map(str, model.quantization)) or "plain") == stored


# A published model, and a value of one of its keys that changes its arithmetic.
CHANGED = {
    "another norm of heads": ("Qwen3-Coder-480B", {"use_qk_norm": False}),
    "compressed positions": ("ERNIE-4.5-21B-A3B", {"compression_ratio": 2.0}),
    "scaled scores": ("ERNIE-4.5-21B-A3B", {"scale_qk_coeff": 2.0}),
    "no bias of the choice": ("ERNIE-4.5-21B-A3B", {"moe_use_aux_free": False}),
    "shared keys and values": ("Hunyuan-7B", {"use_cla": True}),
    "heads of another width": ("Hunyuan-7B", {"attention_head_dim": 64}),
    "experts": ("Hunyuan-7B", {"num_experts": 8}),
    "shared keys and values beside experts": ("Hunyuan-A13B", {"use_cla": True}),
    "another norm": ("Hunyuan-A13B", {"norm_type": "layer"}),
    "weights without a sum of 1": ("Hunyuan-A13B", {"norm_topk_prob": False}),
    "groups of experts": ("Hunyuan-A13B", {"group_limited_greedy": True}),
    "dense layers first": ("Hunyuan-A13B", {"moe_layer_num_skipped": 1}),
    "experts' widths of other layers": ("Hunyuan-A13B", {"moe_intermediate_size": [3072] * 31}),
    "no experts in a layer": ("Hunyuan-A13B", {"moe_topk": [8] * 31 + [0]}),
    "more experts than there are": ("Hunyuan-A13B", {"moe_topk": [8] * 31 + [65]}),
    "another order of layers": ("command-r7b", {"order_of_interleaved_layers": "global_first"}),
    "another number of layers": ("command-r7b", {"layer_switch": 2}),
    "scaled streams": ("MiniMax-M2", {"layernorm_mlp_beta": 2.0}),
    "linear attention": ("MiniMax-M2", {"attn_type_list": [0] * 62}),
    "Mamba layers": ("granite-4.0-micro", {"layer_types": ["mamba"] + ["attention"] * 39}),
    "all layers of Mamba": ("granite-4.0-micro", {"layer_types": None}),
    "experts beside": ("granite-4.0-micro", {"num_local_experts": 64}),
    "interpolated": ("Phi-4-mini", {"interpolate_factor": 2}),
    "windows in some layers": (
        "Mistral-Small-24B-2501",
        {"layer_types": ["sliding_attention"] * 40},
    ),
    "no causal mask": ("Qwen3-8B", {"is_causal": False}),
    "scores that are not scaled": ("Qwen3-8B", {"normalize_attention_scores": False}),
    "no causal mask of all": ("Kimi-K2.5", {"is_causal": False}),
    "another width": ("Kimi-K2.5", {"projection_hidden_size": 1024}),
    "other experts": ("GLM-5", {"num_experts": 128}),
    "unscaled scores": ("starcoder2-7b", {"scale_attn_weights": False}),
}


@pytest.mark.parametrize(("name", "change"), CHANGED.values(), ids=CHANGED.keys())
def test_a_key_that_changes_the_arithmetic_is_read(name: str, change: dict[str, object]) -> None:
    (key,) = change
    with pytest.raises(ArchError, match=rf"^config\.json: {key} is "):
        make_arch(PUBLISHED[name] | change)


@pytest.mark.parametrize("config", [*PUBLISHED.values(), *map(tiny_config, FAMILIES)])
def test_what_is_off_leaves_no_key_unread(config: dict[str, Any]) -> None:
    """A reader asks for each key, also for those that only matter beside another one."""
    parts = [key for key in ("text_config", "vision_config") if config.get(key)]
    for key in [None, *parts]:
        part = config if key is None else config[key]
        for name in part:
            for off in (None, False, 0):
                changed = part | {name: off}
                try:
                    model = make_arch(changed if key is None else config | {key: changed})
                except ArchError:
                    continue
                assert model.unknown_keys == (), (key, name, off)


def test_configs_as_other_versions_write_them() -> None:
    llama = tiny_config("Llama4ForCausalLM")
    untuned = llama | {"attn_temperature_tuning": False}
    left_over = untuned | {"attn_scale": 0, "floor_scale": None}
    assert make_arch(left_over) == make_arch(untuned) != make_arch(llama)
    rope = {"rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"}, "vocab_size": 9}
    ministral = tiny_config("Mistral3ForConditionalGeneration")
    again = ministral | {"vision_config": ministral["vision_config"] | rope}
    assert make_arch(again) == make_arch(ministral) and make_arch(again).unknown_keys == ()
    glm = tiny_config("GlmMoeDsaForCausalLM")
    kinds = ["deepseek_sparse_attention"] * glm["num_hidden_layers"]
    again = glm | {"layer_types": kinds, "num_experts": glm["n_routed_experts"]}
    assert make_arch(again) == make_arch(glm) and make_arch(again).unknown_keys == ()
