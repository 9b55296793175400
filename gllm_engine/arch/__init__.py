"""Descriptions of models as data: families, layers, RoPE, checkpoint names. No torch."""

from __future__ import annotations

from gllm_engine.arch.cache import CacheGroup, cache_groups
from gllm_engine.arch.families.registry import FAMILIES
from gllm_engine.arch.fields import MAX_EOS_TOKEN_IDS, ArchError, LoadError
from gllm_engine.arch.known_keys import check_unknown_keys
from gllm_engine.arch.model import (
    Dense,
    GatedDelta,
    Gqa,
    Indexer,
    Layer,
    Mla,
    Model,
    Moe,
    QueryTemperature,
)
from gllm_engine.arch.read import make_arch, read_arch
from gllm_engine.arch.rope import Rope
from gllm_engine.arch.shard import Shard
from gllm_engine.arch.vision import Vision
from gllm_engine.routing import Clamp, Routing

__all__ = [
    "FAMILIES",
    "MAX_EOS_TOKEN_IDS",
    "CacheGroup",
    "Clamp",
    "Dense",
    "GatedDelta",
    "Gqa",
    "Indexer",
    "Layer",
    "Mla",
    "Model",
    "Moe",
    "Routing",
    "QueryTemperature",
    "Rope",
    "Shard",
    "Vision",
    "ArchError",
    "LoadError",
    "check_unknown_keys",
    "cache_groups",
    "make_arch",
    "read_arch",
]
