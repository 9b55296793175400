"""A tiny config.json for every supported family, for tests and demos.

This module knows configs only; model/tiny.py writes the checkpoints.
"""

from __future__ import annotations

from typing import Any

from gllm_engine.arch.families.registry import FAMILIES
from gllm_engine.arch.fields import ArchError

_LAYER_NORM = {  # whose epsilon has different names
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
_HF = _LAYER_NORM | {"rms_norm_eps": 1e-5}
_SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 1}  # whose defaults exceed the vocabulary
_PADDED = _HF | _SPECIAL_IDS
_SLIDING = {
    "sliding_window": 48,
    "layer_types": ["sliding_attention", "full_attention"],
}
_LOCAL_EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
_QWEN_MOE = _HF | {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_HYBRID = _HF | {
    "head_dim": 32,
    "partial_rotary_factor": 0.25,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_HYBRID_MOE = _HYBRID | {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}
_QWEN3_5 = {"rope_parameters": {"mrope_section": [2, 1, 1], "mrope_interleaved": True}}
_VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
}
_VISION_3 = _VISION | {"num_position_embeddings": 36}
_VISION_OTHERS = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "patch_size": 4,
}
# The tokens that model/tiny.py has for these.
_PLACEHOLDERS = {
    "vision_start_token_id": 3,
    "image_token_id": 4,
    "vision_end_token_id": 5,
    "video_token_id": 6,
}
_QWEN3_VL = {"rope_parameters": {"mrope_section": [8, 4, 4], "mrope_interleaved": True}}
_GLM = _HF | {
    "pad_token_id": 0,
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
}
_SPARSE = _HF | {
    "pad_token_id": 0,
    "moe_intermediate_size": 32,
}
_ROUTED = _SPARSE | {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
}
_DEEPSEEK = _ROUTED | {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 12,
}
_SPARSE_ATTENTION = _DEEPSEEK | {
    "index_n_heads": 16,
    "index_head_dim": 24,
    "index_topk": 12,
}
_KIMI = _DEEPSEEK | {
    "model_type": "deepseek_v3",  # as transformers knows it; checkpoints say "kimi_k2"
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}
_KIMI_K25 = {
    "model_type": "kimi_k25",
    "image_token_id": 4,
    "projection_hidden_size": 32,
    "vision_config": _VISION_OTHERS | {"pos_emb_height": 6, "pos_emb_width": 6},
    "text_config": _KIMI,
}
_HUNYUAN = _HF | {
    "head_dim": 16,
    "rope_scaling": {"type": "dynamic", "alpha": 50.0, "factor": 1.0},
}
_GEMMA = (
    _PADDED
    | _SLIDING
    | {
        "head_dim": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 24,
        "tie_word_embeddings": True,
    }
)
_GEMMA3 = _GEMMA | {
    "model_type": "gemma3_text",
    "rope_local_base_freq": 100.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
_MINISTRAL3 = _PADDED | {
    "model_type": "ministral3",
    "head_dim": 32,
    "rope_theta": None,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 64.0,
        "original_max_position_embeddings": 32,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
}
_GPT2 = {
    "vocab_size": 384,
    "n_positions": 2048,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 96,
    "activation_function": "gelu_new",
    "tie_word_embeddings": False,
}
_CHATGLM = {
    "model_type": "chatglm",
    "padded_vocab_size": 384,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "seq_length": 2048,
    "layernorm_epsilon": 1e-5,
    "rope_ratio": 50,
    "add_qkv_bias": True,
    "add_bias_linear": False,
    "rmsnorm": True,
    "post_layer_norm": True,
    "original_rope": True,
    "tie_word_embeddings": False,
}
_GRANITE = _HF | {
    "embedding_multiplier": 1.5,
    "residual_multiplier": 0.75,
    "attention_multiplier": 0.125,
    "logits_scaling": 0.5,
}
_LLAMA4 = (
    _PADDED
    | _LOCAL_EXPERTS
    | {
        "model_type": "llama4_text",
        "head_dim": 16,
        "intermediate_size": 32,
        "intermediate_size_mlp": 96,
        "interleave_moe_layer_step": 2,
        "no_rope_layers": [1, 0],
        "attention_chunk_size": 48,
        "floor_scale": 16,
        "attn_scale": 0.5,
    }
)

_CONFIGS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": _HF | {"model_type": "llama"},
    "MistralForCausalLM": _HF | {"model_type": "mistral", "sliding_window": 48},
    "Qwen2ForCausalLM": _HF | {"model_type": "qwen2", "tie_word_embeddings": True},
    "Qwen3ForCausalLM": _HF | {"model_type": "qwen3", "head_dim": 32},
    "MixtralForCausalLM": _HF | _LOCAL_EXPERTS | {"model_type": "mixtral"},
    "Qwen2MoeForCausalLM": _QWEN_MOE
    | {
        "model_type": "qwen2_moe",
        "norm_topk_prob": False,
        "shared_expert_intermediate_size": 48,
        "decoder_sparse_step": 2,
    },
    "Qwen3MoeForCausalLM": _QWEN_MOE | {"model_type": "qwen3_moe", "head_dim": 32},
    "Qwen3NextForCausalLM": _HYBRID_MOE | {"model_type": "qwen3_next", "norm_topk_prob": True},
    "Qwen3_5ForCausalLM": _HYBRID | _QWEN3_5 | {"model_type": "qwen3_5_text"},
    "Qwen3_5ForConditionalGeneration": _PLACEHOLDERS
    | {
        "model_type": "qwen3_5",
        "vision_config": _VISION_3 | {"model_type": "qwen3_5"},
        "text_config": _HYBRID
        | _QWEN3_5
        | {"model_type": "qwen3_5_text", "tie_word_embeddings": True},
    },
    "Qwen3_5MoeForCausalLM": _HYBRID_MOE | _QWEN3_5 | {"model_type": "qwen3_5_moe_text"},
    "Qwen3_5MoeForConditionalGeneration": _PLACEHOLDERS
    | {
        "model_type": "qwen3_5_moe",
        "vision_config": _VISION_3 | {"model_type": "qwen3_5_moe"},
        "text_config": _HYBRID_MOE | _QWEN3_5 | {"model_type": "qwen3_5_moe_text"},
    },
    "Qwen2_5_VLForConditionalGeneration": _PLACEHOLDERS
    | {
        "model_type": "qwen2_5_vl",
        "vision_config": _VISION
        | {"model_type": "qwen2_5_vl", "window_size": 24, "fullatt_block_indexes": [1]},
        "text_config": _HF
        | {
            "model_type": "qwen2_5_vl_text",
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2]},
        },
    },
    "Qwen3VLForConditionalGeneration": _PLACEHOLDERS
    | {
        "model_type": "qwen3_vl",
        "vision_config": _VISION_3 | {"model_type": "qwen3_vl", "deepstack_visual_indexes": [0, 2]},
        "text_config": _HF
        | _QWEN3_VL
        | {"model_type": "qwen3_vl_text", "head_dim": 32, "num_hidden_layers": 3},
    },
    "Qwen3VLMoeForConditionalGeneration": _PLACEHOLDERS
    | {
        "model_type": "qwen3_vl_moe",
        "vision_config": _VISION_3
        | {"model_type": "qwen3_vl_moe", "deepstack_visual_indexes": [1]},
        "text_config": _QWEN_MOE | _QWEN3_VL | {"model_type": "qwen3_vl_moe_text", "head_dim": 32},
    },
    "GlmForCausalLM": _GLM | {"model_type": "glm"},
    "Glm4ForCausalLM": _GLM | {"model_type": "glm4"},
    "Glm4MoeForCausalLM": _ROUTED
    | {
        "model_type": "glm4_moe",
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
        "use_qk_norm": True,
    },
    "Ernie4_5_MoeForCausalLM": _SPARSE
    | {
        "model_type": "ernie4_5_moe",
        "use_bias": False,
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
    },
    "DeepseekV2ForCausalLM": _DEEPSEEK
    | {
        "model_type": "deepseek_v2",
        "topk_method": "group_limited_greedy",
        "num_experts_per_tok": 3,  # the best two are always in the best two groups
        "norm_topk_prob": False,
        "num_nextn_predict_layers": 0,
    },
    "DeepseekV3ForCausalLM": _DEEPSEEK | {"model_type": "deepseek_v3"},
    "KimiK2ForCausalLM": _KIMI,
    "KimiK25ForConditionalGeneration": _KIMI_K25,
    "Kimi_K25ForConditionalGeneration": _KIMI_K25,
    "Glm4MoeLiteForCausalLM": _DEEPSEEK | {"model_type": "glm4_moe_lite", "v_head_dim": 20},
    "DeepseekV32ForCausalLM": _SPARSE_ATTENTION | {"model_type": "deepseek_v32"},
    "GlmMoeDsaForCausalLM": _SPARSE_ATTENTION | {"model_type": "glm_moe_dsa", "v_head_dim": 20},
    "Olmo2ForCausalLM": _HF | {"model_type": "olmo2"},
    "Olmo3ForCausalLM": _HF | _SLIDING | {"model_type": "olmo3", "rope_theta": 500_000.0},
    "SmolLM3ForCausalLM": _PADDED | {"model_type": "smollm3", "no_rope_layers": [1, 0]},
    "GraniteForCausalLM": _GRANITE | {"model_type": "granite"},
    "GraniteMoeForCausalLM": _GRANITE | _LOCAL_EXPERTS | {"model_type": "granitemoe"},
    "GraniteMoeHybridForCausalLM": _GRANITE
    | {
        "model_type": "granitemoehybrid",
        "shared_intermediate_size": 80,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "position_embedding_type": "rope",
        "layer_types": ["attention"] * 2,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
    },
    "HunYuanDenseV1ForCausalLM": _HUNYUAN | {"model_type": "hunyuan_v1_dense"},
    "HunYuanMoEV1ForCausalLM": _HUNYUAN
    | {"model_type": "hunyuan_v1_moe", "num_experts": 8, "moe_topk": 2},
    "Ernie4_5ForCausalLM": _HF | {"model_type": "ernie4_5", "head_dim": 16, "use_bias": True},
    "Ernie4_5_ForCausalLM": _HF | {"model_type": "ernie4_5", "head_dim": 16},
    "Phi3ForCausalLM": _PADDED
    | {
        "model_type": "phi3",
        "sliding_window": 48,
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 32,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.3, 1.5],
            "long_factor": [1.0, 2.0, 5.0, 9.0],
        },
    },
    "Ministral3ForCausalLM": _MINISTRAL3,
    "Mistral3ForConditionalGeneration": {
        "model_type": "mistral3",
        "image_token_index": 4,
        "vision_config": _VISION_OTHERS | {"model_type": "pixtral", "hidden_act": "silu"},
        "text_config": _MINISTRAL3,
    },
    "LlavaForConditionalGeneration": {
        "model_type": "llava",
        "image_token_index": 4,
        "image_seq_length": 36,
        "vision_config": _VISION_OTHERS | {"model_type": "clip_vision_model", "image_size": 24},
        "text_config": _PADDED | {"model_type": "llama"},
    },
    "Gemma2ForCausalLM": _GEMMA
    | {
        "model_type": "gemma2",
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3ForConditionalGeneration": {"model_type": "gemma3", "text_config": _GEMMA3},
    "Cohere2ForCausalLM": _LAYER_NORM
    | _SPECIAL_IDS
    | _SLIDING
    | {
        "model_type": "cohere2",
        "layer_norm_eps": 1e-5,
        "head_dim": 16,
        "logit_scale": 0.5,
    },
    "Starcoder2ForCausalLM": _LAYER_NORM
    | {
        "model_type": "starcoder2",
        "hidden_act": "gelu_pytorch_tanh",
        "norm_epsilon": 1e-5,
        "sliding_window": 48,
    },
    "GPT2LMHeadModel": _GPT2 | {"model_type": "gpt2"},
    "GPTBigCodeForCausalLM": _GPT2
    | {"model_type": "gpt_bigcode", "activation_function": "gelu_pytorch_tanh"},
    "GPTNeoXForCausalLM": {
        "model_type": "gpt_neox",
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.5,
        "rotary_emb_base": 10_000,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
    },
    "GptOssForCausalLM": _PADDED
    | _LOCAL_EXPERTS
    | _SLIDING
    | {
        "model_type": "gpt_oss",
        "head_dim": 16,
        "intermediate_size": 32,
        "swiglu_limit": 2.0,
        "swiglu_alpha": 1.5,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
    },
    "Llama4ForCausalLM": _LLAMA4,
    "Llama4ForConditionalGeneration": {"model_type": "llama4", "text_config": _LLAMA4},
    "MiniMaxM2ForCausalLM": _PADDED
    | _LOCAL_EXPERTS
    | {
        "model_type": "minimax_m2",
        "head_dim": 16,
        "intermediate_size": 32,
        "rotary_dim": 8,
        "num_mtp_modules": 1,
    },
    "ChatGLMModel": _CHATGLM,
    "ChatGLMForConditionalGeneration": _CHATGLM,
}


def tiny_config(family: str, **over: Any) -> dict[str, Any]:
    """The config.json of a tiny model of `family` (an architecture name). `over`: keys to override,
    in the description of the text model if that is an object of its own.

    Raises ArchError for a family that is not supported.
    """
    if family not in _CONFIGS:
        raise ArchError(f"family {family!r} is not supported; supported are {', '.join(FAMILIES)}")
    config = _CONFIGS[family] | {"architectures": [family]}
    text = {"eos_token_id": 2} | over
    key = FAMILIES[family].text_key
    if key is None:
        return config | text
    text = config[key] | text
    own = config.get("vision_config", {})
    if "out_hidden_size" in own:
        config["vision_config"] = own | {"out_hidden_size": text["hidden_size"]}
    return config | {key: text}
