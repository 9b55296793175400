"""Which rank does what: `pp` stages, each a run of layers, held by `tp` ranks together.

Pure arithmetic; no tensors, no sockets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from math import inf


@dataclass(frozen=True)
class Mesh:
    """Ranks 0 .. pp * tp - 1; those of a stage follow each other, so that they share a node."""

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
        """The rank that is number `tp_rank` of a stage."""
        return stage * self.tp + tp_rank


def partition_layers(costs: list[float], tail: float, stages: int) -> tuple[int, ...]:
    """How many consecutive layers each stage gets, so that the dearest stage is as cheap as can be.

    `costs`: of each layer; `tail`: what the last stage does beside its layers. Every stage gets at
    least one. Of the cuts that are equal in this the most even one. Linear partitioning by dynamic
    programming (Skiena, "The Algorithm Design Manual", 10.7). Raises ValueError for fewer layers
    than stages.
    """
    if len(costs) < stages:
        raise ValueError(f"{len(costs)} layers cannot be cut into {stages} stages")
    dearest, _ = _partition(costs, tail, stages, max)
    limit = dearest * (1 + 1e-9)

    def squares(before: float, cost: float) -> float:
        return before + cost * cost if cost <= limit else inf

    return _partition(costs, tail, stages, squares)[1]


def _partition(
    costs: list[float], tail: float, stages: int, fold: Callable[[float, float], float]
) -> tuple[float, tuple[int, ...]]:
    """The least that `fold`, over the stages' costs from 0, can come to, and the sizes for it."""
    ends = [0.0, *accumulate(costs)]
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # by layers given away
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
