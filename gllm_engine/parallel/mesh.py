"""The role of each rank: `pp` pipeline stages of consecutive layers, each held by `tp` ranks.

Pure arithmetic; no tensors, no sockets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import inf


@dataclass(frozen=True)
class Mesh:
    """Ranks 0 .. pp * tp - 1. The ranks of a stage are consecutive, so that they share a node."""

    pp: int = 1
    tp: int = 1

    @property
    def world(self) -> int:
        return self.pp * self.tp

    def stage(self, rank: int) -> int:
        return rank // self.tp

    def tp_rank(self, rank: int) -> int:
        return rank % self.tp

    def rank_at(self, stage: int, tp_rank: int) -> int:
        """The rank with tensor parallel number `tp_rank` in a stage."""
        return stage * self.tp + tp_rank


def partition_layers(
    costs: list[float], tail: float, stages: int, lengths: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Partition layers into consecutive stages so that the largest cost of a stage is minimal.

    Returns the number of layers of each stage. `costs`: the cost of each run of layers. `lengths`:
    their numbers of layers (default: 1). `tail`: the last stage's cost beside its layers. Every
    stage gets at least one run, and whole ones only. Among partitions with the same maximum, the
    most even one is chosen. Linear partitioning by dynamic programming (Skiena, "The Algorithm
    Design Manual", 10.7). Raises ValueError for fewer runs than stages.
    """
    if len(costs) < stages:
        raise ValueError(f"{len(costs)} runs of layers cannot be cut into {stages} stages")
    dearest, _ = _partition(costs, tail, stages, max)
    limit = dearest * (1 + 1e-9)

    def squares(before: float, cost: float) -> float:
        return before + cost * cost if cost <= limit else inf

    sizes = _partition(costs, tail, stages, squares)[1]
    if lengths is None:
        return sizes
    ends = [0, *accumulate(sizes)]
    return tuple(sum(lengths[first:end]) for first, end in pairwise(ends))


def _partition(
    costs: list[float], tail: float, stages: int, fold: Callable[[float, float], float]
) -> tuple[float, tuple[int, ...]]:
    """The smallest result of `fold` over the stages' costs, from 0, and the sizes that give it."""
    ends = [0.0, *accumulate(costs)]
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # by number of layers assigned
    for stage in range(stages):
        extra = tail if stage == stages - 1 else 0.0
        best = {
            n: min(
                (fold(so_far, ends[n] - ends[k] + extra), (*sizes, n - k))
                for k, (so_far, sizes) in best.items()
                if k < n
            )
            for n in range(stage + 1, len(costs) - (stages - stage - 1) + 1)
        }
    return best[len(costs)]
