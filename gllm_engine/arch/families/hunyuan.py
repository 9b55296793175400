"""Hunyuan, dense."""

from __future__ import annotations

from dataclasses import replace

from gllm_engine.arch.checkpoint import Names
from gllm_engine.arch.families.common import read_head_dim, with_mixers
from gllm_engine.arch.families.llama import LLAMA, llama_with_rope
from gllm_engine.arch.fields import Fields
from gllm_engine.arch.model import Model
from gllm_engine.arch.rope import read_alpha_rope

HUNYUAN = LLAMA | {"vocab_size": 290943, "rms_norm_eps": 1e-5}
_NAMES = Names(renames=(("q_norm", "query_layernorm"), ("k_norm", "key_layernorm")))


def hunyuan(c: Fields) -> Model:
    c.require(use_qk_norm=True, use_cla=False)
    model = llama_with_rope(c, read_alpha_rope(c, read_head_dim(c)))
    return replace(with_mixers(model, qk_norm="head_after"), names=_NAMES)
