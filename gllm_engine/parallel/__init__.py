"""Communication between ranks: the mesh, collectives, the pipeline.

It uses torch.distributed, with NCCL between GPUs and gloo between CPUs. The package knows no models
and no scheduling.
"""

from __future__ import annotations

from gllm_engine.parallel.mesh import Mesh, partition_layers
from gllm_engine.parallel.pipe import Awaited, Pipe
from gllm_engine.parallel.rank_groups import RankGroups, join_ranks, talk_through
from gllm_engine.parallel.tensor_parallel import ALONE, TensorParallel

__all__ = [
    "ALONE",
    "Awaited",
    "Mesh",
    "Pipe",
    "RankGroups",
    "TensorParallel",
    "partition_layers",
    "join_ranks",
    "talk_through",
]
