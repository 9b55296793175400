"""Layers that move to and fro all the time, between whatever steps run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gllm_engine.workers import layer_moves
from gllm_engine.workers.layer_moves import LayerMoves


@contextmanager
def restless_layers(most: int | None = None) -> Iterator[list[tuple[int, ...]]]:
    """Yields the cuts that pipelines with spare layers leave meanwhile, `most` of them."""
    cuts: list[tuple[int, ...]] = []

    def to_and_fro(moves: LayerMoves) -> tuple[int, ...] | None:
        if len(cuts) == most:
            return None
        cut = moves.cut
        cuts.append(cut)
        if len(cuts) > 1 and cut != cuts[-2]:
            return cuts[-2]
        at = moves._starts.index(cut[0])
        end = moves._starts[at - 1] or moves._starts[at + 1]
        return (end, cut[0] + cut[1] - end, *cut[2:])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_moves, "WINDOW_S", 0.0)
        patch.setattr(layer_moves, "LEAST_STEPS", 1)
        patch.setattr(LayerMoves, "_better_cut", to_and_fro)
        yield cuts
