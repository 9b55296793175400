"""What a model is, as data: families, layers, RoPE, checkpoint names. No torch."""

from __future__ import annotations

from gllm_engine.spec.fields import SpecError
from gllm_engine.spec.model import Dense, Gqa, Layer, Model, Moe, SandwichLayer
from gllm_engine.spec.rope import Rope
from gllm_engine.spec.share import Share
from gllm_engine.spec.zoo import FAMILIES, make_spec, read_spec

__all__ = [
    "FAMILIES",
    "Dense",
    "Gqa",
    "Layer",
    "Model",
    "Moe",
    "Rope",
    "SandwichLayer",
    "Share",
    "SpecError",
    "make_spec",
    "read_spec",
]
