"""The decoder that interprets a Model, and the loading of checkpoints into it."""

from __future__ import annotations

from gllm_engine.arch import LoadError
from gllm_engine.layers import Attend, ForwardContext, Residual
from gllm_engine.model.decoder import Decoder, LayerCache
from gllm_engine.model.kernels import KernelUse, kernels_of
from gllm_engine.model.load import (
    Checkpoint,
    LoneTower,
    fill_randomly,
    filling,
    open_checkpoint,
)
from gllm_engine.model.states import States, bytes_of_states
from gllm_engine.model.vision_tower import VisionTower
from gllm_engine.ops import best_device

__all__ = [
    "Attend",
    "Checkpoint",
    "Decoder",
    "ForwardContext",
    "KernelUse",
    "LayerCache",
    "bytes_of_states",
    "LoadError",
    "LoneTower",
    "Residual",
    "States",
    "VisionTower",
    "best_device",
    "fill_randomly",
    "filling",
    "kernels_of",
    "open_checkpoint",
]
