"""Layers that move to and fro all the time, between whatever steps run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from gllm_engine import LLM
from gllm_engine.workers import stage_balance
from gllm_engine.workers.stage_balance import StageBalance


@contextmanager
def restless_layers(most: int | None = None) -> Iterator[list[tuple[int, ...]]]:
    """Yields the cuts that pipelines with spare layers leave meanwhile, `most` of them."""
    cuts: list[tuple[int, ...]] = []

    def to_and_fro(balance: StageBalance) -> tuple[int, ...] | None:
        """Each boundary in turn, one run of layers to the left and back."""
        if len(cuts) == most or balance._limits == list(balance.cut):
            return None
        cut = balance.cut
        cuts.append(cut)
        if cut != cuts[0]:
            return cuts[0]
        stage = len(cuts) // 2 % (len(cut) - 1)
        end = sum(cut[: stage + 1])
        at = balance._starts.index(end)
        moved = end - balance._starts[at - 1]
        if moved == cut[stage]:
            moved = end - balance._starts[at + 1]
        numbers = list(cut)
        numbers[stage] -= moved
        numbers[stage + 1] += moved
        return tuple(numbers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_balance, "WINDOW_S", 0.0)
        patch.setattr(stage_balance, "LEAST_STEPS", 1)
        patch.setattr(StageBalance, "_better_cut", to_and_fro)
        yield cuts


def serve_until_moved(llm: LLM, left: list[tuple[int, ...]], serve: Callable[[], object]) -> None:
    """`left`: of restless_layers. Steps may be over before the first layers are loaded."""
    serve()
    while llm.config.spare_layers and len(set(left)) < 2:
        serve()
