"""Granite 3: Llama with factors of embeddings, scores, outputs of layers and logits."""

from __future__ import annotations

from dataclasses import replace

from gllm_engine.arch.families.common import with_mixers
from gllm_engine.arch.families.llama import LLAMA, llama
from gllm_engine.arch.fields import Fields
from gllm_engine.arch.model import Model

GRANITE = LLAMA | {
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "logits_scaling": 1.0,
}


def granite(c: Fields) -> Model:
    return replace(
        with_mixers(llama(c), scale=c.real("attention_multiplier")),
        embed_scale=c.real("embedding_multiplier"),
        residual_scale=c.real("residual_multiplier"),
        logit_scale=1 / c.real("logits_scaling"),
    )
