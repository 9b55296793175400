"""Ranks and what they say to each other: the mesh, collectives, the pipeline.

Built on torch.distributed: NCCL between GPUs, gloo between CPUs. Knows no models and no scheduling.
"""

from __future__ import annotations

from gllm_engine.dist.mesh import Mesh, cut_layers
from gllm_engine.dist.pipe import Pipe
from gllm_engine.dist.ranks import Ranks, join_ranks, talk_through
from gllm_engine.dist.tensor import ALONE, TensorParallel

__all__ = [
    "ALONE",
    "Mesh",
    "Pipe",
    "Ranks",
    "TensorParallel",
    "cut_layers",
    "join_ranks",
    "talk_through",
]
