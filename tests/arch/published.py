"""The config.json of published models, as far as it is known, to read without a checkpoint.

Vision models are cut short: nobody reads them.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]


def without(config: Config, *keys: str) -> Config:
    return {key: value for key, value in config.items() if key not in keys}


def hybrid(num_layers: int) -> list[str]:
    every = ["linear_attention"] * 3 + ["full_attention"]
    return every * (num_layers // 4)


PUBLISHED: dict[str, Config] = {}
# fmt: off
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
    "weight_block_size": [128, 128]}
YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096, "type": "yarn"}
PUBLISHED["DeepSeek-V2-Lite"] = {"architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False, "attention_dropout": 0.0, "auto_map":
    {"AutoConfig": "configuration_deepseek.DeepseekV2Config"}, "aux_loss_alpha": 0.001,
    "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v2", "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1,
    "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False,
    "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
    "num_key_value_heads": 16, "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_scaling": YARN | {"mscale": 0.707,
    "mscale_all_dim": 0.707}, "rope_theta": 10000, "routed_scaling_factor": 1.0,
    "scoring_func": "softmax", "seq_aux": True, "tie_word_embeddings": False, "topk_group": 1,
    "topk_method": "greedy", "torch_dtype": "bfloat16", "transformers_version": "4.33.1",
    "use_cache": True, "v_head_dim": 128, "vocab_size": 102400}
PUBLISHED["DeepSeek-V2"] = PUBLISHED["DeepSeek-V2-Lite"] | {"hidden_size": 5120,
    "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_group": 8,
    "n_routed_experts": 160, "num_attention_heads": 128, "num_hidden_layers": 60,
    "num_key_value_heads": 128, "q_lora_rank": 1536, "routed_scaling_factor": 16.0,
    "topk_group": 3, "topk_method": "group_limited_greedy"}
PUBLISHED["DeepSeek-V3"] = {"architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "auto_map":
    {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "aux_loss_alpha": 0.001,
    "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3,
    "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "pretraining_tp": 1,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "quantization_config": FP8, "rms_norm_eps": 1e-06, "rope_scaling": YARN, "rope_theta": 10000,
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": True,
    "v_head_dim": 128, "vocab_size": 129280}
PUBLISHED["DeepSeek-V3.1"] = PUBLISHED["DeepSeek-V3"] | {"quantization_config": FP8 |
    {"scale_fmt": "ue8m0"}, "transformers_version": "4.44.2"}
PUBLISHED["DeepSeek-V3.2"] = PUBLISHED["DeepSeek-V3.1"] | {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32", "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048}
PUBLISHED["Moonlight"] = without(PUBLISHED["DeepSeek-V3"], "quantization_config") | {
    "bos_token_id": 163584, "eos_token_id": 163585, "first_k_dense_replace": 1,
    "hidden_size": 2048, "intermediate_size": 11264, "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
    "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
    "num_key_value_heads": 16, "num_nextn_predict_layers": 0, "pad_token_id": 163839,
    "q_lora_rank": None, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446, "topk_group": 1, "vocab_size": 163840}
PUBLISHED["Kimi-K2"] = PUBLISHED["DeepSeek-V3"] | {"first_k_dense_replace": 1,
    "max_position_embeddings": 131072, "model_type": "kimi_k2", "n_group": 1,
    "n_routed_experts": 384, "num_attention_heads": 64, "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0, "rope_scaling": YARN | {"beta_fast": 1.0, "beta_slow": 1.0,
    "factor": 32.0}, "rope_theta": 50000.0, "routed_scaling_factor": 2.827, "topk_group": 1,
    "vocab_size": 163840, "bos_token_id": 163584, "eos_token_id": 163585, "pad_token_id": 163839}
INT4_EXPERTS = {"config_groups": {"group_0": {"input_activations": None,
    "output_activations": None, "targets": ["Linear"], "weights": {"actorder": None,
    "block_structure": None, "dynamic": False, "group_size": 32, "num_bits": 4,
    "observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": True,
    "type": "int"}}}, "format": "pack-quantized", "ignore": ["lm_head", "re:.*self_attn.*",
    "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"], "kv_cache_scheme": None,
    "quant_method": "compressed-tensors", "quantization_status": "compressed"}
PUBLISHED["Kimi-K2-Thinking"] = PUBLISHED["Kimi-K2"] | {"max_position_embeddings": 262144,
    "rope_scaling": YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 64.0},
    "rms_norm_eps": 1e-5, "quantization_config": INT4_EXPERTS, "dtype": "bfloat16",
    "eos_token_id": 163586}
KIMI_TEXT = without(PUBLISHED["Kimi-K2-Thinking"], "quantization_config") | {"_name_or_path": "",
    "add_cross_attention": False, "bad_words_ids": None, "begin_suppress_tokens": None,
    "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None,
    "decoder_start_token_id": None, "diversity_penalty": 0.0, "do_sample": False,
    "early_stopping": False, "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None, "finetuning_task": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "id2label": {"0": "LABEL_0"}, "is_decoder": False,
    "is_encoder_decoder": False, "label2id": {"LABEL_0": 0}, "length_penalty": 1.0,
    "max_length": 20, "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1,
    "num_beams": 1, "num_return_sequences": 1, "output_attentions": False,
    "output_hidden_states": False, "output_scores": False, "prefix": None, "problem_type": None,
    "pruned_heads": {}, "remove_invalid_values": False, "repetition_penalty": 1.0,
    "return_dict": True, "return_dict_in_generate": False, "sep_token_id": None,
    "suppress_tokens": None, "task_specific_params": None, "temperature": 1.0,
    "tf_legacy_loss": False, "tie_encoder_decoder": False, "tokenizer_class": None, "top_k": 50,
    "top_p": 1.0, "torchscript": False, "typical_p": 1.0, "use_bfloat16": False}
PUBLISHED["Kimi-K2.5"] = {"architectures": ["KimiK25ForConditionalGeneration"], "auto_map": {},
    "bos_token_id": 163584, "dtype": "bfloat16", "eos_token_id": 163585, "ignore_index": -100,
    "media_placeholder_token_id": 163605, "model_type": "kimi_k25", "pad_token_id": 163839,
    "text_config": KIMI_TEXT | {"quantization_config": INT4_EXPERTS}, "tie_word_embeddings": False,
    "use_unified_vision_chunk": True, "video_placeholder": "<|kimi_k25_video_placeholder|>",
    "vision_config": {"mm_hidden_size": 1152, "text_hidden_size": 7168, "vt_hidden_size": 1152}}
PUBLISHED["GLM-4.5"] = {"architectures": ["Glm4MoeForCausalLM"], "attention_bias": True,
    "attention_dropout": 0.0, "pad_token_id": 151329, "eos_token_id": [151329, 151336, 151338],
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "partial_rotary_factor": 0.5,
    "initializer_range": 0.02, "intermediate_size": 12288, "max_position_embeddings": 131072,
    "model_type": "glm4_moe", "moe_intermediate_size": 1536, "norm_topk_prob": True,
    "num_attention_heads": 96, "n_group": 1, "topk_group": 1, "n_routed_experts": 160,
    "n_shared_experts": 1, "routed_scaling_factor": 2.5, "num_experts_per_tok": 8,
    "first_k_dense_replace": 3, "num_hidden_layers": 92, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000,
    "num_nextn_predict_layers": 1, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0", "use_cache": True, "use_qk_norm": True, "vocab_size": 151552}
PUBLISHED["GLM-4.5-Air-FP8"] = PUBLISHED["GLM-4.5"] | {"use_qk_norm": False, "hidden_size": 4096,
    "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 128,
    "routed_scaling_factor": 1.0, "first_k_dense_replace": 1, "num_hidden_layers": 46,
    "quantization_config": {"config_groups": {"group_0": {"input_activations": {"actorder": None,
    "block_structure": None, "dynamic": True, "group_size": None, "num_bits": 8, "observer": None,
    "observer_kwargs": {}, "strategy": "token", "symmetric": True, "type": "float"},
    "output_activations": None, "targets": ["Linear"], "weights": {"actorder": None,
    "block_structure": None, "dynamic": False, "group_size": None, "num_bits": 8,
    "observer": "minmax", "observer_kwargs": {}, "strategy": "channel", "symmetric": True,
    "type": "float"}}}, "format": "float-quantized", "global_compression_ratio": None,
    "ignore": ["model.layers.0.self_attn.q_proj", "lm_head"], "kv_cache_scheme": None,
    "quant_method": "compressed-tensors", "quantization_status": "compressed", "sparsity_config":
    {}, "transform_config": {}, "version": "0.10.3.dev47+ge463fe6"}}
PUBLISHED["GLM-4.6"] = PUBLISHED["GLM-4.5"] | {"max_position_embeddings": 202752,
    "pad_token_id": 151329}
PUBLISHED["GLM-4.7-Flash"] = {"architectures": ["Glm4MoeLiteForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "pad_token_id": 154820, "eos_token_id": [154820, 154827, 154829],
    "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 10240,
    "max_position_embeddings": 202752, "model_type": "glm4_moe_lite",
    "moe_intermediate_size": 1536, "topk_method": "noaux_tc", "norm_topk_prob": True,
    "num_attention_heads": 20, "n_group": 1, "topk_group": 1, "n_routed_experts": 64,
    "n_shared_experts": 1, "routed_scaling_factor": 1.8, "num_experts_per_tok": 4,
    "first_k_dense_replace": 1, "num_hidden_layers": 47, "num_key_value_heads": 20,
    "num_nextn_predict_layers": 1, "partial_rotary_factor": 1.0, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 1000000, "tie_word_embeddings": False, "dtype": "bfloat16",
    "transformers_version": "5.0.0rc0", "q_lora_rank": 768, "kv_lora_rank": 512,
    "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256, "vocab_size": 154880}
PUBLISHED["GLM-5"] = {"architectures": ["GlmMoeDsaForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "dtype": "bfloat16", "eos_token_id": [154820, 154827, 154829],
    "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "head_dim": 64,
    "hidden_size": 6144, "index_head_dim": 128, "index_n_heads": 32, "index_topk": 2048,
    "indexer_rope_interleave": True, "initializer_range": 0.02, "intermediate_size": 12288,
    "kv_lora_rank": 512, "max_position_embeddings": 202752, "moe_intermediate_size": 2048,
    "moe_layer_freq": 1, "model_type": "glm_moe_dsa", "n_group": 1, "n_routed_experts": 256,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 64,
    "num_experts_per_tok": 8, "num_hidden_layers": 78, "num_key_value_heads": 64,
    "num_nextn_predict_layers": 1, "pad_token_id": 154820, "pretraining_tp": 1,
    "q_lora_rank": 2048, "qk_head_dim": 256, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05, "rope_interleave": True, "rope_parameters": {"rope_theta": 1000000,
    "rope_type": "default"}, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc",
    "transformers_version": "5.0.2.dev0", "use_cache": True, "v_head_dim": 256,
    "vocab_size": 154880}
INDEXERS = ["full" if max(i - 2, 0) % 4 == 0 else "shared" for i in range(78)]
PUBLISHED["GLM-5.2"] = PUBLISHED["GLM-5"] | {"head_dim": 192,
    "index_share_for_mtp_iteration": True, "index_skip_topk_offset": 3, "index_topk_freq": 4,
    "index_topk_pattern": None, "indexer_types": INDEXERS, "max_position_embeddings": 1048576,
    "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 75, "moe_router_dtype": "float32",
    "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"}}
PUBLISHED["GLM-5-FP8"] = PUBLISHED["GLM-5"] | {"quantization_config": FP8 |
    {"modules_to_not_convert": ["lm_head", "model.embed_tokens",
    "model.layers.0.input_layernorm"]}}
PUBLISHED["MiniMax-M2"] = {"architectures": ["MiniMaxM2ForCausalLM"], "attention_dropout": 0.0,
    "attn_type_list": [1] * 62, "auto_map": {}, "bos_token_id": None, "eos_token_id": None,
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02,
    "intermediate_size": 1536, "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_beta": 1.0, "layernorm_mlp_beta": 1.0,
    "max_position_embeddings": 196608, "mlp_intermediate_size": 8192, "model_type": "minimax_m2",
    "mtp_transformer_layers": 1, "num_attention_heads": 48, "num_experts_per_tok": 8,
    "num_hidden_layers": 62, "num_key_value_heads": 8, "num_local_experts": 256,
    "num_mtp_modules": 3, "output_router_logits": False, "qk_norm_type": "per_layer",
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "float8_e4m3fn",
    "quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["gate",
    "e_score_correction_bias", "lm_head"]}, "rms_norm_eps": 1e-06, "rope_theta": 5000000,
    "rotary_dim": 64, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0,
    "scoring_func": "sigmoid", "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid",
    "sliding_window": None, "tie_word_embeddings": False, "transformers_version": "4.57.1",
    "use_cache": True, "use_mtp": True, "use_qk_norm": True, "use_routing_bias": True,
    "vocab_size": 200064}
PUBLISHED["Qwen3-Next"] = {"architectures": ["Qwen3NextForCausalLM"], "attention_dropout": 0.0,
    "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645,
    "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 5120, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_value_head_dim": 128, "max_position_embeddings": 262144, "mlp_only_layers": [],
    "model_type": "qwen3_next", "moe_intermediate_size": 512, "norm_topk_prob": True,
    "num_attention_heads": 16, "num_experts": 512, "num_experts_per_tok": 10,
    "num_hidden_layers": 48, "num_key_value_heads": 2, "output_router_logits": False,
    "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 10000000, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.57.0.dev0",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 151936}
PUBLISHED["Qwen3-Next-FP8"] = PUBLISHED["Qwen3-Next"] | {"quantization_config":
    {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
    "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head",
    "model.layers.0.linear_attn.conv1d"]}}
PUBLISHED["Qwen3.5-27B"] = {"architectures": ["Qwen3_5ForConditionalGeneration"],
    "image_token_id": 248056, "model_type": "qwen3_5", "text_config": {"attention_bias": False,
    "attention_dropout": 0.0, "attn_output_gate": True, "dtype": "bfloat16",
    "eos_token_id": 248044, "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu",
    "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 17408,
    "layer_types": hybrid(64), "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
    "linear_num_key_heads": 16, "linear_num_value_heads": 48, "linear_value_head_dim": 128,
    "mamba_ssm_dtype": "float32", "max_position_embeddings": 262144, "mlp_only_layers": [],
    "model_type": "qwen3_5_text", "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False, "num_attention_heads": 24, "num_hidden_layers": 64,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "tie_word_embeddings": False,
    "use_cache": True, "vocab_size": 248320, "partial_rotary_factor": 0.25,
    "output_gate_type": "swish", "rope_parameters": {"mrope_interleaved": True,
    "mrope_section": [11, 11, 10], "rope_type": "default", "rope_theta": 10000000,
    "partial_rotary_factor": 0.25}}, "tie_word_embeddings": False,
    "transformers_version": "4.57.0.dev0", "video_token_id": 248057, "vision_config":
    {"deepstack_visual_indexes": [], "depth": 27, "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1152, "in_channels": 3, "initializer_range": 0.02, "intermediate_size": 4304,
    "model_type": "qwen3_5", "num_heads": 16, "num_position_embeddings": 2304,
    "out_hidden_size": 5120, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2},
    "vision_end_token_id": 248054, "vision_start_token_id": 248053}
QWEN3_5_TEXT = PUBLISHED["Qwen3.5-27B"]["text_config"]
QWEN3_5_VISION = PUBLISHED["Qwen3.5-27B"]["vision_config"]
PUBLISHED["Qwen3.5-35B-A3B"] = PUBLISHED["Qwen3.5-27B"] | {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "model_type": "qwen3_5_moe", "vision_config": QWEN3_5_VISION | {"out_hidden_size": 2048},
    "text_config": without(QWEN3_5_TEXT, "intermediate_size") |
    {"model_type": "qwen3_5_moe_text", "hidden_size": 2048, "layer_types": hybrid(40),
    "num_hidden_layers": 40, "num_attention_heads": 16, "num_key_value_heads": 2,
    "linear_num_value_heads": 32, "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512, "num_experts": 256, "num_experts_per_tok": 8,
    "output_router_logits": False, "router_aux_loss_coef": 0.001}}
PUBLISHED["Qwen3.5-35B-A3B-FP8"] = PUBLISHED["Qwen3.5-35B-A3B"] | {"quantization_config":
    {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
    "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head", "model.visual.merger"]}}
PUBLISHED["Qwen2.5-VL-7B"] = {"architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654,
    "image_token_id": 151655, "video_token_id": 151656, "hidden_act": "silu",
    "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
    "max_position_embeddings": 128000, "max_window_layers": 28, "model_type": "qwen2_5_vl",
    "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.41.2",
    "use_cache": True, "use_sliding_window": False, "vision_config": {"depth": 32,
    "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
    "in_chans": 3, "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2,
    "spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2, "temporal_patch_size": 2},
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vocab_size": 152064}
PUBLISHED["Qwen2.5-VL-3B"] = PUBLISHED["Qwen2.5-VL-7B"] | {"hidden_size": 2048,
    "intermediate_size": 11008, "max_window_layers": 70, "num_attention_heads": 16,
    "num_hidden_layers": 36, "num_key_value_heads": 2, "tie_word_embeddings": True,
    "vision_config": PUBLISHED["Qwen2.5-VL-7B"]["vision_config"] | {"out_hidden_size": 2048},
    "vocab_size": 151936}
QWEN3_VL_VISION = QWEN3_5_VISION | {"deepstack_visual_indexes": [8, 16, 24],
    "model_type": "qwen3_vl"}
PUBLISHED["Qwen3-VL-8B"] = {"architectures": ["Qwen3VLForConditionalGeneration"],
    "image_token_id": 151655, "model_type": "qwen3_vl", "text_config": {"attention_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 151643, "dtype": "bfloat16",
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 12288, "max_position_embeddings": 262144,
    "model_type": "qwen3_vl_text", "num_attention_heads": 32, "num_hidden_layers": 36,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": {"mrope_interleaved": True,
    "mrope_section": [24, 20, 20], "rope_type": "default"}, "rope_theta": 5000000,
    "use_cache": True, "vocab_size": 151936}, "tie_word_embeddings": False,
    "transformers_version": "4.57.0.dev0", "video_token_id": 151656,
    "vision_config": QWEN3_VL_VISION | {"out_hidden_size": 4096}, "vision_end_token_id": 151653,
    "vision_start_token_id": 151652}
PUBLISHED["Qwen3-VL-30B-A3B"] = PUBLISHED["Qwen3-VL-8B"] | {
    "architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe",
    "text_config": PUBLISHED["Qwen3-VL-8B"]["text_config"] | {"decoder_sparse_step": 1,
    "hidden_size": 2048, "intermediate_size": 6144, "mlp_only_layers": [],
    "model_type": "qwen3_vl_moe_text", "moe_intermediate_size": 768, "norm_topk_prob": True,
    "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_key_value_heads": 4}, "vision_config": QWEN3_VL_VISION |
    {"model_type": "qwen3_vl_moe", "out_hidden_size": 2048}}
GPT_OSS = {"architectures": ["GptOssForCausalLM"], "attention_bias": True,
    "attention_dropout": 0.0, "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64,
    "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
    "initializer_range": 0.02, "intermediate_size": 2880, "layer_types": ["sliding_attention",
    "full_attention"] * 12, "max_position_embeddings": 131072, "model_type": "gpt_oss",
    "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24,
    "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False,
    "pad_token_id": 199999, "quantization_config":
    {"modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
    "model.embed_tokens", "lm_head"], "quant_method": "mxfp4"}, "rms_norm_eps": 1e-05,
    "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
    "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": False},
    "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
    "tie_word_embeddings": False, "transformers_version": "4.55.0.dev0", "use_cache": True,
    "vocab_size": 201088}
PUBLISHED["gpt-oss-20b"] = GPT_OSS
PUBLISHED["gpt-oss-120b"] = GPT_OSS | {"num_hidden_layers": 36, "num_local_experts": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 18}
PUBLISHED["gemma-2-9b"] = {"architectures": ["Gemma2ForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "attn_logit_softcapping": 50.0, "bos_token_id": 2,
    "cache_implementation": "hybrid", "eos_token_id": 1, "final_logit_softcapping": 30.0,
    "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 16,
    "num_hidden_layers": 42, "num_key_value_heads": 8, "pad_token_id": 0,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
    "sliding_window": 4096, "sliding_window_size": 4096, "torch_dtype": "bfloat16",
    "transformers_version": "4.42.0.dev0", "use_cache": True, "vocab_size": 256000}
PUBLISHED["gemma-2-27b"] = PUBLISHED["gemma-2-9b"] | {"hidden_size": 4608,
    "intermediate_size": 36864, "head_dim": 128, "num_attention_heads": 32,
    "num_key_value_heads": 16, "num_hidden_layers": 46, "query_pre_attn_scalar": 144,
    "_attn_implementation": "eager"}
PUBLISHED["gemma-3-1b-it"] = {"architectures": ["Gemma3ForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "attn_logit_softcapping": None, "bos_token_id": 2,
    "cache_implementation": "hybrid", "eos_token_id": [1, 106], "final_logit_softcapping": None,
    "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
    "initializer_range": 0.02, "intermediate_size": 6912, "max_position_embeddings": 32768,
    "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26,
    "num_key_value_heads": 1, "pad_token_id": 0, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "use_cache": True,
    "vocab_size": 262144}
PUBLISHED["gemma-3-270m"] = PUBLISHED["gemma-3-1b-it"] | {"hidden_size": 640,
    "intermediate_size": 2048, "num_hidden_layers": 18, "_sliding_window_pattern": 6,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "use_bidirectional_attention": False}
del PUBLISHED["gemma-3-270m"]["sliding_window_pattern"]
PUBLISHED["gemma-3-4b-it"] = {"architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999, "eoi_token_index": 256000, "eos_token_id": [1, 106],
    "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
    "model_type": "gemma3", "text_config": {"hidden_size": 2560, "intermediate_size": 10240,
    "model_type": "gemma3_text", "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0,
    "rope_type": "linear"}, "sliding_window": 1024}, "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0", "vision_config": {"hidden_size": 1152,
    "image_size": 896}}
PUBLISHED["gemma-3-27b-it"] = PUBLISHED["gemma-3-4b-it"] | {"text_config": {"head_dim": 128,
    "hidden_size": 5376, "intermediate_size": 21504, "model_type": "gemma3_text",
    "num_attention_heads": 32, "num_hidden_layers": 62, "num_key_value_heads": 16,
    "query_pre_attn_scalar": 168, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024}}
FACTORS = [1.0] * 48
PUBLISHED["Phi-3-mini-128k"] = {"_name_or_path": "Phi-3-mini-128k-instruct",
    "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {}, "bos_token_id": 1, "embd_pdrop": 0.0, "eos_token_id": 32000,
    "hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02,
    "intermediate_size": 8192, "max_position_embeddings": 131072, "model_type": "phi3",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05, "rope_scaling": {"long_factor": FACTORS, "short_factor": FACTORS,
    "type": "longrope"}, "rope_theta": 10000.0, "sliding_window": 262144,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.40.2",
    "use_cache": True, "vocab_size": 32064}
PUBLISHED["Phi-4-mini"] = PUBLISHED["Phi-3-mini-128k"] | {"bos_token_id": 199999,
    "eos_token_id": 199999, "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False,
    "mlp_bias": False, "num_attention_heads": 24, "num_key_value_heads": 8, "pad_token_id": 199999,
    "partial_rotary_factor": 0.75, "tie_word_embeddings": True, "vocab_size": 200064}
PUBLISHED["phi-4"] = PUBLISHED["Phi-3-mini-128k"] | {"hidden_size": 5120,
    "intermediate_size": 17920, "max_position_embeddings": 16384, "num_attention_heads": 40,
    "num_hidden_layers": 40, "num_key_value_heads": 10, "original_max_position_embeddings": 16384,
    "rope_scaling": None, "rope_theta": 250000, "sliding_window": None, "vocab_size": 100352,
    "bos_token_id": 100257, "eos_token_id": 100265, "pad_token_id": 100349}
PUBLISHED["Llama-4-Scout"] = {"architectures": ["Llama4ForConditionalGeneration"],
    "boi_token_index": 200080, "eoi_token_index": 200081, "image_token_index": 200092,
    "model_type": "llama4", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0.dev0", "vision_config": {"hidden_size": 1408}, "text_config":
    {"_attn_implementation_autoset": True, "attention_bias": False, "attention_chunk_size": 8192,
    "attention_dropout": 0.0, "attn_scale": 0.1, "attn_temperature_tuning": True,
    "bos_token_id": 200000, "cross_attention_hidden_size": None, "eos_token_id": [200001, 200007,
    200008], "floor_scale": 8192, "for_llm_compressor": False, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02,
    "interleave_moe_layer_step": 1, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
    "layer_types": (["chunked_attention"] * 3 + ["full_attention"]) * 12,
    "max_position_embeddings": 10485760, "model_type": "llama4_text",
    "moe_layers": list(range(48)), "no_rope_layers": [int((i + 1) % 4 != 0) for i in range(48)],
    "num_attention_heads": 40, "num_experts_per_tok": 1, "num_hidden_layers": 48,
    "num_key_value_heads": 8, "num_local_experts": 16, "output_router_logits": False,
    "pad_token_id": 200018, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 16.0,
    "high_freq_factor": 1.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3"}, "rope_theta": 500000.0, "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0, "torch_dtype": "bfloat16", "use_cache": True, "use_qk_norm": True,
    "vocab_size": 202048, "attn_implementation": None}}
PUBLISHED["Mistral-Small-24B-2501"] = {"architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02,
    "intermediate_size": 32768, "max_position_embeddings": 32768, "model_type": "mistral",
    "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 100000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.49.0.dev0",
    "use_cache": True, "vocab_size": 131072}
PIXTRAL = {"attention_dropout": 0.0, "head_dim": 64, "hidden_act": "silu", "hidden_size": 1024,
    "image_size": 1540, "initializer_range": 0.02, "intermediate_size": 4096,
    "model_type": "pixtral", "num_attention_heads": 16, "num_channels": 3,
    "num_hidden_layers": 24, "patch_size": 14, "rope_theta": 10000.0}
PUBLISHED["llava-1.5-7b"] = {"architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100, "image_token_index": 32000, "model_type": "llava",
    "pad_token_id": 32001, "projector_hidden_act": "gelu", "text_config": {
    "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05,
    "torch_dtype": "float16", "vocab_size": 32064}, "tie_word_embeddings": False,
    "torch_dtype": "float16", "vision_config": {"hidden_size": 1024, "image_size": 336,
    "intermediate_size": 4096, "model_type": "clip_vision_model", "num_attention_heads": 16,
    "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000},
    "vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
PUBLISHED["Mistral-Small-3.2"] = {"architectures": ["Mistral3ForConditionalGeneration"],
    "image_token_index": 10, "model_type": "mistral3", "multimodal_projector_bias": False,
    "projector_hidden_act": "gelu", "spatial_merge_size": 2, "text_config":
    {"attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
    "initializer_range": 0.02, "intermediate_size": 32768, "max_position_embeddings": 131072,
    "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 40,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000000.0,
    "sliding_window": None, "use_cache": True, "vocab_size": 131072}, "torch_dtype": "bfloat16",
    "transformers_version": "4.52.4", "vision_config": PIXTRAL,
    "vision_feature_layer": -1}
MINISTRAL_ROPE = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1,
    "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384,
    "rope_theta": 1000000.0, "rope_type": "yarn", "type": "yarn"}
PUBLISHED["Ministral-3-8B"] = {"architectures": ["Mistral3ForConditionalGeneration"],
    "dtype": "bfloat16", "image_token_index": 10, "model_type": "mistral3",
    "multimodal_projector_bias": False, "projector_hidden_act": "gelu", "quantization_config":
    {"activation_scheme": "static", "dequantize": False,
    "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    "quant_method": "fp8", "weight_block_size": None}, "spatial_merge_size": 2, "text_config":
    {"attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 262144,
    "model_type": "ministral3", "num_attention_heads": 32, "num_hidden_layers": 34,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_parameters": MINISTRAL_ROPE,
    "sliding_window": None, "use_cache": True, "vocab_size": 131072},
    "transformers_version": "5.0.0.dev0", "vision_config": PIXTRAL,
    "vision_feature_layer": -1}
PUBLISHED["Ministral-3-3B"] = PUBLISHED["Ministral-3-8B"] | {"tie_word_embeddings": True,
    "text_config": PUBLISHED["Ministral-3-8B"]["text_config"] | {"hidden_size": 3072,
    "intermediate_size": 9216, "num_hidden_layers": 26, "tie_word_embeddings": True}}
PUBLISHED["Devstral-2-123B"] = {"architectures": ["Ministral3ForCausalLM"],
    "attention_dropout": 0.0, "bos_token_id": 1, "dtype": "bfloat16", "eos_token_id": 2,
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 12288, "initializer_range": 0.02,
    "intermediate_size": 28672, "max_position_embeddings": 262144, "model_type": "ministral3",
    "num_attention_heads": 96, "num_hidden_layers": 88, "num_key_value_heads": 8,
    "pad_token_id": 11, "quantization_config": {"activation_scheme": "static", "dequantize": False,
    "modules_to_not_convert": ["lm_head"], "quant_method": "fp8", "weight_block_size": None},
    "rms_norm_eps": 1e-05, "rope_parameters": {"beta_fast": 4.0, "beta_slow": 1.0, "factor": 64.0,
    "llama_4_scaling_beta": 0.0, "mscale": 1.0, "mscale_all_dim": 0.0,
    "original_max_position_embeddings": 4096, "rope_theta": 1000000.0, "rope_type": "yarn",
    "type": "yarn"}, "sliding_window": None, "tie_word_embeddings": False,
    "transformers_version": "5.0.0.dev0", "use_cache": True, "vocab_size": 131072}
PUBLISHED["OLMo-2-7B"] = {"architectures": ["Olmo2ForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096,
    "model_type": "olmo2", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "pad_token_id": 100277, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 500000, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.47.0.dev0", "use_cache": True, "vocab_size": 100352}
PUBLISHED["Olmo-3-7B"] = PUBLISHED["OLMo-2-7B"] | {"architectures": ["Olmo3ForCausalLM"],
    "bos_token_id": None, "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
    "max_position_embeddings": 65536, "model_type": "olmo3", "rope_scaling":
    {"attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1, "factor": 8.0,
    "original_max_position_embeddings": 8192, "rope_type": "yarn"}, "sliding_window": 4096,
    "vocab_size": 100278, "dtype": "bfloat16"}
PUBLISHED["granite-3.3-8b"] = {"architectures": ["GraniteForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "attention_multiplier": 0.0078125, "bos_token_id": 0,
    "embedding_multiplier": 12.0, "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 12800, "logits_scaling": 16.0,
    "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "granite",
    "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8,
    "pad_token_id": 0, "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 10000000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.49.0", "use_cache": True, "vocab_size": 49159}
PUBLISHED["granite-3.1-3b-a800m"] = PUBLISHED["granite-3.3-8b"] | {
    "architectures": ["GraniteMoeForCausalLM"], "attention_multiplier": 0.015625,
    "hidden_size": 1536, "intermediate_size": 512, "logits_scaling": 6.0,
    "model_type": "granitemoe", "num_attention_heads": 24, "num_experts_per_tok": 8,
    "num_hidden_layers": 32, "num_local_experts": 40, "output_router_logits": False,
    "rms_norm_eps": 1e-06, "router_aux_loss_coef": 0.0, "vocab_size": 49155}
PUBLISHED["granite-4.0-micro"] = {"architectures": ["GraniteMoeHybridForCausalLM"],
    "attention_bias": False, "attention_dropout": 0.0, "attention_multiplier": 0.015625,
    "bos_token_id": 100257, "embedding_multiplier": 12, "eos_token_id": 100257,
    "hidden_act": "silu", "hidden_size": 2560, "init_method": "mup", "initializer_range": 0.1,
    "intermediate_size": 8192, "layer_types": ["attention"] * 40, "logits_scaling": 10,
    "mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 64,
    "mamba_d_state": 128, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 80,
    "mamba_proj_bias": False, "max_position_embeddings": 131072, "model_type": "granitemoehybrid",
    "normalization_function": "rmsnorm", "num_attention_heads": 40, "num_experts_per_tok": 0,
    "num_hidden_layers": 40, "num_key_value_heads": 8, "num_local_experts": 0,
    "output_router_logits": False, "pad_token_id": 100256, "position_embedding_type": "rope",
    "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 10000000, "router_aux_loss_coef": 0.01, "shared_intermediate_size": 8192,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.56.0",
    "use_cache": True, "vocab_size": 100352}
PUBLISHED["SmolLM3-3B"] = {"architectures": ["SmolLM3ForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "bos_token_id": None, "eos_token_id": 128012, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 11008,
    "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536,
    "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3",
    "no_rope_layer_interval": 4, "no_rope_layers": [int((i + 1) % 4 != 0) for i in range(36)],
    "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4,
    "pad_token_id": 128004, "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 5000000.0, "sliding_window": None, "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0.dev0", "use_cache": False, "use_sliding_window": False,
    "vocab_size": 128256}
PUBLISHED["ERNIE-4.5-0.3B"] = {"architectures": ["Ernie4_5_ForCausalLM"], "bos_token_id": 1,
    "compression_ratio": 1.0, "eos_token_id": 2, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 131072,
    "model_type": "ernie4_5", "num_attention_heads": 16, "num_hidden_layers": 18,
    "num_key_value_heads": 2, "pad_token_id": 0, "rms_norm_eps": 1e-05, "rope_theta": 500000,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_bias": False, "use_cache": False,
    "vocab_size": 103424, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0,
    "micro_batch_size": 1, "use_flash_attention": True}
PUBLISHED["ERNIE-4.5-21B-A3B"] = {"architectures": ["Ernie4_5_MoeForCausalLM"], "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 2560, "intermediate_size": 12288,
    "max_position_embeddings": 131072, "model_type": "ernie4_5_moe", "num_attention_heads": 20,
    "num_key_value_heads": 4, "num_hidden_layers": 28, "pad_token_id": 0, "rms_norm_eps": 1e-05,
    "use_cache": True, "vocab_size": 103424, "rope_theta": 500000, "use_bias": False,
    "tie_word_embeddings": True, "moe_num_experts": 64, "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1, "moe_layer_end_index": 27, "moe_intermediate_size": 1536,
    "moe_capacity": [64, 64, 64], "moe_gate": "topk", "moe_k": 6, "moe_layer_interval": 1,
    "moe_use_aux_free": True, "num_nextn_predict_layers": 1, "sinkhorn_2gate": True,
    "sinkhorn_temp": 0.03, "torch_dtype": "bfloat16", "transformers_version": "4.54.0.dev0",
    "auto_map": {}, "compression_ratio": 1.0, "head_dim": None, "scale_qk_coeff": 1.0,
    "rope_scaling": None, "freq_allocation": 20}
PUBLISHED["ERNIE-4.5-300B"] = PUBLISHED["ERNIE-4.5-21B-A3B"] | {"hidden_size": 8192,
    "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8,
    "num_hidden_layers": 54, "moe_k": 8, "moe_num_shared_experts": 0, "moe_layer_start_index": 3,
    "moe_layer_end_index": 53, "moe_intermediate_size": 3584, "tie_word_embeddings": False}
PUBLISHED["Hunyuan-7B"] = {"add_classification_head": False,
    "architectures": ["HunYuanDenseV1ForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "attention_head_dim": 128, "bos_token_id": 1, "cla_share_factor": 2,
    "class_num": 0, "dense_list": [4096, 0], "eod_token_id": 127967, "eos_token_id": 127960,
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "im_end_id": 6,
    "im_newline_id": 12, "im_start_id": 5, "initializer_range": 0.02, "intermediate_size": 14336,
    "mask_init_id": 13, "max_position_embeddings": 32768, "mlp_bias": False,
    "model_type": "hunyuan_v1_dense", "norm_type": "rms", "num_attention_heads": 32,
    "num_experts": 1, "num_hidden_layers": 32, "num_key_value_heads": 8, "org_vocab_size": 128167,
    "pad_id": 127961, "pad_token_id": 127961, "pool_type": "last", "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": {"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1,
    "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0, "type": "dynamic"}, "rope_theta": 10000.0,
    "routed_scaling_factor": 1.0, "sep_token_id": 127962, "text_end_id": 8, "text_start_id": 7,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.41.2",
    "use_cache": True, "use_cla": False, "use_qk_norm": True, "vocab_size": 128167,
    "rotary_pos_emb": None}
PUBLISHED["Hunyuan-A13B"] = PUBLISHED["Hunyuan-7B"] | {
    "architectures": ["HunYuanMoEV1ForCausalLM"], "group_limited_greedy": False,
    "intermediate_size": 3072, "kv_lora_rank": None, "model_type": "hunyuan_v1_moe",
    "moe_drop_tokens": False, "moe_intermediate_size": [3072] * 32, "moe_layer_num_skipped": 0,
    "moe_random_routing_dropped_token": False, "moe_topk": [8] * 32, "n_group": False,
    "norm_topk_prob": True, "num_experts": 64, "num_media_embeds": 257,
    "num_shared_expert": [1] * 32, "position_embedding_xdrope": False, "q_lora_rank": None,
    "qk_nope_head_dim": None, "qk_rope_head_dim": None, "routed_scaling_factor": False,
    "skip_cls_token": False, "topk_group": False, "use_mixed_mlp_moe": True, "use_mla": False,
    "use_rotary_pos_emb": True, "v_head_dim": None}
PUBLISHED["command-r7b"] = {"architectures": ["Cohere2ForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 5, "cache_implementation": "hybrid",
    "eos_token_id": 255001, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 14336, "layer_norm_eps": 1e-05,
    "layer_switch": 4, "logit_scale": 0.25, "max_position_embeddings": 8192,
    "model_type": "cohere2", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "order_of_interleaved_layers": "local_attn_first", "pad_token_id": 0,
    "position_embedding_type": "rope_gptj", "rope_scaling": None, "rope_theta": 50000,
    "rotary_pct": 1.0, "sliding_window": 4096, "sliding_window_pattern": 4,
    "torch_dtype": "float16", "transformers_version": "4.48.0.dev0", "use_cache": True,
    "use_embedding_sharing": True, "use_gated_activation": True, "use_parallel_block": True,
    "use_parallel_embedding": False, "vocab_size": 256000}
PUBLISHED["gpt2"] = {"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256,
    "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024,
    "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1,
    "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True, "task_specific_params":
    {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257}
PUBLISHED["gpt2-medium"] = PUBLISHED["gpt2"] | {"n_embd": 1024, "n_head": 16, "n_layer": 24,
    "n_special": 0, "predict_special_tokens": True}
PUBLISHED["pythia-6.9b"] = {"architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0,
    "eos_token_id": 0, "hidden_act": "gelu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 16384, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048,
    "model_type": "gpt_neox", "num_attention_heads": 32, "num_hidden_layers": 32,
    "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
    "torch_dtype": "float16", "transformers_version": "4.24.0", "use_cache": True,
    "use_parallel_residual": True, "vocab_size": 50432}
PUBLISHED["gpt-neox-20b"] = PUBLISHED["pythia-6.9b"] | {"attention_probs_dropout_prob": 0,
    "hidden_dropout_prob": 0, "hidden_act": "gelu_fast", "hidden_size": 6144,
    "intermediate_size": 24576, "num_attention_heads": 64, "num_hidden_layers": 44}
LLAMA = {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 8.0,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3"}, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.42.3", "use_cache": True,
    "vocab_size": 128256}
PUBLISHED["Llama-3.1-8B"] = LLAMA
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None,
    "block_structure": None, "dynamic": False, "actorder": None, "observer": "minmax",
    "observer_kwargs": {}}
PUBLISHED["Llama-3.1-8B-FP8-CT-static"] = LLAMA | {"quantization_config": {"config_groups":
    {"group_0": {"input_activations": FLOAT8 | {"strategy": "tensor"}, "output_activations": None,
    "targets": ["Linear"], "weights": FLOAT8 | {"strategy": "tensor"}}},
    "format": "float-quantized", "global_compression_ratio": 1.23, "ignore": ["lm_head"],
    "kv_cache_scheme": None, "quant_method": "compressed-tensors",
    "quantization_status": "frozen"}}
PUBLISHED["Llama-3.1-8B-FP8-KV"] = LLAMA | {"quantization_config":
    PUBLISHED["Llama-3.1-8B-FP8-CT-static"]["quantization_config"] | {"kv_cache_scheme": FLOAT8 |
    {"strategy": "tensor"}, "quantization_status": "compressed"}}
PUBLISHED["Llama-3.1-8B-nvidia-FP8"] = LLAMA | {"quantization_config": {"config_groups":
    {"group_0": {"input_activations": {"dynamic": False, "num_bits": 8, "type": "float"},
    "weights": {"dynamic": False, "num_bits": 8, "type": "float"}, "targets": ["Linear"]}},
    "ignore": ["lm_head"], "quant_algo": "FP8", "kv_cache_scheme": {"dynamic": False,
    "num_bits": 8, "type": "float"}, "producer": {"name": "modelopt", "version": "0.29.0"},
    "quant_method": "modelopt"}}
PUBLISHED["Llama-3.1-8B-nvidia-FP8-old"] = LLAMA | {"quantization_config": {"producer":
    {"name": "modelopt", "version": "0.15.1"}, "quantization": {"quant_algo": "FP8",
    "kv_cache_quant_algo": "FP8"}, "quant_method": "modelopt"}}
PUBLISHED["Llama-3.1-AWQ"] = LLAMA | {"quantization_config": {"bits": 4, "group_size": 128,
    "modules_to_not_convert": None, "quant_method": "awq", "version": "gemm", "zero_point": True,
    "do_fuse": False, "exllama_config": {"version": 1}, "fuse_max_seq_len": None,
    "modules_to_fuse": None, "backend": "autoawq"}}
PUBLISHED["Llama-3.1-GPTQ"] = LLAMA | {"quantization_config": {"bits": 4,
    "checkpoint_format": "gptq", "damp_percent": 0.01, "desc_act": True, "dynamic": None,
    "group_size": 128, "lm_head": False, "meta": {"quantizer": ["gptqmodel:1.4.0"]},
    "pack_dtype": "int32", "quant_method": "gptq", "sym": True, "true_sequential": True,
    "static_groups": False, "model_file_base_name": None, "model_name_or_path": None}}
QWEN2_5 = {"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
    "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28,
    "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 152064}
PUBLISHED["Qwen2.5-7B-GPTQ-Int4"] = QWEN2_5 | {"quantization_config": {"batch_size": 1, "bits": 4,
    "block_name_to_quantize": None, "cache_block_outputs": True, "damp_percent": 0.01,
    "dataset": None, "desc_act": False, "exllama_config": {"version": 1}, "group_size": 128,
    "max_input_length": None, "model_seqlen": None, "module_name_preceding_first_block": None,
    "modules_in_block_to_quantize": None, "pad_token_id": None, "quant_method": "gptq",
    "sym": True, "tokenizer": None, "true_sequential": True, "use_cuda_fp16": False,
    "use_exllama": True}, "intermediate_size": 18944}
PUBLISHED["Qwen2.5-7B-AWQ"] = QWEN2_5 | {"quantization_config": {"bits": 4, "group_size": 128,
    "modules_to_not_convert": None, "quant_method": "awq", "version": "gemm", "zero_point": True}}
QWEN3_MOE = {"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 151643, "decoder_sparse_step": 1,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960,
    "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
    "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
    "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
    "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936}
PUBLISHED["Qwen3-30B-A3B-FP8"] = QWEN3_MOE | {"quantization_config": FP8 |
    {"modules_to_not_convert": ["lm_head"]}}
PUBLISHED["Qwen3-30B-A3B-GPTQ"] = QWEN3_MOE | {"quantization_config": {"bits": 4,
    "checkpoint_format": "gptq", "desc_act": False, "group_size": 128, "lm_head": False, "meta":
    {}, "pack_dtype": "int32", "quant_method": "gptq", "sym": True}}
PUBLISHED["Qwen3-8B"] = without(QWEN3_MOE, "decoder_sparse_step", "mlp_only_layers",
    "moe_intermediate_size", "norm_topk_prob", "num_experts", "num_experts_per_tok",
    "output_router_logits", "router_aux_loss_coef") | {"architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
    "num_hidden_layers": 36, "num_key_value_heads": 8}
PUBLISHED["Mixtral-8x7B"] = {"architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": True,
    "vocab_size": 32000}
PUBLISHED["starcoder2-7b"] = {"activation_function": "gelu",
    "architectures": ["Starcoder2ForCausalLM"], "attention_dropout": 0.1, "residual_dropout": 0.1,
    "embedding_dropout": 0.1, "attention_softmax_in_fp32": True, "bos_token_id": 0,
    "eos_token_id": 0, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 4608,
    "initializer_range": 0.018042, "intermediate_size": 18432, "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 16384, "mlp_type": "default", "model_type": "starcoder2",
    "norm_epsilon": 1e-05, "norm_type": "layer_norm", "num_attention_heads": 36,
    "num_hidden_layers": 32, "num_key_value_heads": 4, "rope_theta": 1000000,
    "scale_attention_softmax_in_fp32": True, "scale_attn_weights": True, "sliding_window": 4096,
    "transformers_version": "4.37.0.dev0", "use_bias": True, "use_cache": True,
    "vocab_size": 49152}
PUBLISHED["starcoder"] = {"_name_or_path": "/fsx/x", "activation_function": "gelu",
    "architectures": ["GPTBigCodeForCausalLM"], "attention_softmax_in_fp32": True,
    "multi_query": True, "attn_pdrop": 0.1, "bos_token_id": 0, "embd_pdrop": 0.1,
    "eos_token_id": 0, "inference_runner": 0, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "max_batch_size": None, "max_sequence_length": None,
    "model_type": "gpt_bigcode", "n_embd": 6144, "n_head": 48, "n_inner": 24576, "n_layer": 40,
    "n_positions": 8192, "pad_key_length": True, "pre_allocate_kv_cache": False,
    "resid_pdrop": 0.1, "scale_attention_softmax_in_fp32": True, "scale_attn_weights": True,
    "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True, "torch_dtype": "float32",
    "transformers_version": "4.28.1", "use_cache": True, "validate_runner_input": True,
    "vocab_size": 49152}
PUBLISHED["glm-4-9b-chat"] = {"_name_or_path": "THUDM/glm-4-9b-chat", "model_type": "chatglm",
    "architectures": ["ChatGLMModel"], "auto_map": {}, "add_bias_linear": False,
    "add_qkv_bias": True, "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True, "attn_implementation": "sdpa", "bias_dropout_fusion": True,
    "ffn_hidden_size": 13696, "fp32_residual_connection": False, "hidden_dropout": 0.0,
    "hidden_size": 4096, "kv_channels": 128, "layernorm_epsilon": 1.5625e-07,
    "multi_query_attention": True, "multi_query_group_num": 2, "num_attention_heads": 32,
    "num_hidden_layers": 40, "num_layers": 40, "rope_ratio": 500, "original_rope": True,
    "padded_vocab_size": 151552, "post_layer_norm": True, "rmsnorm": True, "seq_length": 131072,
    "use_cache": True, "torch_dtype": "bfloat16", "transformers_version": "4.42.4",
    "tie_word_embeddings": False, "eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329}
PUBLISHED["GLM-4-32B-0414"] = {"architectures": ["Glm4ForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "eos_token_id": [151329, 151336, 151338], "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 6144, "initializer_range": 0.02,
    "intermediate_size": 23040, "max_position_embeddings": 32768, "model_type": "glm4",
    "num_attention_heads": 48, "num_hidden_layers": 61, "num_key_value_heads": 2,
    "pad_token_id": 151329, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.52.0.dev0", "use_cache": True, "vocab_size": 151552}
PUBLISHED["DeepSeek-R1-AWQ"] = PUBLISHED["DeepSeek-V3"] | {"quantization_config":
    PUBLISHED["Qwen2.5-7B-AWQ"]["quantization_config"] | {"modules_to_not_convert": ["lm_head"]}}
PUBLISHED["Qwen3-8B-FP8-dynamic"] = PUBLISHED["Qwen3-8B"] | {"quantization_config":
    PUBLISHED["GLM-4.5-Air-FP8"]["quantization_config"]}
PUBLISHED["Qwen3-8B-W4A16"] = PUBLISHED["Qwen3-8B"] | {"quantization_config": {"config_groups":
    {"group_0": {"input_activations": None, "output_activations": None, "targets": ["Linear"],
    "weights": {"actorder": "weight", "block_structure": None, "dynamic": False, "group_size": 128,
    "num_bits": 4, "observer": "minmax", "observer_kwargs": {}, "strategy": "group",
    "symmetric": True, "type": "int"}}}, "format": "pack-quantized",
    "global_compression_ratio": None, "ignore": ["lm_head"], "kv_cache_scheme": None,
    "quant_method": "compressed-tensors", "quantization_status": "compressed"}}
PUBLISHED["Qwen3-8B-W8A8-FP8-block-CT"] = PUBLISHED["Qwen3-8B"] | {"quantization_config":
    {"config_groups": {"group_0": {"format": "float-quantized", "input_activations":
    {"actorder": None, "block_structure": None, "dynamic": True, "group_size": 128, "num_bits": 8,
    "observer": None, "observer_kwargs": {}, "scale_dtype": None, "strategy": "group",
    "symmetric": True, "type": "float", "zp_dtype": None}, "output_activations": None,
    "targets": ["Linear"], "weights": {"actorder": None, "block_structure": [128, 128],
    "dynamic": False, "group_size": None, "num_bits": 8, "observer": "static_minmax",
    "observer_kwargs": {}, "scale_dtype": None, "strategy": "block", "symmetric": True,
    "type": "float", "zp_dtype": None}}}, "format": "float-quantized",
    "global_compression_ratio": None, "ignore": ["lm_head"], "kv_cache_scheme": None,
    "quant_method": "compressed-tensors", "quantization_status": "compressed", "sparsity_config":
    {}, "transform_config": {}, "version": "0.12.3"}}
PUBLISHED["Qwen3-Coder-480B"] = QWEN3_MOE | {"qkv_bias": False,
    "shared_expert_intermediate_size": 0, "use_qk_norm": True, "num_experts": 160,
    "hidden_size": 6144, "num_hidden_layers": 62, "num_attention_heads": 96,
    "num_key_value_heads": 8, "moe_intermediate_size": 2560, "intermediate_size": 8192,
    "rope_theta": 10000000, "max_position_embeddings": 262144}
PUBLISHED["Qwen3-235B-A22B"] = QWEN3_MOE | {"hidden_size": 4096, "num_hidden_layers": 94,
    "num_attention_heads": 64, "moe_intermediate_size": 1536, "intermediate_size": 12288}
PUBLISHED["Llama-3.1-405B-FP8"] = LLAMA | {"hidden_size": 16384, "intermediate_size": 53248,
    "num_attention_heads": 128, "num_hidden_layers": 126, "quantization_config":
    {"activation_scale_ub": 1200.0, "modules_to_not_convert": ["model.layers.0.mlp.down_proj"],
    "quant_method": "fbgemm_fp8"}}
