"""Kernels written in Triton: what FlashInfer lacks, and what pays to do in one pass over memory.

Knows shapes and arithmetic. Each kernel has its slow twin in ops/reference.py.
"""

from __future__ import annotations

from gllm_engine.ops.triton.decode import Parts, decode, split
from gllm_engine.ops.triton.gemv import gemv, is_single
from gllm_engine.ops.triton.heads import rotate_and_store
from gllm_engine.ops.triton.joined import one_shot_sum
from gllm_engine.ops.triton.layout import lay_out
from gllm_engine.ops.triton.moe import route, sum_experts
from gllm_engine.ops.triton.pages import list_pages
from gllm_engine.ops.triton.rows import rms_norm, silu_mul
from gllm_engine.ops.triton.sampling import sample
from gllm_engine.ops.triton.skinny import is_skinny, skinny

__all__ = [
    "Parts", "decode", "gemv", "is_single", "is_skinny", "lay_out", "list_pages", "one_shot_sum",
    "rms_norm", "rotate_and_store", "route", "sample", "silu_mul", "skinny", "split",
    "sum_experts",
]  # fmt: skip
