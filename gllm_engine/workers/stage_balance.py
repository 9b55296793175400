"""Decides when layers move between neighbouring pipeline stages.

The slowest stage sets the pace of a pipeline. A cut that is right for one kind of work is not for
another: the last stage computes logits only for tokens that are followed by a new one, and kernels
differ in how they scale. So the stages' times are measured while they serve. If those of two
neighbours differ by more than a layer takes, over a minute of computing, the slower one gives a
layer away. (The idea is DynaPipe's.) If that makes things worse, because the layer takes longer
than others, it comes back, and that cut is not tried again for an hour: a load that has changed
looks the same.

    steps | LoadLayers to all ranks | steps, ranks load | LayersLoaded of all | MoveLayers | steps

Knows nothing of sockets or tensors.
"""

from __future__ import annotations

import logging
from itertools import accumulate

from gllm_engine import wire

# Stages are compared over so many seconds of the slowest stage, and at least so many steps.
WINDOW_S = 60.0
LEAST_STEPS = 100
# A cut that was taken back is tried again after so many windows.
RETRY_WINDOWS = 60
# The slower stage must gain this share of its time, because a move pauses all stages.
LEAST_GAIN = 0.01

log = logging.getLogger(__name__)

Cut = tuple[int, ...]  # layers of each stage


class StageBalance:
    """The cut of a pipeline, which follows the stages' times.

    `cut`: as it is once the ranks have all messages of `due`.
    """

    def __init__(self, cut: Cut, run_lengths: list[int], spare: int, num_ranks: int) -> None:
        """`run_lengths`: layers that only move together, see Model.runs. `spare`: a stage has
        memory for so many layers more than in `cut`; with 0, none move.
        """
        self.cut = cut
        self._starts = list(accumulate(run_lengths, initial=0))
        self._limits = [number + spare for number in cut]
        self._num_ranks = num_ranks
        self._next: Cut | None = None  # the cut whose layers are being loaded
        self._problems: dict[int, str] = {}  # by rank that has loaded: its problem, or nothing
        self._before: Cut | None = None  # the cut before the last move, if that was the last event
        self._window = 0  # its number
        self._retry: dict[Cut, int] = {}  # results of moves that were taken back -> tried again in
        self._begin_window()

    def _begin_window(self) -> None:
        self._window += 1
        self._seconds = [0.0 for _ in self.cut]
        self._steps = [0 for _ in self.cut]

    def observe(self, stage: int, seconds: float) -> None:
        """A stage has computed a step."""
        self._seconds[stage] += seconds
        self._steps[stage] += 1

    def loaded(self, rank: int, problem: str) -> None:
        """A rank answers LoadLayers."""
        self._problems[rank] = problem

    def due(self) -> wire.LoadLayers | wire.MoveLayers | None:
        """The message that all ranks must get before the next step, if there is one."""
        if self._next is None:
            return self._load()
        if len(self._problems) < self._num_ranks:
            return None
        problems = {rank: problem for rank, problem in self._problems.items() if problem}
        if problems:
            log.warning("layers do not move any more: %s", problems)
            self._limits = list(self.cut)
            self._next = None
            return wire.LoadLayers(())  # ranks free what they have loaded
        if self._next == self._before:
            self._retry[self.cut] = self._window + RETRY_WINDOWS
        self._before = self.cut
        self.cut = self._next
        self._next = None
        self._begin_window()
        log.info("layers move: the stages have %s now", self.cut)
        return wire.MoveLayers()

    def _load(self) -> wire.LoadLayers | None:
        if max(self._seconds) < WINDOW_S or min(self._steps) < LEAST_STEPS:
            return None
        self._next = self._better_cut()
        if self._next is None:
            self._before = None
            self._begin_window()
            return None
        self._problems.clear()
        return wire.LoadLayers(self._next)

    def _better_cut(self) -> Cut | None:
        """The cut after the most useful move of one run of layers; None if no move is useful."""
        means = [total / n for total, n in zip(self._seconds, self._steps, strict=True)]
        best = None
        most = LEAST_GAIN * max(means)
        for stage, end in enumerate(accumulate(self.cut[:-1])):
            first_is_slow = means[stage] > means[stage + 1]
            slow = stage if first_is_slow else stage + 1
            fast = stage + 1 if first_is_slow else stage
            # The run that moves ends where `stage` ends, or begins there.
            other_end = self._starts[self._starts.index(end) + (-1 if first_is_slow else 1)]
            moved = abs(other_end - end)
            # The last stage does more than its layers.
            layer = min(means[slow] / self.cut[slow], means[fast] / self.cut[fast])
            gain = means[slow] - means[fast] - moved * layer
            numbers = list(self.cut)
            numbers[slow] -= moved
            numbers[fast] += moved
            cut = tuple(numbers)
            is_possible = numbers[slow] > 0 and numbers[fast] <= self._limits[fast]
            if gain > most and is_possible and self._window >= self._retry.get(cut, 0):
                most = gain
                best = cut
        return best
