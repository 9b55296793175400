"""Keys of config.json that are known to change nothing in a decoder's arithmetic."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from gllm_engine.arch.fields import ArchError
from gllm_engine.files import shown

_HARMLESS = re.compile(
    r"""
    # What the file is, and how transformers or other tools handle it.
      architectures | model_type | transformers_version | name_or_path | auto_map | license | _.*
    | prefix | (torch_)?dtype | use_cache | cache_implementation | return_dict(_in_generate)?
    | output_(attentions|hidden_states|router_logits|scores|past)
    | id2label | label2id | num_labels | problem_type | task_specific_params
    | is_(encoder_)?decoder | add_cross_attention | cross_attention_hidden_size
    | tie_encoder_decoder | chunk_size_feed_forward | finetuning_task | pruned_heads
    | torchscript | use_bfloat16 | .*attn_implementation.* | .*flash_?att.* | unsloth_.*
    | (tokenizer|processor|feature_extractor)_class | for_llm_compressor | custom_generate
    | trust_remote_code | transformers\.js_config | is_llama_config | model_max_length
    | custom_pipelines | is_composition | keys_to_ignore_at_inference | author | created_date
    # Ids and text settings; the ids that end a text are read apart.
    | .*_ids? | .*_token_index
    # Training.
    | .*dropout(_.*)? | .*_pdrop | initializer_.* | init_.* | .*initialization.* | .*loss.*
    | seq_aux | .*jitter.* | gradient_checkpointing | pretraining_tp | ep_size | tp_size
    | micro_batch_size | moe_capacity.* | use_recompute.* | neftune_.*
    | fuse_(rope|linear|rms_norm|swiglu|softmax_mask|attention_(qkv|ffn)|gate_detach_matmul)
    | use_parallel_embedding | moe_multimodal_.*
    # Factors that are divided by and multiplied again, and orders of computing.
    | apply_query_key_layer_scaling | reorder_and_upcast_attn
    # Of state-space layers, which the supported models of their families lack.
    | time_step_(min|max|floor)
    # Heads for other tasks, layers for multi-token prediction, other modalities.
    | classifier_.* | summary_.* | .*mtp.* | num_nextn_.* | multi_token_pred_.*
    | (vision|image|video|audio|vit|im|anyres)_.*
    | mm_tokens_per_image | use_unified_vision_chunk | ignore_index
    # Precision of what we compute in float32.
    | .*softmax_in_fp32 | .*_in_float32 | enable_lm_head_fp32 | mamba_ssm_dtype | .*router_dtype
    # Settings of generation, which old configs have too.
    | temperature | top_[kp] | typical_p | do_sample | num_(return|beam).*
    | (max|min)_(new_)?length | max_new_tokens
    | (length|repetition|diversity|exponential_decay_length)_penalty | early_stopping
    | (encoder_)?no_repeat_ngram_size | bad_words_ids | forced_.* | (begin_)?suppress_tokens
    | remove_invalid_values
    # Sizes that follow from others or are kept for old readers.
    | qk_head_dim | head_dim | n_ctx | n_inner | initial_context_length | experts_per_token
    | original_max_position_embeddings | max_window_layers | sliding_window(_size|_pattern)?
    | max_sequence_length | n_special | predict_special_tokens
    """,
    re.VERBOSE,
)


def check_unknown_keys(unknown: Collection[str], ignored: Collection[str], file: Path) -> None:
    """Raise ArchError if `ignored` lacks keys that are `unknown`, or names others. `file`: where
    the keys are.
    """
    refused = [key for key in unknown if key not in ignored]
    if refused:
        told = ", ".join(map(shown, refused))
        raise ArchError(
            f"{file}: unknown keys, which may change the model's arithmetic: {told}; name those "
            "that have no effect in ignored_config_keys"
        )
    others = [key for key in ignored if key not in unknown]
    if others:
        raise ArchError(
            f"ignored_config_keys: {', '.join(map(shown, others))}: {file} has no such unknown keys"
        )


def unknown_keys(unread: dict[str, Any]) -> tuple[str, ...]:
    """Of the keys that no family's reader has asked for, those that might matter.

    A key whose value says "off" (false, 0, or empty) does not.
    """
    return tuple(key for key, value in unread.items() if value and not _HARMLESS.fullmatch(key))
