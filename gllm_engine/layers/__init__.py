"""The layers of a decoder; each layer is built from its description in arch.

A layer owns its weights and lists them as canonical name -> tensor, so that loading needs no table.
The package knows no checkpoints and no scheduling.
"""

from __future__ import annotations

from gllm_engine.layers.attention import GqaAttention
from gllm_engine.layers.dense import DenseFfn
from gllm_engine.layers.forward_context import (
    Attend,
    CutPass,
    ForwardContext,
    LogitTokens,
    PlanKey,
)
from gllm_engine.layers.gated_delta import GatedDeltaAttention
from gllm_engine.layers.latent_attention import MlaAttention
from gllm_engine.layers.linear import Linear
from gllm_engine.layers.mixer import Mixer
from gllm_engine.layers.moe import MoeFfn
from gllm_engine.layers.norm import NormLayer
from gllm_engine.layers.platform import Platform
from gllm_engine.layers.residual import Residual, ResidualReducer
from gllm_engine.layers.rope import RopeTable
from gllm_engine.layers.stacked_weight import Staging, Views
from gllm_engine.layers.vocabulary import VocabularyMatrix

__all__ = [
    "Attend",
    "CutPass",
    "DenseFfn",
    "ForwardContext",
    "GatedDeltaAttention",
    "GqaAttention",
    "Linear",
    "LogitTokens",
    "Mixer",
    "MlaAttention",
    "MoeFfn",
    "NormLayer",
    "PlanKey",
    "Platform",
    "Residual",
    "ResidualReducer",
    "RopeTable",
    "Staging",
    "Views",
    "VocabularyMatrix",
]
