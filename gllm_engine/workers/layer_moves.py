"""Decides when layers move between neighbouring pipeline stages, and tells the ranks.

The slowest stage sets the pace of a pipeline. A cut that is right for one kind of work is not for
another: the last stage computes logits only for tokens that are followed by a new one, and kernels
differ in how they scale. So the stages' times are measured while they serve. If those of two
neighbours differ for a minute by more than a layer takes, the slower one gives a layer away. (The
idea is DynaPipe's.) The difference is then smaller than before, unless that layer takes longer than
others: it comes back then, and is not given away again.

    steps | LoadLayers to all ranks | steps, ranks load | LayersLoaded of all | MoveLayers | steps

Knows nothing of sockets or tensors.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from itertools import accumulate

from gllm_engine import wire

# Stages are compared over this time, and at least so many steps.
WINDOW_S = 60.0
LEAST_STEPS = 100

log = logging.getLogger(__name__)


class LayerMoves:
    """The cut of a pipeline, which follows the stages' times.

    `cut`: the number of layers of each stage, as it is after all messages of `due`.
    """

    def __init__(
        self,
        cut: tuple[int, ...],
        run_lengths: list[int],
        spare: int,
        num_ranks: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`run_lengths`: layers that only move together, see Model.runs. `spare`: a stage has
        memory for so many layers more than in `cut`.
        """
        self.cut = cut
        self._starts = list(accumulate(run_lengths, initial=0))
        self._most = [number + spare for number in cut]
        self._num_ranks = num_ranks
        self._clock = clock
        self._next: tuple[int, ...] | None = None  # the cut whose layers are being loaded
        self._loaded: dict[int, str] = {}  # by rank, the problem or nothing
        self._before: tuple[int, ...] | None = None  # the cut before the last move
        self._taken_back: set[tuple[int, ...]] = set()  # the results of moves that were
        self._is_over = False
        self._begin()

    def _begin(self) -> None:
        self._until = self._clock() + WINDOW_S
        self._seconds = [0.0 for _ in self.cut]
        self._steps = [0 for _ in self.cut]

    def observe(self, stage: int, seconds: float) -> None:
        """A stage has computed a step."""
        self._seconds[stage] += seconds
        self._steps[stage] += 1

    def note(self, loaded: wire.LayersLoaded) -> None:
        if loaded.cut == self._next:
            self._loaded[loaded.rank] = loaded.problem

    def due(self) -> wire.LoadLayers | wire.MoveLayers | None:
        """The message that all ranks must get before the next step, if there is one."""
        if self._next is None:
            return self._load()
        if len(self._loaded) < self._num_ranks:
            return None
        problems = {rank: problem for rank, problem in self._loaded.items() if problem}
        if problems:
            log.warning("layers do not move any more: %s", problems)
            self._is_over = True
            self._next = None
            return wire.LoadLayers(())  # ranks free what they have loaded
        if self._next == self._before:
            self._taken_back.add(self.cut)
        self._before = self.cut
        self.cut = self._next
        self._next = None
        self._begin()
        log.info("layers move: the stages have %s now", self.cut)
        return wire.MoveLayers()

    def _load(self) -> wire.LoadLayers | None:
        if self._is_over or self._clock() < self._until or min(self._steps) < LEAST_STEPS:
            return None
        better = self._better_cut()
        if better is None:
            self._begin()
            return None
        self._next = better
        self._loaded.clear()
        return wire.LoadLayers(better)

    def _better_cut(self) -> tuple[int, ...] | None:
        """The cut after the most useful move of one run of layers; None if no move is useful."""
        means = [total / n for total, n in zip(self._seconds, self._steps, strict=True)]
        best = None
        most = 0.0
        for stage, end in enumerate(accumulate(self.cut[:-1])):
            slow, fast = stage, stage + 1
            if means[slow] < means[fast]:
                slow, fast = fast, slow
            # The end of `stage` comes before the run that moves, or after it.
            run = self._starts.index(end) + (-1 if slow == stage else 1)
            moved = abs(self._starts[run] - end)
            gain = means[slow] - means[fast] - moved * means[slow] / self.cut[slow]
            cut = list(self.cut)
            cut[slow] -= moved
            cut[fast] += moved
            is_possible = cut[slow] > 0 and cut[fast] <= self._most[fast]
            if gain > most and is_possible and tuple(cut) not in self._taken_back:
                most = gain
                best = tuple(cut)
        return best
