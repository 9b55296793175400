"""Triton kernels: operations that FlashInfer lacks, and several operations fused into one pass.

Knows shapes and arithmetic. Each kernel has a slow twin in ops/reference.py.
"""

from __future__ import annotations

from gllm_engine.ops.triton.attention_sinks import apply_sinks
from gllm_engine.ops.triton.decode_attention import KvSplits, decode_attention, split_kv
from gllm_engine.ops.triton.fp8 import dequantize, quantize, rounding_group
from gllm_engine.ops.triton.gated_delta import RowPlan, gated_delta, gated_norm, plan_rows
from gllm_engine.ops.triton.gemv import gemv, is_single
from gllm_engine.ops.triton.indexer import Choice, choose_tokens, plan_choice, store_index_key
from gllm_engine.ops.triton.int8 import rescale
from gllm_engine.ops.triton.latent_attention import (
    attend_latent,
    gather_latents,
    head_blocks,
    split_latents,
    store_latent,
)
from gllm_engine.ops.triton.list_pages import list_pages
from gllm_engine.ops.triton.moe import route, sum_experts
from gllm_engine.ops.triton.norm_act import (
    activate,
    layer_norm,
    mean_squares,
    rms_norm,
)
from gllm_engine.ops.triton.one_shot_allreduce import make_one_shot_allreduce
from gllm_engine.ops.triton.packed import dequantize_packed, is_packed_product, packed_linear
from gllm_engine.ops.triton.prepare_inputs import prepare_inputs
from gllm_engine.ops.triton.ptxas import choose_ptxas
from gllm_engine.ops.triton.qkv_rope_store import rotate, rotate_and_store
from gllm_engine.ops.triton.sampling import sample_plain
from gllm_engine.ops.triton.skinny import has_tiles, is_skinny, skinny

__all__ = [
    "gated_delta",
    "gated_norm",
    "Choice",
    "KvSplits",
    "RowPlan",
    "attend_latent",
    "activate",
    "apply_sinks",
    "choose_tokens",
    "decode_attention",
    "dequantize",
    "dequantize_packed",
    "gather_latents",
    "gemv",
    "has_tiles",
    "head_blocks",
    "is_packed_product",
    "is_single",
    "is_skinny",
    "layer_norm",
    "list_pages",
    "make_one_shot_allreduce",
    "mean_squares",
    "packed_linear",
    "plan_choice",
    "plan_rows",
    "prepare_inputs",
    "quantize",
    "rescale",
    "rms_norm",
    "rotate",
    "rotate_and_store",
    "rounding_group",
    "route",
    "sample_plain",
    "skinny",
    "split_kv",
    "split_latents",
    "store_index_key",
    "store_latent",
    "sum_experts",
]

choose_ptxas()
